// From queries, keys and values as a product made them to what attention reads: bias, norm per head, rotary position, and a
// place in the pages.
//
// Place in the flow: after the product of queries, keys and values; before attention. The CPU counterparts are
// `cpu::rotary::turn_heads` and `cpu::pages`. Rotary positions: Su et al. 2021, on half pairs: element i turns with element
// i + head_dim / 2.
//
//   qkv           [rows][(q_heads + 2 * kv_heads) * head_dim] bf16: queries, keys, values
//   bias          [(q_heads + 2 * kv_heads) * head_dim] single precision, or null
//   q_norm        [head_dim] weights of the norm of each query head, or null; k_norm of each key head
//   rotary        [position][cos of head_dim / 2 | sin of head_dim / 2], scale included: the table of `cpu::rotary`
//   positions     [rows]
//   slots         [rows] page * 32 + offset where keys and values go, or -1: nowhere
//   queries       [rows][q_heads][padded_dim] bf16
//   keys, values  [page][kv_heads][32][padded_dim] bf16, the pages of one layer
//
// head_dim is even and at most 256, padded_dim a multiple of 16 and not less. Columns from head_dim on are written as zero.
// Everything between reading and writing is single precision.
//
// A warp does one head of one row: lane l has elements 2 l and 2 l + 1, and those from 64 on, of both halves; so a head of 128 is
// four words per lane. Grid: ceil(rows * (q_heads + 2 * kv_heads) / 8) blocks of 256 threads. Arrays begin at multiples of 16 bytes.
//
// Invariant, bit for bit: what is stored for a row depends on that row, its position and the weights alone.
#include "common.cuh"

namespace rotary {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int PARTS = 2;  // 64 elements of each half at a time: heads of up to 256

// Two neighbouring elements, of which `count` exist. As one word if `paired`.
__device__ __forceinline__ float2 load_two(const bf16 *address, int count, bool paired) {
    if (paired) {
        const uint32_t word = *reinterpret_cast<const uint32_t *>(address);
        return make_float2(low_bf16(word), high_bf16(word));
    }
    return make_float2(count > 0 ? __bfloat162float(address[0]) : 0.0f, count > 1 ? __bfloat162float(address[1]) : 0.0f);
}

__device__ __forceinline__ float2 load_two(const float *address, int count, bool paired) {
    if (paired) return *reinterpret_cast<const float2 *>(address);
    return make_float2(count > 0 ? address[0] : 0.0f, count > 1 ? address[1] : 0.0f);
}

__device__ __forceinline__ void store_two(bf16 *address, float2 values, int count, bool paired) {
    if (paired) {
        *reinterpret_cast<uint32_t *>(address) = pack_bf16x2(values.x, values.y);
        return;
    }
    if (count > 0) address[0] = __float2bfloat16(values.x);
    if (count > 1) address[1] = __float2bfloat16(values.y);
}

__device__ __forceinline__ float2 add(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ __forceinline__ float2 scale(float2 a, float by, float2 weight) {
    return make_float2(a.x * by * weight.x, a.y * by * weight.y);
}
__device__ __forceinline__ float squares(float2 a, float sum) { return __fmaf_rn(a.y, a.y, __fmaf_rn(a.x, a.x, sum)); }

}  // namespace rotary

extern "C" __global__ void __launch_bounds__(rotary::THREADS)
    rotary_store(const bf16 *qkv, const float *bias, const float *q_norm, const float *k_norm, const float *rotary,
                 const uint32_t *positions, const int32_t *slots, bf16 *queries, bf16 *keys, bf16 *values, uint32_t rows,
                 int q_heads, int kv_heads, int head_dim, int padded_dim, float epsilon) {
    using namespace rotary;
    const int lane = static_cast<int>(threadIdx.x) % 32, heads = q_heads + 2 * kv_heads, half = head_dim / 2;
    const size_t task = static_cast<size_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (task >= static_cast<size_t>(rows) * heads) return;
    const size_t row = task / heads;
    const int head = static_cast<int>(task % heads);
    const bool is_query = head < q_heads, is_value = head >= q_heads + kv_heads;

    bf16 *out;
    if (is_query) {
        out = queries + (row * q_heads + head) * padded_dim;
    } else {
        const int32_t slot = slots[row];
        if (slot < 0) return;
        const int kv_head = head - q_heads - (is_value ? kv_heads : 0);
        out = (is_value ? values : keys) +
              ((static_cast<size_t>(slot / PAGE) * kv_heads + kv_head) * PAGE + slot % PAGE) * padded_dim;
    }

    const bool paired = half % 2 == 0;
    const bf16 *const in = qkv + task * head_dim;
    float2 low[PARTS], high[PARTS];
    int count[PARTS];
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int at = part * 64 + lane * 2;
        count[part] = half - at;
        low[part] = high[part] = make_float2(0.0f, 0.0f);
        if (count[part] <= 0) continue;
        low[part] = load_two(in + at, count[part], paired);
        high[part] = load_two(in + half + at, count[part], paired);
        if (bias != nullptr) {
            low[part] = add(low[part], load_two(bias + head * head_dim + at, count[part], paired));
            high[part] = add(high[part], load_two(bias + head * head_dim + half + at, count[part], paired));
        }
        sum = squares(high[part], squares(low[part], sum));
    }
    const float *const norm = is_query ? q_norm : k_norm;
    const bool normed = !is_value && norm != nullptr;
    float by = 1.0f;
    if (normed) by = 1.0f / sqrtf(warp_sum(sum) / static_cast<float>(head_dim) + epsilon);
    const float *const turn = rotary + static_cast<size_t>(positions[row]) * head_dim;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int at = part * 64 + lane * 2;
        if (count[part] <= 0) continue;
        float2 a = low[part], b = high[part];
        if (normed) {
            a = scale(a, by, load_two(norm + at, count[part], paired));
            b = scale(b, by, load_two(norm + half + at, count[part], paired));
        }
        if (!is_value) {
            const float2 cosine = load_two(turn + at, count[part], paired),
                         sine = load_two(turn + half + at, count[part], paired);
            const float2 x = a, y = b;
            a = make_float2(x.x * cosine.x - y.x * sine.x, x.y * cosine.y - y.y * sine.y);
            b = make_float2(y.x * cosine.x + x.x * sine.x, y.y * cosine.y + x.y * sine.y);
        }
        store_two(out + at, a, count[part], paired);
        store_two(out + half + at, b, count[part], paired);
    }
    for (int at = head_dim + lane; at < padded_dim; at += 32) out[at] = __float2bfloat16(0.0f);
}
