// The functions of cuBLAS that beamline's binaries import. Products are plain loops, each output one sum in a fixed order, so that it does not
// depend on how many rows there are; a real cuBLAS chooses by them.
#include "stand_in.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace stand_in {
namespace {

// Types, operations and computations by their numbers in library_types.h and cublas_api.h.
constexpr int R_32F = 0, R_16BF = 14, OP_N = 0, OP_T = 1, COMPUTE_32F = 68;

struct Handle {
    Stream *stream = nullptr;
    std::uint64_t workspace = 0;
    std::size_t workspace_bytes = 0;
};

float widen(std::uint16_t bits) {
    const std::uint32_t wide = std::uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

std::uint16_t narrow(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return 0x7fff;
    return std::uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

std::vector<float> widened(std::uint64_t address, std::size_t count) {
    const auto *from = reinterpret_cast<const std::uint16_t *>(address);
    std::vector<float> to(count);
    std::transform(from, from + count, to.begin(), widen);
    return to;
}

float dot(const float *a, const float *b, std::size_t count) {
    constexpr std::size_t LANES = 16;
    float sums[LANES] = {};
    std::size_t at = 0;
    for (; at + LANES <= count; at += LANES) {
        for (std::size_t lane = 0; lane < LANES; ++lane) sums[lane] += a[at + lane] * b[at + lane];
    }
    float sum = 0;
    for (float part : sums) sum += part;
    for (; at < count; ++at) sum += a[at] * b[at];
    return sum;
}

struct Matrix {
    std::uint64_t address;
    std::size_t rows, columns, leading, value_bytes;
    // Columns lie one after the other.
    std::size_t bytes() const { return ((columns - 1) * leading + rows) * value_bytes; }
};

// Multiplies the transpose of `a` with `b`.
void multiply(const Matrix &a, const Matrix &b, const Matrix &c) {
    const auto left = widened(a.address, (a.columns - 1) * a.leading + a.rows), right = widened(b.address, (b.columns - 1) * b.leading + b.rows);
    for (std::size_t column = 0; column < c.columns; ++column) {
        for (std::size_t row = 0; row < c.rows; ++row) {
            const float sum = dot(&left[row * a.leading], &right[column * b.leading], a.rows);
            const std::size_t at = column * c.leading + row;
            if (c.value_bytes == 4) reinterpret_cast<float *>(c.address)[at] = sum;
            else reinterpret_cast<std::uint16_t *>(c.address)[at] = narrow(sum);
        }
    }
}

bool overlap(const Matrix &a, const Matrix &b) { return a.address < b.address + b.bytes() && b.address < a.address + a.bytes(); }

Handle &handle_of(const char *call, void *handle) {
    require_context(call);
    require(handle != nullptr, call, "no handle");
    return *static_cast<Handle *>(handle);
}

} // namespace
} // namespace stand_in

using namespace stand_in;

extern "C" {

int cublasCreate_v2(void **handle) {
    Turn turn(one_at_a_time);
    require_context("cublasCreate");
    *handle = new Handle;
    return SUCCESS;
}

int cublasDestroy_v2(void *handle) {
    Turn turn(one_at_a_time);
    handle_of("cublasDestroy", handle);
    // It waits for the device.
    wait_for_all("cublasDestroy");
    delete static_cast<Handle *>(handle);
    return SUCCESS;
}

// Takes the workspace away, as documented.
int cublasSetStream_v2(void *handle, void *stream) {
    Turn turn(one_at_a_time);
    Handle &known = handle_of("cublasSetStream", handle);
    known.stream = &stream_of("cublasSetStream", stream);
    known.workspace = 0, known.workspace_bytes = 0;
    return SUCCESS;
}

int cublasSetWorkspace_v2(void *handle, void *workspace, std::size_t bytes) {
    Turn turn(one_at_a_time);
    Handle &known = handle_of("cublasSetWorkspace", handle);
    const auto address = reinterpret_cast<std::uint64_t>(workspace);
    require(address % ALIGNMENT == 0, "cublasSetWorkspace", "the workspace is not aligned to 256 bytes");
    check_device("cublasSetWorkspace", "the workspace", address, bytes, false);
    known.workspace = address, known.workspace_bytes = bytes;
    return SUCCESS;
}

int cublasSetMathMode(void *handle, int mode) {
    Turn turn(one_at_a_time);
    handle_of("cublasSetMathMode", handle);
    // CUBLAS_DEFAULT_MATH, with or without CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION.
    require(mode == 0 || mode == 16, "cublasSetMathMode", "the stand-in does not know this mode");
    return SUCCESS;
}

int cublasGemmEx(void *handle, int a_operation, int b_operation, int m, int n, int k, const void *alpha, const void *a, int a_type, int a_leading,
                 const void *b, int b_type, int b_leading, const void *beta, void *c, int c_type, int c_leading, int compute, int algorithm) {
    Turn turn(one_at_a_time);
    const char *name = "cublasGemmEx";
    Handle &known = handle_of(name, handle);
    require(known.stream != nullptr, name, "the handle has no stream, so the default one would be used");
    require(known.workspace != 0, name, "no workspace: it was not set, or cublasSetStream took it away");
    require(a_operation == OP_T && b_operation == OP_N, name, "the stand-in multiplies a transpose with a matrix only");
    require(m > 0 && n > 0 && k > 0, name, "a matrix without values");
    require(a_leading >= k && b_leading >= k && c_leading >= m, name, "a leading dimension that is too small");
    require(a_type == R_16BF && b_type == R_16BF, name, "inputs must be bf16");
    require(c_type == R_16BF || c_type == R_32F, name, "outputs must be bf16 or single precision");
    require(compute == COMPUTE_32F, name, "sums must be in single precision");
    require(algorithm == -1 || algorithm == 99, name, "there is no such algorithm");
    float factors[2];
    std::memcpy(&factors[0], alpha, 4), std::memcpy(&factors[1], beta, 4);
    require(factors[0] == 1.0f && factors[1] == 0.0f, name, "the stand-in knows factors of 1 and 0 only");
    const auto address = [](const void *pointer) { return reinterpret_cast<std::uint64_t>(pointer); };
    const Matrix left{address(a), std::size_t(k), std::size_t(m), std::size_t(a_leading), 2};
    const Matrix right{address(b), std::size_t(k), std::size_t(n), std::size_t(b_leading), 2};
    const Matrix out{address(c), std::size_t(m), std::size_t(n), std::size_t(c_leading), c_type == R_32F ? 4u : 2u};
    for (const Matrix *matrix : {&left, &right, &out}) {
        require(matrix->address % matrix->value_bytes == 0, name, "a matrix is not aligned to its values");
        check_device(name, "a matrix", matrix->address, matrix->bytes(), false);
    }
    require(!overlap(out, left) && !overlap(out, right), name, "the output lies over an input");
    const std::uint64_t workspace = known.workspace;
    const std::size_t workspace_bytes = known.workspace_bytes;
    enqueue(*known.stream, {name, [=] {
        check_device(name, "the workspace", workspace, workspace_bytes, true);
        for (const Matrix *matrix : {&left, &right, &out}) check_device(name, "a matrix", matrix->address, matrix->bytes(), true);
        // What cuBLAS leaves there is its own business.
        std::memset(reinterpret_cast<void *>(workspace), 0xff, std::min<std::size_t>(workspace_bytes, 4096));
        multiply(left, right, out);
    }, nullptr, nullptr});
    return SUCCESS;
}

} // extern "C"
