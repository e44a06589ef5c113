// One row of the residual stream in the registers of a block, and its root-mean-square norm.
//
// Place in the flow: norm.cu and embed.cu fill a row, each in its way, and normalise it here. The CPU counterpart is
// `cpu::vector::rms_norm`.
//
// Layout. A block holds one row; thread t holds columns 8 (t + g * threads) ... + 7 for g = 0, 1. So a block of `threads` takes
// rows of up to 16 * threads columns: threads = min(1024, ceil(width / 256) * 32) has at most 8 columns per thread up to a
// width of 8192. A width that is not a multiple of 8 is read value by value; the columns of a thread are the same.
//
// Invariant, bit for bit: a row's result depends on the row, the width and the number of threads alone.
#pragma once

#include "common.cuh"

namespace rms_norm {

constexpr int GROUP = 8;
constexpr int GROUPS = 2;
constexpr int MOST_THREADS = 1024;

struct Row {
    float values[GROUPS][GROUP];
};

__device__ __forceinline__ int first_column(int group) { return static_cast<int>(threadIdx.x + group * blockDim.x) * GROUP; }

// Whether groups can be read and written as vectors; else value by value.
__device__ __forceinline__ bool is_whole(int width) { return width % GROUP == 0; }

__device__ __forceinline__ void load_group(const float *address, int count, bool whole, float (&values)[GROUP]) {
    if (whole) {
        const float4 low = reinterpret_cast<const float4 *>(address)[0], high = reinterpret_cast<const float4 *>(address)[1];
        values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
        values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    } else {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) values[i] = i < count ? address[i] : 0.0f;
    }
}

__device__ __forceinline__ void load_group(const bf16 *address, int count, bool whole, float (&values)[GROUP]) {
    if (whole) {
        const uint4 all = *reinterpret_cast<const uint4 *>(address);
        values[0] = low_bf16(all.x), values[1] = high_bf16(all.x), values[2] = low_bf16(all.y), values[3] = high_bf16(all.y);
        values[4] = low_bf16(all.z), values[5] = high_bf16(all.z), values[6] = low_bf16(all.w), values[7] = high_bf16(all.w);
    } else {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) values[i] = i < count ? __bfloat162float(address[i]) : 0.0f;
    }
}

__device__ __forceinline__ void store_group(float *address, int count, bool whole, const float (&values)[GROUP]) {
    if (whole) {
        reinterpret_cast<float4 *>(address)[0] = make_float4(values[0], values[1], values[2], values[3]);
        reinterpret_cast<float4 *>(address)[1] = make_float4(values[4], values[5], values[6], values[7]);
    } else {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            if (i < count) address[i] = values[i];
        }
    }
}

__device__ __forceinline__ void store_group(bf16 *address, int count, bool whole, const float (&values)[GROUP]) {
    if (whole) {
        *reinterpret_cast<uint4 *>(address) = make_uint4(pack_bf16x2(values[0], values[1]), pack_bf16x2(values[2], values[3]),
                                                         pack_bf16x2(values[4], values[5]), pack_bf16x2(values[6], values[7]));
    } else {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            if (i < count) address[i] = __float2bfloat16(values[i]);
        }
    }
}

// Columns past the width are zero.
template <class Value>
__device__ __forceinline__ void load_row(const Value *from, int width, Row &row) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const int column = first_column(g);
        if (column < width) {
            load_group(from + column, width - column, is_whole(width), row.values[g]);
        } else {
#pragma unroll
            for (int i = 0; i < GROUP; ++i) row.values[g][i] = 0.0f;
        }
    }
}

template <class Value>
__device__ __forceinline__ void add_row(const Value *from, int width, Row &row) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const int column = first_column(g);
        if (column >= width) continue;
        float other[GROUP];
        load_group(from + column, width - column, is_whole(width), other);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) row.values[g][i] += other[i];
    }
}

template <class Value>
__device__ __forceinline__ void store_row(Value *to, int width, const Row &row) {
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const int column = first_column(g);
        if (column < width) store_group(to + column, width - column, is_whole(width), row.values[g]);
    }
}

// row = row / sqrt(mean(row^2) + epsilon) * weight. All threads of the block must come, once per kernel.
__device__ __forceinline__ void normalize(Row &row, const float *weight, int width, float epsilon) {
    SHARED_ARRAY(float, warp_sums, MOST_THREADS / 32);
    float sum = 0.0f;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) sum = __fmaf_rn(row.values[g][i], row.values[g][i], sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) sum += warp_sums[warp];
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(width) + epsilon);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const int column = first_column(g);
        if (column >= width) continue;
        float weights[GROUP];
        load_group(weight + column, width - column, is_whole(width), weights);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) row.values[g][i] = row.values[g][i] * scale * weights[i];
    }
}

}  // namespace rms_norm
