// Pointwise attention (HSTU) of a tile of queries with a range of the keys of one context, on tensor cores.
//
//   s = scale * <q, k> (+ position_weight[N - 1 + j - i] + time_weight[bucket(time of i's prediction - time of j)])
//   sum over the keys j that row i sees of silu(s) * v_j
//
// Place in the flow: pointwise_attention.cu says what tiles there are and where the sums go. The CPU counterpart is `cpu::pointwise`.
// Tiles, copies and the exchange of chunks in shared memory are those of attention_tile.cuh; keys and values have widths of their own.
//
// Relative bias. It never exists for more than a tile. Weights by position are a window of the table that moves with the keys: QUERIES - 1
// + KEYS of them serve all queries of a tile. Buckets of times are looked up as `cpu::time_buckets` has it: exponent and two bits of the
// mantissa of the difference, as a float, name a cell with one threshold at most, so one comparison decides, and exactly. Most tiles of
// keys lie so far back that all of them fall into one bucket of a row, which two look-ups tell. Otherwise every key is looked up, in 32
// bits if the differences fit.
//
// Masks. What a row sees of its context is an interval of positions, whatever the mask (`seen_by`).
//
// Two ways to share out the work, as in attention_tile.cuh, with the same bits: a warp has 16 or 32 queries and all keys of a tile; or, for
// tiles of few queries (FEW), four warps have the same 32 queries and share keys, then columns.
//
// Invariant, bit for bit: a sum depends on the query, its position and time, and the keys it sees, nothing else. Tiles of keys begin at
// multiples of KEYS of the absolute position and are added from the first to the last; a key that is not seen weighs 0, and adding 0
// changes nothing. So it does not matter which rows share a tile, and tiles that no row of a warp sees are passed over. The ways to look a
// bucket up give the same weight. Keys and values from `end` on are never read: zeros take their place.
#pragma once

#include "attention_tile.cuh"

namespace pointwise {

using Time = long long;

// Sizes for keys and values of (padded) widths.
template <int key_width, int value_width, bool few> struct Sizes {
    static constexpr int DK = key_width, DV = value_width, WIDEST = DK > DV ? DK : DV;
    static constexpr bool FEW = few;
    // Keys in a tile. Every split of a context begins at a multiple of it.
    static constexpr int KEYS = WIDEST <= 64 ? 64 : 32;
    static constexpr int PAGES = KEYS / PAGE;
    // Tiles of 16 queries that a warp has.
    static constexpr int QUERY_TILES = FEW || WIDEST <= 128 ? 2 : 1;
    static constexpr int WARP_QUERIES = 16 * QUERY_TILES;
    static constexpr int QUERIES = FEW ? FEW_QUERIES : WARPS * WARP_QUERIES;
    // Blocks of 8 keys that a warp weighs, and of 8 columns that it sums. Narrow values leave warps without columns.
    static constexpr int KEY_BLOCKS = FEW ? KEYS / 8 / WARPS : KEYS / 8;
    static constexpr int VALUE_BLOCKS = !FEW ? DV / 8 : DV >= 32 ? DV / 8 / WARPS : 1;
    // Tiles in shared memory. Blocks of few queries compute little and wait for memory.
    static constexpr int STAGES = FEW && WIDEST <= 128 ? 4 : 2;
    // Weights by position that a tile meets.
    static constexpr int WINDOW = QUERIES - 1 + KEYS;
    // Wide queries are read anew for every tile, lest they fill the registers.
    static constexpr bool IN_REGISTERS = DK <= (FEW ? 128 : 64);
    // The widest tiles leave no shared memory for the table of times; they read it from global memory.
    static constexpr bool TABLE_IN_SHARED = FEW || WIDEST <= 128;
};

// Weights by time difference, with the layout of `cpu::time_buckets::TimeWeights`.
struct TimeTable {
    static constexpr int CELLS = 256;
    // The threshold within each cell; infinite where there is none.
    float thresholds[CELLS];
    // Weight under the threshold of each cell, and from it on.
    float weights[2 * CELLS];
    // The bucket under the threshold of each cell; from there on it is the next.
    uint8_t buckets[CELLS];

    // Where the weight of a magnitude is.
    __device__ __forceinline__ unsigned place(float magnitude) const {
        const float clamped = fmaxf(magnitude, 1.0f);
        const unsigned cell = ((__float_as_uint(clamped) >> 21) - (127u << 2)) & (CELLS - 1);
        return 2 * cell + (clamped >= thresholds[cell] ? 1u : 0u);
    }
    __device__ __forceinline__ unsigned bucket(unsigned place) const { return buckets[place / 2] + (place & 1u); }
};
static_assert(sizeof(TimeTable) == 3328, "the host's layout");

// |a - b|, rounded to single precision.
__device__ __forceinline__ float distance_of(Time a, Time b) {
    const Time difference = static_cast<Time>(static_cast<unsigned long long>(a) - static_cast<unsigned long long>(b));
    const unsigned long long magnitude = static_cast<unsigned long long>(difference);
    return static_cast<float>(difference < 0 ? 0 - magnitude : magnitude);
}

// x / (1 + e^-x).
__device__ __forceinline__ float silu(float x) {
    return __fmul_rn(x, reciprocal_approx(__fadd_rn(1.0f, exp2_approx(__fmul_rn(x, -LOG2_E)))));
}

// Who sees whom: `cpu::mask`.
struct Mask {
    // Leading rows that see the whole context; ids further back than `window` are not seen (0: all are), except by rows of the last
    // `full_tail` ids.
    int contextual, window, full_tail;

    __device__ __forceinline__ int id(int position) const { return contextual == 0 ? position : max(position + 1 - contextual, 0); }
};

// First and last position of the context that a row sees. A branch row looks from `position == context_len`.
__device__ __forceinline__ int2 seen_by(const Mask &mask, int context_len, int position) {
    if (position < mask.contextual) return make_int2(0, context_len - 1);
    const int own = mask.id(position), end = mask.id(context_len);
    const bool all = mask.window == 0 || (mask.full_tail > 0 && own + mask.full_tail >= end);
    const int oldest = all ? 0 : own - mask.window;
    // Position of the first row with that id.
    const int first = oldest <= 0 ? 0 : oldest + max(mask.contextual - 1, 0);
    return make_int2(first, min(position, context_len - 1));
}

// What a tile of queries is, and what it attends to.
struct Range {
    // Keys [first_key, end) are met; first_key is a multiple of KEYS.
    int first_key, end;
    int queries;
    // Query m stands at position + m * step (step 1: context rows, 0: branch rows).
    int position, step;
    int context_len;
    float scale;
    Mask mask;
    const Time *times;           // of the context and of the query, context_len + 1; not read without a bias
    const TimeTable *time_table; // or null: no bias
    const float *position_weights;
    int positions;
};

// What lies beside a tile of keys.
template <class S> struct Beside {
    Time times[S::KEYS];
    Time earliest[S::PAGES], latest[S::PAGES];
    // Entry QUERIES - 1 - m + k is the weight of query m and key k; of branch rows, entry k.
    float window[S::WINDOW + 1];
};

// Shared memory in the order of its place. Tiles of bf16 begin at multiples of 128 bytes.
template <class S> struct Shared {
    static constexpr int QUERY_BYTES = S::QUERIES * S::DK * 2, KEY_BYTES = S::KEYS * S::DK * 2, VALUE_BYTES = S::KEYS * S::DV * 2;
    static constexpr int KEYS_AT = QUERY_BYTES, VALUES_AT = KEYS_AT + S::STAGES * KEY_BYTES;
    // Of few queries: the weights of a tile, [query][key].
    static constexpr int WEIGHTS_AT = VALUES_AT + S::STAGES * VALUE_BYTES;
    static constexpr int REST_AT = WEIGHTS_AT + (S::FEW ? S::QUERIES * S::KEYS * 2 : 0);
    struct Rest {
        Beside<S> beside[2];
        // By query: the first and last key it sees, the time of its prediction.
        int2 seen[S::QUERIES];
        Time times[S::QUERIES];
        // Last: the widest do without.
        TimeTable table;
    };
    static constexpr int BYTES = REST_AT + static_cast<int>(sizeof(Rest)) - (S::TABLE_IN_SHARED ? 0 : static_cast<int>(sizeof(TimeTable)));
};

// Starts the copy of a tile of `pool`, whose pages are `pages`.
template <class S, int D>
__device__ __forceinline__ void copy_tile(
    SharedAddress tile, const bf16 *pool, size_t page_stride, const int (&pages)[S::PAGES], int first_key, int end) {
    constexpr int chunks = D / 8, rows_per_step = THREADS / chunks;
    const int thread = static_cast<int>(threadIdx.x), chunk = thread % chunks, first_row = thread / chunks;
    const bf16 *const from = pool + (first_row % PAGE * D + chunk * 8);
    if constexpr (rows_per_step > PAGE) {
        // Narrow heads: one step is the whole tile, or more.
        if (first_row >= S::KEYS) return;
        cp_async_16(chunk_at<D>(tile, first_row, chunk), from + (first_row < PAGE ? pages[0] : pages[S::PAGES - 1]) * page_stride,
            first_key + first_row < end);
    } else {
#pragma unroll
        for (int page = 0; page < S::PAGES; ++page) {
            const bf16 *const of_page = from + pages[page] * page_stride;
#pragma unroll
            for (int row = 0; row < PAGE; row += rows_per_step) {
                const int key = page * PAGE + row + first_row;
                cp_async_16(chunk_at<D>(tile, key, chunk), of_page + row * D, first_key + key < end);
            }
        }
    }
}

// Pools of keys and values of one head, and the pages of a context.
struct Pools {
    const bf16 *keys, *values;
    size_t key_stride, value_stride;
    const int *pages;
};

// Sums of the queries that a warp has, as accumulators of mma: as `State` in attention_tile.cuh.
template <class S> struct Sums {
    float out[S::QUERY_TILES][S::VALUE_BLOCKS][4];
    int first_query, first_column;
};

// Attends with up to S::QUERIES queries. The copy of the queries to the beginning of `memory` was started and not committed.
template <class S> __device__ __forceinline__ void attend(Sums<S> &sums, unsigned char *memory, const Pools &pools, const Range &range) {
    using Layout = Shared<S>;
    constexpr int DK = S::DK, DV = S::DV, KEYS = S::KEYS, QUERY_TILES = S::QUERY_TILES, STAGES = S::STAGES;
    constexpr int KEY_BLOCKS = S::KEY_BLOCKS, VALUE_BLOCKS = S::VALUE_BLOCKS;
    constexpr int query_rows = 16 * DK * 2, value_rows = 16 * DV * 2;
    const SharedAddress shared = shared_address(memory), keys = shared + Layout::KEYS_AT, values = shared + Layout::VALUES_AT;
    auto &rest = *reinterpret_cast<typename Layout::Rest *>(memory + Layout::REST_AT);
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int first_query = S::FEW ? 0 : warp * S::WARP_QUERIES;
    // The first key of a tile that this warp weighs, and the first block of columns that it sums.
    const int own_key = S::FEW ? warp * KEY_BLOCKS * 8 : 0, own_block = S::FEW ? warp * VALUE_BLOCKS : 0;
    const bool has_columns = own_block * 8 < DV;
    const bool biased = range.time_table != nullptr;
    sums.first_query = first_query, sums.first_column = own_block * 8;

#pragma unroll
    for (int tile = 0; tile < QUERY_TILES; ++tile) {
#pragma unroll
        for (int block = 0; block < VALUE_BLOCKS; ++block) {
#pragma unroll
            for (int part = 0; part < 4; ++part) sums.out[tile][block][part] = 0.0f;
        }
    }

    // Queries behind the last are taken for the last: what they get is not stored, and they widen no interval.
    if (thread < S::QUERIES) {
        const int position = range.position + min(thread, range.queries - 1) * range.step;
        int2 seen = seen_by(range.mask, range.context_len, range.step != 0 ? position : range.context_len);
        seen.y = min(seen.y, range.end - 1);
        rest.seen[thread] = seen;
        if (biased) rest.times[thread] = __ldg(range.times + min(position + 1, range.context_len));
    }
    const TimeTable *table = range.time_table;
    if constexpr (S::TABLE_IN_SHARED) {
        if (biased) {
            const auto *const from = reinterpret_cast<const uint32_t *>(range.time_table);
            auto *const to = reinterpret_cast<uint32_t *>(&rest.table);
            for (int at = thread; at < static_cast<int>(sizeof(TimeTable) / 4); at += THREADS) to[at] = __ldg(from + at);
        }
        table = &rest.table;
    }
    __syncthreads();
    // What any query of the block sees first; what any of the warp sees first and last, and what all of it see.
    int2 any = rest.seen[first_query + lane % S::WARP_QUERIES], all = any;
    int block_first = rest.seen[lane].x;
#pragma unroll
    for (int other = 1; other < S::QUERIES / 32; ++other) block_first = min(block_first, rest.seen[other * 32 + lane].x);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        block_first = min(block_first, __shfl_xor_sync(FULL_WARP, block_first, distance));
        any.x = min(any.x, __shfl_xor_sync(FULL_WARP, any.x, distance));
        any.y = max(any.y, __shfl_xor_sync(FULL_WARP, any.y, distance));
        all.x = max(all.x, __shfl_xor_sync(FULL_WARP, all.x, distance));
        all.y = min(all.y, __shfl_xor_sync(FULL_WARP, all.y, distance));
    }
    if (first_query >= range.queries) any.y = -1;
    const int begin = max(range.first_key, block_first / KEYS * KEYS);

    // The chunk that this lane names to ldmatrix, in the first 16 rows and columns: as in attention_tile.cuh.
    const SharedAddress query_chunk = chunk_at<DK>(shared, first_query + lane % 16, lane / 16);
    const SharedAddress weight_chunk = chunk_at<KEYS>(shared + Layout::WEIGHTS_AT, lane % 16, lane / 16);
    // A warp with one block of keys or columns takes four matrices of it; of the narrowest keys there are two.
    SharedAddress key_chunk, value_chunk;
    if constexpr (KEY_BLOCKS == 1) {
        key_chunk = chunk_at<DK>(keys, own_key + lane % 8, lane / 8 % (DK / 8));
    } else {
        key_chunk = chunk_at<DK>(keys, own_key + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    }
    if constexpr (VALUE_BLOCKS == 1) {
        value_chunk = chunk_at<DV>(values, lane, has_columns ? own_block : 0);
    } else {
        value_chunk = chunk_at<DV>(values, lane / 8 % 2 * 8 + lane % 8, own_block + lane / 16);
    }

    int ahead[S::PAGES];
    const auto look_up = [&](int first_key) {
#pragma unroll
        for (int page = 0; page < S::PAGES; ++page) {
            const int position = first_key + page * PAGE;
            ahead[page] = position < range.end ? __ldg(pools.pages + position / PAGE) : 0;
        }
    };
    const auto copy = [&](int stage, int first_key) {
        copy_tile<S, DK>(keys + stage * Layout::KEY_BYTES, pools.keys, pools.key_stride, ahead, first_key, range.end);
        copy_tile<S, DV>(values + stage * Layout::VALUE_BYTES, pools.values, pools.value_stride, ahead, first_key, range.end);
    };
    // What lies beside a tile is asked for before the tile before is computed, and stored after it.
    Time time = 0;
    float window[2] = {};
    const auto load_beside = [&](int first_key) {
        if (thread < KEYS) time = __ldg(range.times + min(first_key + thread, range.end - 1));
        const int origin = range.positions - 1 + first_key - range.position - range.step * (S::QUERIES - 1);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const int place = min(max(origin + thread + part * THREADS, 0), range.positions - 1);
            if (thread + part * THREADS < S::WINDOW) window[part] = __ldg(range.position_weights + place);
        }
    };
    const auto store_beside = [&](int stage) {
        Beside<S> &to = rest.beside[stage];
        if (thread < KEYS) {
            to.times[thread] = time;
            Time earliest = time, latest = time;
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) {
                earliest = min(earliest, __shfl_xor_sync(FULL_WARP, earliest, distance));
                latest = max(latest, __shfl_xor_sync(FULL_WARP, latest, distance));
            }
            if (lane == 0) to.earliest[warp] = earliest, to.latest[warp] = latest;
        }
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            if (thread + part * THREADS < S::WINDOW) to.window[thread + part * THREADS] = window[part];
        }
    };

    // The queries' group of copies is closed with the first tile's.
#pragma unroll
    for (int at = 0; at < STAGES - 1; ++at) {
        look_up(begin + at * KEYS);
        if (begin + at * KEYS < range.end) copy(at, begin + at * KEYS);
        cp_async_commit();
    }
    look_up(begin + (STAGES - 1) * KEYS);
    if (biased && begin < range.end) load_beside(begin), store_beside(0);

    uint32_t kept[S::IN_REGISTERS ? QUERY_TILES : 1][S::IN_REGISTERS ? DK / 16 : 1][4];
    bool have_kept = false;
    int stage = 0, beside_stage = 0;
    for (int first_key = begin; first_key < range.end; first_key += KEYS, stage = (stage + 1) % STAGES, beside_stage ^= 1) {
        cp_async_wait<STAGES - 2>();
        // Everyone's copies of this tile are there, and everyone is done with the tile before, whose place is taken now.
        __syncthreads();
        const int next_key = first_key + (STAGES - 1) * KEYS;
        if (next_key < range.end) {
            copy((stage + STAGES - 1) % STAGES, next_key);
            look_up(next_key + KEYS);
        }
        cp_async_commit();
        const bool more = first_key + KEYS < range.end;
        if (more && biased) load_beside(first_key + KEYS);

        // The same for the whole block where warps share queries.
        if (first_key <= any.y && first_key + KEYS > any.x) {
            if constexpr (S::IN_REGISTERS) {
                if (!have_kept) {
                    have_kept = true;
#pragma unroll
                    for (int tile = 0; tile < QUERY_TILES; ++tile) {
#pragma unroll
                        for (int step = 0; step < DK / 16; ++step) {
                            ldmatrix_x4(kept[tile][step], advance(query_chunk, step * 2) + tile * query_rows);
                        }
                    }
                }
            }

            float logits[QUERY_TILES][KEY_BLOCKS][4] = {};
            const SharedAddress stage_keys = key_chunk + stage * Layout::KEY_BYTES;
            uint32_t right[4];
#pragma unroll
            for (int step = 0; step < DK / 16; ++step) {
                uint32_t left[QUERY_TILES][4];
#pragma unroll
                for (int tile = 0; tile < QUERY_TILES; ++tile) {
                    if constexpr (S::IN_REGISTERS) {
#pragma unroll
                        for (int part = 0; part < 4; ++part) left[tile][part] = kept[tile][step][part];
                    } else {
                        ldmatrix_x4(left[tile], advance(query_chunk, step * 2) + tile * query_rows);
                    }
                }
                if constexpr (KEY_BLOCKS == 1) {
                    if (step % 2 == 0) ldmatrix_x4(right, advance(stage_keys, step * 2));
#pragma unroll
                    for (int tile = 0; tile < QUERY_TILES; ++tile) {
                        mma_m16n8k16_bf16(logits[tile][0], left[tile], right[step % 2 * 2], right[step % 2 * 2 + 1]);
                    }
                } else {
#pragma unroll
                    for (int pair = 0; pair < KEY_BLOCKS / 2; ++pair) {
                        ldmatrix_x4(right, advance(stage_keys, step * 2) + pair * query_rows);
#pragma unroll
                        for (int tile = 0; tile < QUERY_TILES; ++tile) {
                            mma_m16n8k16_bf16(logits[tile][pair * 2], left[tile], right[0], right[1]);
                            mma_m16n8k16_bf16(logits[tile][pair * 2 + 1], left[tile], right[2], right[3]);
                        }
                    }
                }
            }

            const bool masked = first_key < all.x || first_key + KEYS - 1 > all.y;
            const Beside<S> &beside = rest.beside[beside_stage];
            // Of few queries they go through shared memory.
            uint32_t weights[S::FEW ? 1 : QUERY_TILES][S::FEW ? 1 : KEYS / 16][4];
#pragma unroll
            for (int tile = 0; tile < QUERY_TILES; ++tile) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int query = first_query + tile * 16 + half * 8 + lane / 4;
                    if (biased) {
                        const float *const by_position =
                            beside.window + (range.step != 0 ? S::QUERIES - 1 - query : 0) + own_key + lane % 4 * 2;
                        const Time *const key_times = beside.times + own_key + lane % 4 * 2;
                        const Time row_time = rest.times[query];
                        const Time earliest = min(beside.earliest[0], beside.earliest[S::PAGES - 1]);
                        const Time latest = max(beside.latest[0], beside.latest[S::PAGES - 1]);
                        // The distances of all keys lie between those of the ends, if the row's time does not lie within them.
                        const float ends[2] = {distance_of(row_time, earliest), distance_of(row_time, latest)};
                        const unsigned places[2] = {table->place(ends[0]), table->place(ends[1])};
                        const bool outside = row_time >= latest || row_time <= earliest;
                        const bool shared_bucket = outside && table->bucket(places[0]) == table->bucket(places[1]);
                        const auto add_bias = [&](auto weight_of_key) {
#pragma unroll
                            for (int block = 0; block < KEY_BLOCKS; ++block) {
#pragma unroll
                                for (int part = 0; part < 2; ++part) {
                                    const int key = block * 8 + part;
                                    float &logit = logits[tile][block][half * 2 + part];
                                    logit = __fmaf_rn(logit, range.scale, __fadd_rn(by_position[key], weight_of_key(key)));
                                }
                            }
                        };
                        if (__all_sync(FULL_WARP, shared_bucket)) {
                            const float weight = table->weights[places[0]];
                            add_bias([&](int) { return weight; });
                        } else if (__all_sync(FULL_WARP, fmaxf(ends[0], ends[1]) < 2147483648.0f)) {
                            // Differences that fit into 32 bits are those of the low halves, and convert to the same floats.
                            const unsigned low = static_cast<unsigned>(row_time);
                            add_bias([&](int key) {
                                const int difference = static_cast<int>(low - static_cast<unsigned>(key_times[key]));
                                return table->weights[table->place(fabsf(__int2float_rn(difference)))];
                            });
                        } else {
                            add_bias([&](int key) { return table->weights[table->place(distance_of(row_time, key_times[key]))]; });
                        }
                    } else {
#pragma unroll
                        for (int block = 0; block < KEY_BLOCKS; ++block) {
#pragma unroll
                            for (int part = 0; part < 2; ++part) {
                                logits[tile][block][half * 2 + part] = __fmul_rn(logits[tile][block][half * 2 + part], range.scale);
                            }
                        }
                    }
                    // From this lane's first key.
                    const int2 seen = rest.seen[query];
                    const int first = seen.x - first_key - own_key - lane % 4 * 2, last = seen.y - first_key - own_key - lane % 4 * 2;
#pragma unroll
                    for (int block = 0; block < KEY_BLOCKS; ++block) {
                        uint32_t pair = pack_bf16x2(silu(logits[tile][block][half * 2]), silu(logits[tile][block][half * 2 + 1]));
                        if (masked) {
                            if (block * 8 < first || block * 8 > last) pair &= 0xffff0000u;
                            if (block * 8 + 1 < first || block * 8 + 1 > last) pair &= 0xffffu;
                        }
                        if constexpr (S::FEW) {
                            const int chunk = (warp * KEY_BLOCKS + block) ^ exchange_of<KEYS>(query);
                            unsigned char *const to = memory + Layout::WEIGHTS_AT + query * (KEYS * 2) + chunk * 16 + lane % 4 * 4;
                            *reinterpret_cast<uint32_t *>(to) = pair;
                        } else {
                            weights[tile][block / 2][block % 2 * 2 + half] = pair;
                        }
                    }
                }
            }
            if constexpr (S::FEW) __syncthreads();

            const SharedAddress stage_values = value_chunk + stage * Layout::VALUE_BYTES;
            if constexpr (VALUE_BLOCKS == 1) {
                if (has_columns) {
#pragma unroll
                    for (int pair = 0; pair < KEYS / 32; ++pair) {
                        ldmatrix_x4_trans(right, stage_values + pair * 2 * value_rows);
#pragma unroll
                        for (int step = 0; step < 2; ++step) {
#pragma unroll
                            for (int tile = 0; tile < QUERY_TILES; ++tile) {
                                uint32_t left[4];
                                ldmatrix_x4(left, advance(weight_chunk, pair * 4 + step * 2) + tile * (16 * KEYS * 2));
                                mma_m16n8k16_bf16(sums.out[tile][0], left, right[step * 2], right[step * 2 + 1]);
                            }
                        }
                    }
                }
            } else {
#pragma unroll
                for (int step = 0; step < KEYS / 16; ++step) {
                    uint32_t left[QUERY_TILES][4];
#pragma unroll
                    for (int tile = 0; tile < QUERY_TILES; ++tile) {
                        if constexpr (S::FEW) {
                            ldmatrix_x4(left[tile], advance(weight_chunk, step * 2) + tile * (16 * KEYS * 2));
                        } else {
#pragma unroll
                            for (int part = 0; part < 4; ++part) left[tile][part] = weights[tile][step][part];
                        }
                    }
#pragma unroll
                    for (int pair = 0; pair < VALUE_BLOCKS / 2; ++pair) {
                        ldmatrix_x4_trans(right, advance(stage_values, pair * 2) + step * value_rows);
#pragma unroll
                        for (int tile = 0; tile < QUERY_TILES; ++tile) {
                            mma_m16n8k16_bf16(sums.out[tile][pair * 2], left[tile], right[0], right[1]);
                            mma_m16n8k16_bf16(sums.out[tile][pair * 2 + 1], left[tile], right[2], right[3]);
                        }
                    }
                }
            }
        }
        if (more && biased) store_beside(beside_stage ^ 1);
    }
    cp_async_wait<0>();
}

} // namespace pointwise
