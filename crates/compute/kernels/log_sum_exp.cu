// log(sum of e^x) of each row of logits: what turns a logit into a log-probability over the full vocabulary.
//
// Place in the flow: after the output matrix, before `expand.cu`. Logits of all rows may be too much to keep, so a range of
// columns can be copied out on the way: those of the level that the beams continue by. Then rows go through the output
// matrix in groups, and only the copies stay.
//
//   logits   [rows][stride] single precision or bf16, `columns` of each row counted
//   out      [rows]
//   kept     [rows][kept_count] single precision, columns kept_first...; optional
//   partial  [rows][chunks] (maximum, sum relative to it), chunks = ceil(columns / 8192); only used where chunks > 1
//   arrived  [rows] zero before the first launch ever; every launch leaves it zero
//
// Algorithm. A block takes a chunk of 8192 columns into registers, so memory is read once; the maximum of the chunk, then the
// sum of e^(x - maximum) over it. The block that comes last in a row merges the chunks in order. Sums are in a fixed order
// that depends on the number of columns alone: a row's result has the same bits whatever the other rows, the stride or
// the alignment.
//
// Invariants. The result is not below any logit, in single precision either: the sum holds e^0 = 1, so its logarithm is
// not negative. A row that holds a value that is not finite yields NaN, which `expand.cu` makes a failure of the request.

#include "common.cuh"

typedef unsigned long long u64;

namespace log_sum_exp {

constexpr uint32_t THREADS = 256;
constexpr uint32_t GROUP = 4;  // neighbouring columns of a thread
constexpr uint32_t GROUPS = 8;
constexpr uint32_t CHUNK = THREADS * GROUP * GROUPS;  // 8192 columns

// Combines the values of all threads of a block in a fixed order; all get the result. `scratch` holds one per warp.
template <class Combine>
__device__ __forceinline__ float over_block(float value, float *scratch, Combine combine) {
    for (uint32_t distance = 16; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(FULL_WARP, value, distance));
    }
    __syncthreads();  // scratch of the call before was read
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = scratch[0];
    for (uint32_t warp = 1; warp < THREADS / 32; ++warp) value = combine(value, scratch[warp]);
    return value;
}

// Four columns; `count` of them exist. What does not exist is negative infinity.
__device__ __forceinline__ void load_group(const float *address, uint32_t count, float (&values)[GROUP]) {
    if (count == GROUP && reinterpret_cast<u64>(address) % 16 == 0) {
        const float4 all = *reinterpret_cast<const float4 *>(address);
        values[0] = all.x, values[1] = all.y, values[2] = all.z, values[3] = all.w;
    } else {
#pragma unroll
        for (uint32_t i = 0; i < GROUP; ++i) values[i] = i < count ? address[i] : negative_infinity();
    }
}

// The same of bf16, the upper halves of single-precision numbers.
__device__ __forceinline__ void load_group(const uint16_t *address, uint32_t count, float (&values)[GROUP]) {
    if (count == GROUP && reinterpret_cast<u64>(address) % 8 == 0) {
        const uint2 all = *reinterpret_cast<const uint2 *>(address);
        values[0] = __uint_as_float(all.x << 16), values[1] = __uint_as_float(all.x & 0xffff0000u);
        values[2] = __uint_as_float(all.y << 16), values[3] = __uint_as_float(all.y & 0xffff0000u);
    } else {
#pragma unroll
        for (uint32_t i = 0; i < GROUP; ++i) {
            values[i] = i < count ? __uint_as_float(static_cast<uint32_t>(address[i]) << 16) : negative_infinity();
        }
    }
}

template <class Logit>
__device__ __forceinline__ void log_sum_exp_of(const Logit *logits, u64 stride, uint32_t columns, float *out, float *kept,
                                               uint32_t kept_first, uint32_t kept_count, float2 *partial, uint32_t *arrived) {
    SHARED_ARRAY(float, scratch, THREADS / 32);
    SHARED_ARRAY(bool, is_last, 1);
    const u64 row = blockIdx.x;
    const uint32_t chunk = blockIdx.y, chunks = gridDim.y;
    const Logit *const values_of_row = logits + row * stride;
    const auto larger = [](float a, float b) { return a > b ? a : b; };
    const auto sum_of = [](float a, float b) { return a + b; };

    float values[GROUPS][GROUP];
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; ++g) {
        const uint32_t column = chunk * CHUNK + (g * THREADS + threadIdx.x) * GROUP;
        const uint32_t left = column < columns ? columns - column : 0;
        load_group(values_of_row + column, left < GROUP ? left : GROUP, values[g]);
    }
    float max = negative_infinity();
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (uint32_t i = 0; i < GROUP; ++i) max = larger(values[g][i], max);
    }
    max = over_block(max, scratch, larger);
    float sum = 0.0f;
#pragma unroll
    for (uint32_t g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (uint32_t i = 0; i < GROUP; ++i) {
            const uint32_t column = chunk * CHUNK + (g * THREADS + threadIdx.x) * GROUP + i;
            if (column >= columns) continue;
            const float x = values[g][i];
            // A maximum passes over NaN, and e^-inf over -inf; zero times either is not zero.
            sum += expf(x - max) + x * 0.0f;
            // Unsigned: columns before the first one are far beyond the last.
            if (kept != nullptr && column - kept_first < kept_count) kept[row * kept_count + (column - kept_first)] = x;
        }
    }
    sum = over_block(sum, scratch, sum_of);
    if (chunks == 1) {
        if (threadIdx.x == 0) out[row] = max + logf(sum);
        return;
    }
    if (threadIdx.x == 0) {
        partial[row * chunks + chunk] = make_float2(max, sum);
        __threadfence();
        is_last[0] = atomicAdd(arrived + row, 1u) == chunks - 1;
    }
    __syncthreads();
    if (!is_last[0]) return;
    __threadfence();
    const auto part = [&](uint32_t c) {
        const volatile float *const address = reinterpret_cast<const volatile float *>(partial + row * chunks + c);
        return make_float2(address[0], address[1]);
    };
    max = negative_infinity();
    for (uint32_t c = threadIdx.x; c < chunks; c += THREADS) max = larger(part(c).x, max);
    max = over_block(max, scratch, larger);
    sum = 0.0f;
    for (uint32_t c = threadIdx.x; c < chunks; c += THREADS) {
        const float2 one = part(c);
        sum += one.y * expf(one.x - max);
    }
    sum = over_block(sum, scratch, sum_of);
    if (threadIdx.x == 0) {
        out[row] = max + logf(sum);
        arrived[row] = 0;
    }
}

// Grid: (rows, ceil(columns / 8192)), blocks of 256 threads. `columns` at least 1.
extern "C" __global__ void __launch_bounds__(THREADS)
    log_sum_exp_f32(const float *logits, u64 stride, uint32_t columns, float *out, float *kept, uint32_t kept_first,
                    uint32_t kept_count, float2 *partial, uint32_t *arrived) {
    log_sum_exp_of(logits, stride, columns, out, kept, kept_first, kept_count, partial, arrived);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    log_sum_exp_bf16(const uint16_t *logits, u64 stride, uint32_t columns, float *out, float *kept, uint32_t kept_first,
                     uint32_t kept_count, float2 *partial, uint32_t *arrived) {
    log_sum_exp_of(logits, stride, columns, out, kept, kept_first, kept_count, partial, arrived);
}

}  // namespace log_sum_exp
