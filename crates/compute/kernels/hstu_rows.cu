// What lies between the matrix products of HSTU, row by row: embeddings, the residual stream and its layer norm, u | v | q | k to where
// attention finds them, and the gate of what attention found.
//
//   hstu_embed           ids -> residual
//   per layer            hstu_residual_norm | product uvqk | hstu_split | pointwise_attention (| pointwise_merge) |
//                        hstu_gate or hstu_gate_group | output product
//   hstu_residual_norm   after the last layer without a norm, for the rows that are wanted
//   hstu_finish          final states -> what is compared with items or tokens
//
// Place in the flow: all but pointwise_attention.cu that a layer of HSTU needs. The CPU counterparts are `families::hstu::stack` and
// `families::hstu::embed`. Everything between reading and writing is single precision. Arrays begin at multiples of 16 bytes.
//
// Invariant, bit for bit: what a row gets depends on that row and the weights alone.
#include "rms_norm.cuh"

namespace hstu {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
// Values of a head that a lane has: heads of up to 256.
constexpr int PARTS = 8;
using rms_norm::GROUP;
using rms_norm::GROUPS;
using rms_norm::Row;

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// Sum over the block, the same in every thread. `sums` has room for 32 and is used once per kernel.
__device__ __forceinline__ float block_sum(float value, float *sums) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.0f;
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += sums[warp];
    return total;
}

// row = (row - mean) / sqrt(variance + epsilon) (* weight + bias). The mean is taken off before squares are summed. All threads of the
// block must come, once per kernel. Columns past the width are zero and stay out of the variance.
__device__ __forceinline__ void normalize(Row &row, const float *weight, const float *bias, int width, float epsilon) {
    SHARED_ARRAY(float, sums, 32);
    SHARED_ARRAY(float, square_sums, 32);
    float sum = 0.0f;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) sum += row.values[g][i];
    }
    const float mean = block_sum(sum, sums) / static_cast<float>(width);
    float squares = 0.0f;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            const float off = row.values[g][i] - mean;
            if (rms_norm::first_column(g) + i < width) squares = __fmaf_rn(off, off, squares);
        }
    }
    const float scale = 1.0f / sqrtf(block_sum(squares, square_sums) / static_cast<float>(width) + epsilon);
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        const int column = rms_norm::first_column(g);
        if (column >= width) continue;
        float weights[GROUP], biases[GROUP];
        if (weight != nullptr) {
            rms_norm::load_group(weight + column, width - column, rms_norm::is_whole(width), weights);
            rms_norm::load_group(bias + column, width - column, rms_norm::is_whole(width), biases);
        }
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            const float normed = __fmul_rn(row.values[g][i] - mean, scale);
            row.values[g][i] = weight != nullptr ? __fmaf_rn(normed, weights[i], biases[i]) : normed;
        }
    }
}

// What the output product reads.
constexpr int GATED = 0, CONCAT_RAW = 1, CONCAT_NORMED = 2;

} // namespace hstu

// residual = (item (, action)) * scale + position, as the research models have it; zero where the item is padding or beyond the table.
//
//   items, positions [rows]; actions [rows], or null: none
//   item_table       [item_count][item_dim] f32; action_table [..][action_dim] f32; position_table [..][width] f32
//   residual         [rows][width] f32
//   padding          an item whose row is zero; 0xffffffff: none
//   concat           1: the action's row follows the item's, item_dim + action_dim = width; 0: they are added, item_dim = width
//
// Tables are single precision, as on the CPU: they are read a row at a time, and rounding them would be an error from the first layer on.
// Other models whose rows are one table's row times a scale and a position stack their tables and pass shifted ids.
// Grid: ceil(rows * width / 256) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(hstu::THREADS) hstu_embed(const uint32_t *items, const uint32_t *actions,
    const uint32_t *positions, const float *item_table, const float *action_table, const float *position_table, float *residual,
    uint32_t rows, uint32_t item_count, uint32_t padding, int item_dim, int action_dim, int width, int concat, float scale) {
    const size_t at = static_cast<size_t>(blockIdx.x) * hstu::THREADS + threadIdx.x;
    if (at >= static_cast<size_t>(rows) * width) return;
    const size_t row = at / width;
    const int column = static_cast<int>(at % width);
    const uint32_t item = items[row];
    if (item == padding || item >= item_count) {
        residual[at] = 0.0f;
        return;
    }
    float value = column < item_dim ? item_table[static_cast<size_t>(item) * item_dim + column] : 0.0f;
    if (actions != nullptr) {
        const float *const action = action_table + static_cast<size_t>(actions[row]) * action_dim;
        if (concat == 0)
            value = __fadd_rn(value, action[column]);
        else if (column >= item_dim)
            value = action[column - item_dim];
    }
    residual[at] = __fadd_rn(__fmul_rn(value, scale), position_table[static_cast<size_t>(positions[row]) * width + column]);
}

// residual = residual (+ delta) (+ bias) in single precision, out = layer_norm(residual) (* weight + norm_bias) in bf16.
//
//   residual       [rows before][width] f32, or null: a model without residuals, where delta takes its place
//   row_index      [rows] row of `residual` that becomes row i, or null: row i itself
//   delta          [rows][width] bf16, numbered as what goes on, or null
//   delta_bias     [width] f32, or null
//   weight, norm_bias  [width] f32, both or none
//   residual_out   [rows][width] f32, or null. May be `residual` itself only without a `row_index`
//   out            [rows][width] bf16, or null: no norm
//
// Grid: one block per row, `rms_norm.cuh` says of how many threads. Width at most 16384.
extern "C" __global__ void __launch_bounds__(rms_norm::MOST_THREADS)
    hstu_residual_norm(const float *residual, const uint32_t *row_index, const bf16 *delta, const float *delta_bias, const float *weight,
        const float *norm_bias, float *residual_out, bf16 *out, int width, float epsilon) {
    const size_t row = blockIdx.x, from = row_index != nullptr ? row_index[row] : row;
    rms_norm::Row values = {};
    if (residual != nullptr) rms_norm::load_row(residual + from * width, width, values);
    if (delta != nullptr) rms_norm::add_row(delta + row * width, width, values);
    if (delta_bias != nullptr) rms_norm::add_row(delta_bias, width, values);
    if (residual_out != nullptr) rms_norm::store_row(residual_out + row * width, width, values);
    if (out == nullptr) return;
    hstu::normalize(values, weight, norm_bias, width, epsilon);
    rms_norm::store_row(out + row * width, width, values);
}

// What is compared with items or tokens: a final state over its length (kind 1: over `number`, if that is more), normed (kind 2, with
// epsilon `number`), or as it is (kind 0). Rounded to bf16.
//
//   states  [rows][width] f32
//   out     [rows][width] bf16
//   bounds  [rows] f32, or null: the row's length before rounding times 1.0625, and a little. That is above any product of the row with a
//           vector of unit length, both rounded to bf16; and not finite if the row, or its length, is not
//
// Grid: one block per row, `rms_norm.cuh` says of how many threads. Width at most 16384.
extern "C" __global__ void __launch_bounds__(rms_norm::MOST_THREADS)
    hstu_finish(const float *states, bf16 *out, float *bounds, int width, uint32_t kind, float number) {
    SHARED_ARRAY(float, length_sums, 32);
    const size_t row = blockIdx.x;
    rms_norm::Row values;
    rms_norm::load_row(states + row * width, width, values);
    if (kind == 2) hstu::normalize(values, nullptr, nullptr, width, number);
    float squares = 0.0f;
#pragma unroll
    for (int g = 0; g < hstu::GROUPS; ++g) {
        if (rms_norm::first_column(g) >= width) continue;
#pragma unroll
        for (int i = 0; i < hstu::GROUP; ++i) {
            if (rms_norm::first_column(g) + i < width) squares = __fmaf_rn(values.values[g][i], values.values[g][i], squares);
        }
    }
    float length = sqrtf(hstu::block_sum(squares, length_sums));
    if (kind == 1) {
        // A length that is not a number stays one.
        const float divisor = length < number ? number : length;
#pragma unroll
        for (int g = 0; g < hstu::GROUPS; ++g) {
#pragma unroll
            for (int i = 0; i < hstu::GROUP; ++i) values.values[g][i] = values.values[g][i] / divisor;
        }
        length = length / divisor;
    }
    rms_norm::store_row(out + row * width, width, values);
    if (bounds != nullptr && threadIdx.x == 0) bounds[row] = __fmaf_rn(length, 1.0625f, 1e-30f);
}

// u | v | q | k of a row, with bias and SiLU, to where they are read.
//
//   uvqk          [rows][2 * heads * value_dim + 2 * heads * key_dim] bf16, as the product made them
//   bias          [as a row] f32, or null
//   slots         [rows] page * 32 + offset where keys and values go, or -1: nowhere
//   u             [rows][heads * value_dim] bf16
//   queries       [rows][heads][padded_key] bf16
//   keys, values  [page][heads][32][padded_key] and [padded_value] bf16, the pages of one layer
//   silu          2: of all four, 1: of u, 0: of none
//
// Columns from the true widths (at most 256) on are written as zero. A warp has one head of one of the four. Blocks of 256 threads, ceil(rows
// * 4 * heads / 8) of them. Widths that are not even are read and written value by value.
extern "C" __global__ void __launch_bounds__(hstu::THREADS)
    hstu_split(const bf16 *uvqk, const float *bias, const int32_t *slots, bf16 *u, bf16 *queries, bf16 *keys, bf16 *values, uint32_t rows,
        int heads, int key_dim, int value_dim, int padded_key, int padded_value, int silu) {
    using namespace hstu;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const size_t task = static_cast<size_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (task >= static_cast<size_t>(rows) * 4 * heads) return;
    const size_t row = task / (4 * heads);
    const int part = static_cast<int>(task % (4 * heads)) / heads, head = static_cast<int>(task % heads);
    // 0: u, 1: v, 2: q, 3: k.
    const bool is_key_wide = part >= 2;
    const int width = is_key_wide ? key_dim : value_dim;
    const int first = (is_key_wide ? 2 * heads * value_dim + (part - 2) * heads * key_dim : part * heads * value_dim) + head * width;
    const int row_width = 2 * heads * (key_dim + value_dim);

    bf16 *out;
    int padded = is_key_wide ? padded_key : padded_value;
    if (part == 0) {
        out = u + (row * heads + head) * value_dim, padded = value_dim;
    } else if (part == 2) {
        out = queries + (row * heads + head) * padded_key;
    } else {
        const int32_t slot = slots[row];
        if (slot < 0) return;
        out = (part == 1 ? values : keys) + ((static_cast<size_t>(slot / PAGE) * heads + head) * PAGE + slot % PAGE) * padded;
    }
    const bf16 *const in = uvqk + row * row_width + first;
    const bool activated = silu == 2 || (silu == 1 && part == 0);
    const auto finish = [&](float value, int column) {
        if (column >= width) return 0.0f;
        if (bias != nullptr) value += bias[first + column];
        return activated ? hstu::silu(value) : value;
    };
    if ((key_dim | value_dim) % 2 == 0) {
        for (int column = lane * 2; column < padded; column += 64) {
            const uint32_t pair = column < width ? *reinterpret_cast<const uint32_t *>(in + column) : 0u;
            *reinterpret_cast<uint32_t *>(out + column) = pack_bf16x2(finish(low_bf16(pair), column), finish(high_bf16(pair), column + 1));
        }
    } else {
        for (int column = lane; column < padded; column += 32) {
            out[column] = __float2bfloat16(finish(column < width ? __bfloat162float(in[column]) : 0.0f, column));
        }
    }
}

// What the output product reads: n = layer_norm over all heads of what attention found, gated by u.
//
//   attended      [rows before][width] f32, width = heads * value_dim: `out` of pointwise_attention
//   u             [rows before][width] bf16
//   row_index     [rows] row of both that becomes row i, or null: row i itself
//   weight, bias  [width] f32, both or none
//   out           [rows][width or 3 * width] bf16
//   parts         0: u * n;  1: u, attended, u * n;  2: u, n, u * n
//
// Grid: one block per row, `rms_norm.cuh` says of how many threads. Width at most 16384.
extern "C" __global__ void __launch_bounds__(rms_norm::MOST_THREADS) hstu_gate(const float *attended, const bf16 *u,
    const uint32_t *row_index, const float *weight, const float *bias, bf16 *out, int width, int parts, float epsilon) {
    const size_t row = blockIdx.x, from = row_index != nullptr ? row_index[row] : row;
    rms_norm::Row values, gates;
    rms_norm::load_row(attended + from * width, width, values);
    rms_norm::load_row(u + from * width, width, gates);
    bf16 *to = out + row * width * (parts == hstu::GATED ? 1 : 3);
    if (parts != hstu::GATED) {
        rms_norm::store_row(to, width, gates);
        if (parts == hstu::CONCAT_RAW) rms_norm::store_row(to + width, width, values);
    }
    hstu::normalize(values, weight, bias, width, epsilon);
    if (parts == hstu::CONCAT_NORMED) rms_norm::store_row(to + width, width, values);
    if (parts != hstu::GATED) to += 2 * static_cast<size_t>(width);
#pragma unroll
    for (int g = 0; g < hstu::GROUPS; ++g) {
#pragma unroll
        for (int i = 0; i < hstu::GROUP; ++i) values.values[g][i] *= gates.values[g][i];
    }
    rms_norm::store_row(to, width, values);
}

// The same with a norm of each head by itself; weight and bias are one value per head, [heads] f32, both or none. Heads of up to 256
// values. A warp has one head of one row. Grid: ceil(rows * heads / 8) blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(hstu::THREADS) hstu_gate_group(const float *attended, const bf16 *u, const uint32_t *row_index,
    const float *weight, const float *bias, bf16 *out, uint32_t rows, int heads, int value_dim, int parts, float epsilon) {
    using namespace hstu;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const size_t task = static_cast<size_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (task >= static_cast<size_t>(rows) * heads) return;
    const size_t row = task / heads, from = row_index != nullptr ? row_index[row] : row;
    const int head = static_cast<int>(task % heads), width = heads * value_dim;
    const size_t first = (from * heads + head) * value_dim;

    float values[PARTS], sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int column = part * 32 + lane;
        values[part] = column < value_dim ? attended[first + column] : 0.0f;
        sum += values[part];
    }
    const float mean = warp_sum(sum) / static_cast<float>(value_dim);
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const float off = values[part] - mean;
        if (part * 32 + lane < value_dim) squares = __fmaf_rn(off, off, squares);
    }
    const float scale = 1.0f / sqrtf(warp_sum(squares) / static_cast<float>(value_dim) + epsilon);
    bf16 *const to = out + row * width * (parts == GATED ? 1 : 3) + head * value_dim;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int column = part * 32 + lane;
        if (column >= value_dim) continue;
        const bf16 gate = u[first + column];
        float normed = __fmul_rn(values[part] - mean, scale);
        if (weight != nullptr) normed = __fmaf_rn(normed, weight[head], bias[head]);
        const bf16 gated = __float2bfloat16(normed * __bfloat162float(gate));
        if (parts == GATED) {
            to[column] = gated;
        } else {
            to[column] = gate;
            to[width + column] = __float2bfloat16(parts == CONCAT_RAW ? values[part] : normed);
            to[2 * width + column] = gated;
        }
    }
}
