// Attention of branch rows (beams, candidates): the shared context on tensor cores, then each row's own ancestors.
//
// Place in the flow: after the rows' keys and values were written to their branch pages; its output goes into the output projection. The
// CPU counterpart is `cpu::attention` with `Sees::Branch`. Two launches: `branch_attention_D` lets all rows of a request attend to parts of
// its context, several parts at once; `branch_merge_D` puts the parts together and adds the ancestors.
//
// Algorithm: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023): split keys, merge by log-sum-exp. How a part is computed: attention_tile.cuh.
//
// Layout
//   queries      [rows][q_heads][D] bf16, rotated; columns from head_dim on are zero
//   keys, values one layer's pages [page][kv_heads][PAGE][D] bf16, context and branch pages alike; columns from head_dim on are zero
//   items        [item][6] i32: first_row (in the batch), rows, page_table_offset, key_begin, key_end, partial_first_row
//                rows * (q_heads / kv_heads) <= QUERIES of the kernel; keys [key_begin, key_end) of the context are seen by all rows of the
//                item; key_begin is a multiple of SPLIT_UNIT, key_end > key_begin; row i of the item is partial row partial_first_row + i
//   page_tables  i32: pages of a context from position 0 on; ceil(key_end / PAGE) of them are there
//   partial_out  [partial row][q_heads][D] f32: sum of weight * value, not normalised
//   partial_state [partial row][q_heads][2] f32: largest logit in units of log2(e), and sum of the weights 2^(logit - largest)
//   rows         [row][6] i32: row (in the batch), partial_first, splits, partial_stride, lineage_offset (into lineage), lineage_len
//                split s of the row is partial row partial_first + s * partial_stride; 1 <= lineage_len <= 32
//   lineage      i32: branch row page * PAGE + offset of each ancestor, the row itself last
//   out          [rows of the batch][q_heads * head_dim] bf16
//   scale        log2(e) / sqrt(head_dim)
// Parts are f32: rounding them to bf16 would add an error as large as that of the result itself for each split, and they are read once,
// mostly from the L2 cache.
// Launch: branch_attention_D and branch_attention_few_D with grid (items, kv_heads), block THREADS; branch_merge_D with grid
// (rows, ceil(q_heads / WARPS)), block THREADS.
//
// Invariant, bit for bit: a row's result depends on its query, its context, its ancestors and where the context is split. The host must
// split by the context alone. Which rows share an item, and which of the two kernels runs it, changes nothing.
#include "attention_tile.cuh"

// Splits of a context begin at multiples of this many keys, for all widths.
constexpr int SPLIT_UNIT = 64;

namespace {

struct Branch {
    const bf16 *queries, *keys, *values;
    const int *items, *page_tables;
    float *partial_out, *partial_state;
    int q_heads, kv_heads;
    float scale;
};

template <class S, class Result>
__device__ __forceinline__ void store_partial(
    const Result &state, const Branch &all, int first_partial, int queries, int group, int first_head) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int tile = 0; tile < Result::QUERY_TILES; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = state.first_query + tile * 16 + half * 8 + lane / 4;
            if (query >= queries) continue;
            const size_t at = static_cast<size_t>(first_partial + query / group) * all.q_heads + first_head + query % group;
            float *const out = all.partial_out + at * S::D + state.first_column + lane % 4 * 2;
#pragma unroll
            for (int block = 0; block < Result::BLOCKS; ++block) {
                *reinterpret_cast<float2 *>(out + block * 8) =
                    make_float2(state.out[tile][block][half * 2], state.out[tile][block][half * 2 + 1]);
            }
            if (state.first_column == 0 && lane % 4 == 0) {
                *reinterpret_cast<float2 *>(all.partial_state + at * 2) =
                    make_float2(__fmul_rn(state.maximum[tile][half], all.scale), state.sum[tile][half]);
            }
        }
    }
}

template <int D, bool few> __device__ __forceinline__ void branch(const Branch &all) {
    using S = Sizes<D>;
    static_assert(SPLIT_UNIT % S::KEYS == 0, "a split begins with a tile");
    DYNAMIC_SHARED(memory);
    const int *const item = all.items + blockIdx.x * 6;
    const int first_row = __ldg(item), rows = __ldg(item + 1), key_begin = __ldg(item + 3), key_end = __ldg(item + 4);
    const int first_partial = __ldg(item + 5), kv_head = static_cast<int>(blockIdx.y), group = all.q_heads / all.kv_heads;
    const size_t head_offset = static_cast<size_t>(kv_head) * (PAGE * D);

    TileCopy<S> copy;
    copy.context.keys = all.keys + head_offset;
    copy.context.values = all.values + head_offset;
    copy.context.page_stride = static_cast<size_t>(all.kv_heads) * (PAGE * D);
    copy.context.pages = all.page_tables + __ldg(item + 2);
    copy.context.end = key_end;
    Range range;
    range.first_key = key_begin, range.limit = key_end - 1, range.queries = rows * group, range.group = group, range.scale = all.scale;

    const bf16 *const queries = all.queries + static_cast<size_t>(first_row) * all.q_heads * D;
    copy_queries<S, few ? FEW_QUERIES : S::QUERIES>(shared_address(memory), queries, range.queries, group, all.q_heads, kv_head * group);
    if constexpr (few) {
        ColumnState<S> state;
        attend_by_keys<S>(state, memory, copy, range);
        if (state.first_column < D) store_partial<S>(state, all, first_partial, range.queries, group, kv_head * group);
    } else {
        RowState<S> state;
        attend_by_rows<S>(state, memory, copy, range);
        store_partial<S>(state, all, first_partial, range.queries, group, kv_head * group);
    }
}

struct Merge {
    const bf16 *queries, *keys, *values;
    const float *partial_out, *partial_state;
    const int *rows, *lineage;
    bf16 *out;
    int q_heads, kv_heads, head_dim;
    float scale;
};

// A lane's `count` consecutive elements of a row, as f32.
template <int count> __device__ __forceinline__ void load_bf16(float (&elements)[count], const bf16 *from) {
    if constexpr (count == 1) {
        elements[0] = __bfloat162float(*from);
    } else {
        uint32_t pairs[count / 2];
        if constexpr (count == 2) {
            pairs[0] = __ldg(reinterpret_cast<const uint32_t *>(from));
        } else if constexpr (count == 4) {
            const uint2 loaded = __ldg(reinterpret_cast<const uint2 *>(from));
            pairs[0] = loaded.x, pairs[1] = loaded.y;
        } else {
            const uint4 loaded = __ldg(reinterpret_cast<const uint4 *>(from));
            pairs[0] = loaded.x, pairs[1] = loaded.y, pairs[2] = loaded.z, pairs[3] = loaded.w;
        }
#pragma unroll
        for (int pair = 0; pair < count / 2; ++pair)
            elements[pair * 2] = low_bf16(pairs[pair]), elements[pair * 2 + 1] = high_bf16(pairs[pair]);
    }
}

template <int count> __device__ __forceinline__ void load_f32(float (&elements)[count], const float *from) {
    if constexpr (count == 1) {
        elements[0] = __ldg(from);
    } else if constexpr (count == 2) {
        const float2 loaded = __ldg(reinterpret_cast<const float2 *>(from));
        elements[0] = loaded.x, elements[1] = loaded.y;
    } else {
#pragma unroll
        for (int part = 0; part < count; part += 4) {
            const float4 loaded = __ldg(reinterpret_cast<const float4 *>(from + part));
            elements[part] = loaded.x, elements[part + 1] = loaded.y, elements[part + 2] = loaded.z, elements[part + 3] = loaded.w;
        }
    }
}

// Ancestors, or splits, whose memory is asked for at a time: there are few, and waiting for each in turn would be most of the work.
constexpr int BATCH = 4;

// One warp merges one head of one row. A lane has D / 32 columns; a narrow head leaves lanes without.
template <int D> __device__ __forceinline__ void merge(const Merge &all) {
    constexpr int COLUMNS = D >= 32 ? D / 32 : 1;
    const int lane = static_cast<int>(threadIdx.x) % 32, head = static_cast<int>(blockIdx.y * WARPS + threadIdx.x / 32);
    if (head >= all.q_heads) return;
    const int *const row = all.rows + blockIdx.x * 6;
    const int batch_row = __ldg(row), first_partial = __ldg(row + 1), splits = __ldg(row + 2), stride = __ldg(row + 3);
    const int first_ancestor = __ldg(row + 4), ancestors = __ldg(row + 5);
    const int kv_head = head / (all.q_heads / all.kv_heads);
    const int first_column = lane * COLUMNS;
    const bool has_columns = first_column < D;

    // Lane i knows where ancestor i is, and later its logit.
    const int own_row = lane < ancestors ? __ldg(all.lineage + first_ancestor + lane) : 0;
    // This lane's columns of ancestors first .. first + BATCH - 1; zero behind the last.
    const auto load_ancestors = [&](float (&columns)[BATCH][COLUMNS], const bf16 *pool, int first) {
#pragma unroll
        for (int at = 0; at < BATCH; ++at) {
            const int branch_row = __shfl_sync(FULL_WARP, own_row, (first + at) % 32);
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) columns[at][column] = 0.0f;
            if (!has_columns || first + at >= ancestors) continue;
            const size_t page = static_cast<size_t>(branch_row / PAGE) * all.kv_heads + kv_head;
            load_bf16(columns[at], pool + page * (PAGE * D) + branch_row % PAGE * D + first_column);
        }
    };
    const auto partial = [&](int split) { return static_cast<size_t>(first_partial + split * stride) * all.q_heads + head; };

    float query[COLUMNS] = {}, logit = negative_infinity();
    if (has_columns) load_bf16(query, all.queries + (static_cast<size_t>(batch_row) * all.q_heads + head) * D + first_column);
    for (int first = 0; first < ancestors; first += BATCH) {
        float keys[BATCH][COLUMNS];
        load_ancestors(keys, all.keys, first);
#pragma unroll
        for (int at = 0; at < BATCH; ++at) {
            float product = 0.0f;
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) product = __fmaf_rn(query[column], keys[at][column], product);
            product = warp_sum(product);
            if (lane == first + at && lane < ancestors) logit = __fmul_rn(product, all.scale);
        }
    }
    float maximum = logit;
    for (int split = lane; split < splits; split += 32) maximum = fmaxf(maximum, __ldg(all.partial_state + partial(split) * 2));
    maximum = warp_max(maximum);

    float out[COLUMNS] = {}, sum = 0.0f;
    for (int first = 0; first < splits; first += BATCH) {
        float parts[BATCH][COLUMNS] = {};
        float2 states[BATCH];
#pragma unroll
        for (int at = 0; at < BATCH; ++at) {
            if (first + at >= splits) continue;
            states[at] = __ldg(reinterpret_cast<const float2 *>(all.partial_state + partial(first + at) * 2));
            if (has_columns) load_f32(parts[at], all.partial_out + partial(first + at) * D + first_column);
        }
#pragma unroll
        for (int at = 0; at < BATCH; ++at) {
            if (first + at >= splits) continue;
            const float weight = exp2_approx(__fsub_rn(states[at].x, maximum));
            sum = __fmaf_rn(weight, states[at].y, sum);
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) out[column] = __fmaf_rn(weight, parts[at][column], out[column]);
        }
    }
    const float own_weight = exp2_approx(__fsub_rn(logit, maximum));
    for (int first = 0; first < ancestors; first += BATCH) {
        float values[BATCH][COLUMNS];
        load_ancestors(values, all.values, first);
#pragma unroll
        for (int at = 0; at < BATCH; ++at) {
            const float weight = __shfl_sync(FULL_WARP, own_weight, (first + at) % 32);
            if (first + at >= ancestors) continue;
            sum = __fadd_rn(sum, weight);
#pragma unroll
            for (int column = 0; column < COLUMNS; ++column) out[column] = __fmaf_rn(weight, values[at][column], out[column]);
        }
    }

    const float inverse = __frcp_rn(sum);
    bf16 *const target = all.out + (static_cast<size_t>(batch_row) * all.q_heads + head) * all.head_dim + first_column;
    if constexpr (COLUMNS == 1) {
        if (first_column < all.head_dim) *target = __float2bfloat16_rn(__fmul_rn(out[0], inverse));
    } else {
#pragma unroll
        for (int column = 0; column < COLUMNS; column += 2) {
            if (first_column + column >= all.head_dim) break;
            *reinterpret_cast<uint32_t *>(target + column) =
                pack_bf16x2(__fmul_rn(out[column], inverse), __fmul_rn(out[column + 1], inverse));
        }
    }
}

} // namespace

#define BRANCH_ATTENTION(name, D, few)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) name(const bf16 *queries, const bf16 *keys, const bf16 *values,               \
        const int *items, const int *page_tables, float *partial_out, float *partial_state, int q_heads, int kv_heads, float scale) {      \
        branch<D, few>({queries, keys, values, items, page_tables, partial_out, partial_state, q_heads, kv_heads, scale});                 \
    }

BRANCH_ATTENTION(branch_attention_16, 16, false)
BRANCH_ATTENTION(branch_attention_32, 32, false)
BRANCH_ATTENTION(branch_attention_64, 64, false)
BRANCH_ATTENTION(branch_attention_128, 128, false)
BRANCH_ATTENTION(branch_attention_256, 256, false)
BRANCH_ATTENTION(branch_attention_few_16, 16, true)
BRANCH_ATTENTION(branch_attention_few_32, 32, true)
BRANCH_ATTENTION(branch_attention_few_64, 64, true)
BRANCH_ATTENTION(branch_attention_few_128, 128, true)
BRANCH_ATTENTION(branch_attention_few_256, 256, true)

#define BRANCH_MERGE(name, D)                                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                               \
        name(const bf16 *queries, const bf16 *keys, const bf16 *values, const float *partial_out, const float *partial_state,              \
            const int *rows, const int *lineage, bf16 *out, int q_heads, int kv_heads, int head_dim, float scale) {                        \
        merge<D>({queries, keys, values, partial_out, partial_state, rows, lineage, out, q_heads, kv_heads, head_dim, scale});             \
    }

BRANCH_MERGE(branch_merge_16, 16)
BRANCH_MERGE(branch_merge_32, 32)
BRANCH_MERGE(branch_merge_64, 64)
BRANCH_MERGE(branch_merge_128, 128)
BRANCH_MERGE(branch_merge_256, 256)
