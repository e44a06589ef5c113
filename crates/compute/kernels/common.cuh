// What the kernels share: constants, reductions over a warp, packing of bf16.
//
// Place in the flow: included by every kernel; knows no kernel.
// Invariant: reductions go through the same tree whatever the data, so results are the same, bit for bit, for the same inputs.
#pragma once

#include "ptx.cuh"

// Tokens in a page, as in `cpu::pages`.
constexpr int PAGE = 32;
constexpr unsigned FULL_WARP = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float negative_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }

// Sum over the warp, the same in every lane.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(FULL_WARP, value, distance);
    return value;
}

// Largest value over the warp, the same in every lane.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, distance));
    return value;
}

// Sum and maximum over the 4 lanes that share a row of an mma accumulator.
__device__ __forceinline__ float quad_sum(float value) {
    value += __shfl_xor_sync(FULL_WARP, value, 1);
    return value + __shfl_xor_sync(FULL_WARP, value, 2);
}
__device__ __forceinline__ float quad_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, 1));
    return fmaxf(value, __shfl_xor_sync(FULL_WARP, value, 2));
}

// Two values rounded to bf16, `low` in the low half, which comes first in memory.
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
#ifdef __CUDACC__
    return *reinterpret_cast<const uint32_t *>(&pair);
#else
    return uint32_t(pair.x.bits) | uint32_t(pair.y.bits) << 16;
#endif
}

// The two values of a packed pair.
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
