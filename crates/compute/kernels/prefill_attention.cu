// Causal attention of context rows over pages.
//
// Place in the flow: after the rows' keys and values were written to their pages; its output goes into the output projection. The CPU
// counterpart is `cpu::attention` with `Sees::Causal`. How a tile is computed, and why no row depends on others: attention_tile.cuh.
//
// Layout
//   queries      [rows][q_heads][D] bf16, rotated; columns from head_dim on are zero
//   keys, values one layer's pages [page][kv_heads][PAGE][D] bf16; columns from head_dim on are zero, rows behind a context hold anything
//   tiles        [tile][4] i32: first_row (in the batch), rows, first_position, page_table_offset (into page_tables)
//                rows * (q_heads / kv_heads) <= QUERIES of the kernel; row i of a tile sees keys 0 ..= first_position + i
//   page_tables  i32: pages of a context from position 0 on; ceil((first_position + rows) / PAGE) of them are read
//   out          [rows][q_heads * head_dim] bf16; head_dim is even
//   scale        log2(e) / sqrt(head_dim)
// Launch: grid (tiles, kv_heads), block THREADS. A long context is cut into many tiles; those at its end are the longest and come first.
// `prefill_attention_D` takes tiles of up to QUERIES queries, `prefill_attention_few_D` of up to FEW_QUERIES, sooner: for the few new rows
// of a returning user. A row gets the same bits from both.
#include "attention_tile.cuh"

namespace {

struct Prefill {
    const bf16 *queries, *keys, *values;
    const int *tiles, *page_tables;
    bf16 *out;
    int q_heads, kv_heads, head_dim;
    float scale;
};

template <class S, class Result>
__device__ __forceinline__ void finish_prefill(
    const Result &state, const Prefill &all, int first_row, int queries, int group, int first_head) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int tile = 0; tile < Result::QUERY_TILES; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = state.first_query + tile * 16 + half * 8 + lane / 4;
            if (query >= queries) continue;
            const int row = first_row + query / group, head = first_head + query % group;
            const float inverse = __frcp_rn(state.sum[tile][half]);
            bf16 *const out = all.out + (static_cast<size_t>(row) * all.q_heads + head) * all.head_dim;
#pragma unroll
            for (int block = 0; block < Result::BLOCKS; ++block) {
                const int column = state.first_column + block * 8 + lane % 4 * 2;
                if (column >= all.head_dim) continue;
                *reinterpret_cast<uint32_t *>(out + column) = pack_bf16x2(
                    __fmul_rn(state.out[tile][block][half * 2], inverse), __fmul_rn(state.out[tile][block][half * 2 + 1], inverse));
            }
        }
    }
}

template <int D, bool few> __device__ __forceinline__ void prefill(const Prefill &all) {
    using S = Sizes<D>;
    DYNAMIC_SHARED(memory);
    const int *const tile = all.tiles + blockIdx.x * 4;
    const int first_row = __ldg(tile), rows = __ldg(tile + 1), first_position = __ldg(tile + 2);
    const int kv_head = static_cast<int>(blockIdx.y), group = all.q_heads / all.kv_heads;
    const size_t head_offset = static_cast<size_t>(kv_head) * (PAGE * D);

    TileCopy<S> copy;
    copy.context.keys = all.keys + head_offset;
    copy.context.values = all.values + head_offset;
    copy.context.page_stride = static_cast<size_t>(all.kv_heads) * (PAGE * D);
    copy.context.pages = all.page_tables + __ldg(tile + 3);
    copy.context.end = first_position + rows;
    Range range;
    range.first_key = 0, range.limit = first_position, range.queries = rows * group, range.group = group, range.scale = all.scale;

    const bf16 *const queries = all.queries + static_cast<size_t>(first_row) * all.q_heads * D;
    copy_queries<S, few ? FEW_QUERIES : S::QUERIES>(shared_address(memory), queries, range.queries, group, all.q_heads, kv_head * group);
    if constexpr (few) {
        ColumnState<S> state;
        attend_by_keys<S>(state, memory, copy, range);
        if (state.first_column < D) finish_prefill<S>(state, all, first_row, range.queries, group, kv_head * group);
    } else {
        RowState<S> state;
        attend_by_rows<S>(state, memory, copy, range);
        finish_prefill<S>(state, all, first_row, range.queries, group, kv_head * group);
    }
}

} // namespace

#define PREFILL_ATTENTION(name, D, few)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) name(const bf16 *queries, const bf16 *keys, const bf16 *values,               \
        const int *tiles, const int *page_tables, bf16 *out, int q_heads, int kv_heads, int head_dim, float scale) {                       \
        prefill<D, few>({queries, keys, values, tiles, page_tables, out, q_heads, kv_heads, head_dim, scale});                             \
    }

PREFILL_ATTENTION(prefill_attention_16, 16, false)
PREFILL_ATTENTION(prefill_attention_32, 32, false)
PREFILL_ATTENTION(prefill_attention_64, 64, false)
PREFILL_ATTENTION(prefill_attention_128, 128, false)
PREFILL_ATTENTION(prefill_attention_256, 256, false)
PREFILL_ATTENTION(prefill_attention_few_16, 16, true)
PREFILL_ATTENTION(prefill_attention_few_32, 32, true)
PREFILL_ATTENTION(prefill_attention_few_64, 64, true)
PREFILL_ATTENTION(prefill_attention_few_128, 128, true)
PREFILL_ATTENTION(prefill_attention_few_256, 256, true)
