// Pointwise attention of HSTU over pages: context rows, and branch rows (candidates, generated tokens) with their ancestors.
//
// Place in the flow: after `hstu_split` wrote the rows' queries, keys and values; its output goes into `hstu_gate`. The CPU counterpart is
// `cpu::pointwise`. How a tile is computed, and why no row depends on others: pointwise_tile.cuh.
//
//   out = (sum over the keys that a row sees of silu(s) * value) / divisor
//
// There is no normaliser, so parts of a context simply add up. `pointwise_attention_DK_DV` serves context rows, whose result it writes, and
// branch rows, whose parts it writes as rows of the same buffer; both may share a launch. `pointwise_merge` adds the parts of a branch row
// in order, then its ancestors from the first to itself. The context of context rows may be split as well (few new rows behind a long
// context): then it is `pointwise_merge` without ancestors that gives their results.
//
// Layout
//   queries      [rows][heads][DK] bf16; columns behind the true width are zero
//   keys, values one layer's pages [page][heads][PAGE][DK] and [page][heads][PAGE][DV] bf16, context and branch pages alike; columns behind
//                the true width are zero, rows behind a context hold anything
//   items        [item][10] i32:
//                  first_row, rows            in the batch; rows <= QUERIES of the kernel
//                  page_table_offset          into page_tables: pages from position 0 on; those below key_end are read
//                  key_begin, key_end         keys of the context that are met; key_begin is a multiple of 64, key_end > key_begin
//                  out_first_row              row i of the item is written to row out_first_row + i of `out`
//                  position, step             row i stands at position + i * step. Context rows: step 1, and keys up to the position behind
//                                             the last row, or context_len if any row is contextual (position < mask's contextual).
//                                             Branch rows: step 0, position context_len + ancestors - 1
//                  context_len
//                  times_offset               into times
//   page_tables  i32
//   times        i64: of each position of a context, and of the query behind them, context_len + 1 in all. Null without a bias
//   time_table   `TimeTable` in pointwise_tile.cuh: `cpu::time_buckets::TimeWeights`, 3328 bytes. Null: no bias
//   position_weights [positions] f32 by positions - 1 - distance. Rows stand before `positions`. A bias goes with a mask without contextual
//                rows only
//   out          [row][heads * value_dim] f32, already divided by `divisor`
//   contextual, window, full_tail: `cpu::mask`
// Results are single precision. The layer norm that follows takes off the mean of all heads and divides by what is left: rounding to bf16
// before it would be an error of 2^-8 of the mean, however small the rest. It costs two more bytes per value in a buffer that is written
// and read once.
// Launch: pointwise_attention_DK_DV, and pointwise_attention_few_DK_DV for items of up to FEW_QUERIES rows (sooner, and the same bits),
// with grid (items, heads), block THREADS; pointwise_merge with grid (rows, ceil(heads / WARPS)), block THREADS. Long items first.
//
// Invariant, bit for bit: the result of a row depends on the row, the keys it sees, and where its context is split. The host must split by
// the context alone, that of context rows by positions alone (at multiples of a constant).
#include "pointwise_tile.cuh"

namespace pointwise {

struct Call {
    const bf16 *queries, *keys, *values;
    const int *items, *page_tables;
    const Time *times;
    const TimeTable *time_table;
    const float *position_weights;
    float *out;
    int heads, value_dim, positions;
    float scale, divisor;
    Mask mask;
};

template <int DK, int DV, bool few> __device__ __forceinline__ void run(const Call &call) {
    using S = Sizes<DK, DV, few>;
    DYNAMIC_SHARED(memory);
    const int *const item = call.items + blockIdx.x * 10;
    const int first_row = __ldg(item), rows = __ldg(item + 1), out_first_row = __ldg(item + 5);
    const int head = static_cast<int>(blockIdx.y), lane = static_cast<int>(threadIdx.x) % 32;

    Pools pools;
    pools.keys = call.keys + static_cast<size_t>(head) * (PAGE * DK);
    pools.values = call.values + static_cast<size_t>(head) * (PAGE * DV);
    pools.key_stride = static_cast<size_t>(call.heads) * (PAGE * DK);
    pools.value_stride = static_cast<size_t>(call.heads) * (PAGE * DV);
    pools.pages = call.page_tables + __ldg(item + 2);
    Range range;
    range.first_key = __ldg(item + 3), range.end = __ldg(item + 4), range.queries = rows;
    range.position = __ldg(item + 6), range.step = __ldg(item + 7), range.context_len = __ldg(item + 8);
    range.scale = call.scale, range.mask = call.mask;
    range.times = call.times + __ldg(item + 9), range.time_table = call.time_table;
    range.position_weights = call.position_weights, range.positions = call.positions;

    const bf16 *const queries = call.queries + static_cast<size_t>(first_row) * call.heads * DK;
    copy_queries<::Sizes<DK>, S::QUERIES>(shared_address(memory), queries, rows, 1, call.heads, head);
    Sums<S> sums;
    attend<S>(sums, memory, pools, range);

    const bool paired = call.value_dim % 2 == 0;
#pragma unroll
    for (int tile = 0; tile < S::QUERY_TILES; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = sums.first_query + tile * 16 + half * 8 + lane / 4;
            if (query >= rows) continue;
            float *const out = call.out + (static_cast<size_t>(out_first_row + query) * call.heads + head) * call.value_dim;
#pragma unroll
            for (int block = 0; block < S::VALUE_BLOCKS; ++block) {
                const int column = sums.first_column + block * 8 + lane % 4 * 2;
                const float low = __fdiv_rn(sums.out[tile][block][half * 2], call.divisor);
                const float high = __fdiv_rn(sums.out[tile][block][half * 2 + 1], call.divisor);
                if (paired) {
                    if (column < call.value_dim) *reinterpret_cast<float2 *>(out + column) = make_float2(low, high);
                } else {
                    if (column < call.value_dim) out[column] = low;
                    if (column + 1 < call.value_dim) out[column + 1] = high;
                }
            }
        }
    }
}

// Columns of a row in pairs: lane l has columns 2 l and 2 l + 1 of each 64.
constexpr int PAIRS = 4;
// Ancestors whose memory is asked for at a time.
constexpr int BATCH = 4;

__device__ __forceinline__ void load_pairs(uint32_t (&pairs)[PAIRS], const bf16 *from, int width, int lane) {
#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
        const int column = pair * 64 + lane * 2;
        pairs[pair] = column < width ? __ldg(reinterpret_cast<const uint32_t *>(from + column)) : 0u;
    }
}

struct Merge {
    const bf16 *queries, *keys, *values;
    const int *rows, *lineage;
    const TimeTable *time_table;
    const float *position_weights;
    float *out;
    int heads, padded_key, padded_value, value_dim, positions;
    float scale, divisor;
};

// One warp merges one head of one row.
__device__ __forceinline__ void merge(const Merge &all) {
    const int lane = static_cast<int>(threadIdx.x) % 32, head = static_cast<int>(blockIdx.y * WARPS + threadIdx.x / 32);
    if (head >= all.heads) return;
    const int *const row = all.rows + blockIdx.x * 6;
    const int batch_row = __ldg(row), first_partial = __ldg(row + 1), splits = __ldg(row + 2), stride = __ldg(row + 3);
    const int first_ancestor = __ldg(row + 4), ancestors = __ldg(row + 5);

    uint32_t query[PAIRS];
    load_pairs(query, all.queries + (static_cast<size_t>(batch_row) * all.heads + head) * all.padded_key, all.padded_key, lane);
    const float time_weight = all.time_table != nullptr ? all.time_table->weights[all.time_table->place(0.0f)] : 0.0f;
    float own[PAIRS][2] = {};
    for (int first = 0; first < ancestors; first += BATCH) {
        uint32_t key[BATCH][PAIRS], value[BATCH][PAIRS];
        float bias[BATCH];
#pragma unroll
        for (int at = 0; at < BATCH; ++at) {
            // Behind the last: that one again, not used.
            const int ancestor = min(first + at, ancestors - 1), branch_row = __ldg(all.lineage + first_ancestor + ancestor);
            const size_t place = (static_cast<size_t>(branch_row / PAGE) * all.heads + head) * PAGE + branch_row % PAGE;
            load_pairs(key[at], all.keys + place * all.padded_key, all.padded_key, lane);
            load_pairs(value[at], all.values + place * all.padded_value, all.padded_value, lane);
            bias[at] = all.time_table != nullptr
                           ? __fadd_rn(__ldg(all.position_weights + all.positions - ancestors + ancestor), time_weight)
                           : 0.0f;
        }
#pragma unroll
        for (int at = 0; at < BATCH; ++at) {
            float product = 0.0f;
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair) {
                product = __fmaf_rn(low_bf16(query[pair]), low_bf16(key[at][pair]), product);
                product = __fmaf_rn(high_bf16(query[pair]), high_bf16(key[at][pair]), product);
            }
            const float weight = silu(__fmaf_rn(warp_sum(product), all.scale, bias[at]));
            if (first + at >= ancestors) continue;
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair) {
                own[pair][0] = __fmaf_rn(weight, low_bf16(value[at][pair]), own[pair][0]);
                own[pair][1] = __fmaf_rn(weight, high_bf16(value[at][pair]), own[pair][1]);
            }
        }
    }

#pragma unroll
    for (int pair = 0; pair < PAIRS; ++pair) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const int column = pair * 64 + lane * 2 + part;
            if (column >= all.value_dim) continue;
            float sum = 0.0f;
#pragma unroll 4
            for (int split = 0; split < splits; ++split) {
                const size_t from = static_cast<size_t>(first_partial + split * stride) * all.heads + head;
                sum = __fadd_rn(sum, all.out[from * all.value_dim + column]);
            }
            all.out[(static_cast<size_t>(batch_row) * all.heads + head) * all.value_dim + column] =
                __fadd_rn(sum, __fdiv_rn(own[pair][part], all.divisor));
        }
    }
}

} // namespace pointwise

// rows [][6] i32: row (in the batch, of queries and of out), partial_first, splits, partial_stride, lineage_offset (into lineage),
//                lineage_len: split s of the row is row partial_first + s * partial_stride of `out`; no ancestors: a context row
// lineage      i32: branch row page * PAGE + offset of each ancestor, the row itself last; a candidate has itself alone
// All ancestors carry the time of the query, and the last stands at the row's own position.
extern "C" __global__ void __launch_bounds__(THREADS) pointwise_merge(const bf16 *queries, const bf16 *keys, const bf16 *values,
    const int *rows, const int *lineage, const pointwise::TimeTable *time_table, const float *position_weights, float *out, int heads,
    int padded_key, int padded_value, int value_dim, int positions, float scale, float divisor) {
    pointwise::merge({queries, keys, values, rows, lineage, time_table, position_weights, out, heads, padded_key, padded_value, value_dim,
        positions, scale, divisor});
}

#define POINTWISE_ATTENTION(name, DK, DV, few)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                               \
        name(const bf16 *queries, const bf16 *keys, const bf16 *values, const int *items, const int *page_tables,                          \
            const pointwise::Time *times, const pointwise::TimeTable *time_table, const float *position_weights, float *out, int heads,    \
            int value_dim, int positions, float scale, float divisor, int contextual, int window, int full_tail) {                         \
        pointwise::run<DK, DV, few>({queries, keys, values, items, page_tables, times, time_table, position_weights, out, heads,           \
            value_dim, positions, scale, divisor, {contextual, window, full_tail}});                                                       \
    }
// Both ways to share out the work, and the dynamic shared memory that the host passes, in bytes.
#define POINTWISE_ATTENTIONS(DK, DV, bytes, few_bytes)                                                                                     \
    static_assert(pointwise::Shared<pointwise::Sizes<DK, DV, false>>::BYTES == bytes);                                                     \
    static_assert(pointwise::Shared<pointwise::Sizes<DK, DV, true>>::BYTES == few_bytes);                                                  \
    POINTWISE_ATTENTION(pointwise_attention_##DK##_##DV, DK, DV, false)                                                                    \
    POINTWISE_ATTENTION(pointwise_attention_few_##DK##_##DV, DK, DV, true)

POINTWISE_ATTENTIONS(16, 16, 20288, 27200)
POINTWISE_ATTENTIONS(16, 32, 24384, 35392)
POINTWISE_ATTENTIONS(16, 64, 32576, 51776)
POINTWISE_ATTENTIONS(16, 128, 29728, 44832)
POINTWISE_ATTENTIONS(32, 16, 28480, 36416)
POINTWISE_ATTENTIONS(32, 32, 32576, 44608)
POINTWISE_ATTENTIONS(32, 64, 40768, 60992)
POINTWISE_ATTENTIONS(32, 128, 35872, 49952)
POINTWISE_ATTENTIONS(64, 16, 44864, 54848)
POINTWISE_ATTENTIONS(64, 32, 48960, 63040)
POINTWISE_ATTENTIONS(64, 64, 57152, 79424)
POINTWISE_ATTENTIONS(64, 128, 48160, 60192)
POINTWISE_ATTENTIONS(128, 16, 58400, 52000)
POINTWISE_ATTENTIONS(128, 32, 60448, 56096)
POINTWISE_ATTENTIONS(128, 64, 64544, 64288)
POINTWISE_ATTENTIONS(128, 128, 72736, 80672)
POINTWISE_ATTENTIONS(256, 256, 100640, 88864)
