// The PTX instructions that kernels use, by name: inline assembly under nvcc, their documented effect on the host.
//
// Place in the flow: included by common.cuh; kernels hold no assembly of their own. Every function that involves a warp is called by all 32
// lanes.
// Source: PTX ISA 9.0, "Warp-level matrix instructions" and "Asynchronous copy". All of it exists from sm_80 on.
#pragma once

#include "platform.cuh"

// An address in shared memory as instructions take it, in bytes. Arithmetic on it costs half of that on a pointer.
#ifdef __CUDACC__
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void *shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#else
using SharedAddress = std::uintptr_t;
inline SharedAddress shared_address(const void *shared) { return reinterpret_cast<std::uintptr_t>(shared); }
#endif

// Lane l gives the address of row l % 8 of matrix l / 8 (8 x 8 elements of 16 bits, a row is 16 bytes, aligned) and receives elements
// (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1) of each of the four, the first in the low half.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&result)[4], SharedAddress row EMULATION_LOCATION) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
        : "r"(row)
        : "memory");
#else
    emulation::ldmatrix_x4(result, reinterpret_cast<const void *>(row), false, where);
#endif
}

// The same, of the transpose of each matrix.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&result)[4], SharedAddress row EMULATION_LOCATION) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
        : "r"(row)
        : "memory");
#else
    emulation::ldmatrix_x4(result, reinterpret_cast<const void *>(row), true, where);
#endif
}

// accumulator[16][8] += a[16][16] b[16][8], bf16 inputs, f32 sums. With g = lane / 4, t = lane % 4 a lane holds
//   a[0] (g, 2t)  a[1] (g + 8, 2t)  a[2] (g, 2t + 8)  a[3] (g + 8, 2t + 8), each with the next column in the high half;
//   b[0] (2t, g)  b[1] (2t + 8, g), each with the next row in the high half;
//   accumulator[0], [1] (g, 2t), (g, 2t + 1);  [2], [3] (g + 8, 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void mma_m16n8k16_bf16(
    float (&accumulator)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 EMULATION_LOCATION) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    const uint32_t b[2] = {b0, b1};
    emulation::mma_m16n8k16_bf16(accumulator, a, b, where);
#endif
}

// Starts copying 16 bytes, or writing 16 zero bytes if not `valid`; then `global` is not read. The target is undefined until a wait.
__device__ __forceinline__ void cp_async_16(SharedAddress shared, const void *global, bool valid = true) {
#ifdef __CUDACC__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :
        : "r"(shared), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
        : "memory");
#else
    emulation::copy_async(reinterpret_cast<void *>(shared), global, valid ? 16 : 0);
#endif
}

__device__ __forceinline__ void cp_async_16(void *shared, const void *global, bool valid = true) {
    cp_async_16(shared_address(shared), global, valid);
}

// Closes the calling thread's group of copies.
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emulation::copy_async_commit();
#endif
}

// Waits until at most `pending` of the calling thread's latest groups are still under way. Others see the copies after a barrier.
template <int pending> __device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#else
    emulation::copy_async_wait(pending);
#endif
}

// 2^x, subnormal inputs and results as zero; 2^-inf is 0. On the hardware within 2 units in the last place.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDACC__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    const float result = std::exp2(x);
    return result < 1.17549435e-38f ? 0.0f : result;
#endif
}

// 1 / x, subnormal inputs and results as zero; 1 / inf is 0. On the hardware within 1 unit in the last place.
__device__ __forceinline__ float reciprocal_approx(float x) {
#ifdef __CUDACC__
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    const float result = 1.0f / x;
    return std::fabs(result) < 1.17549435e-38f ? 0.0f : result;
#endif
}
