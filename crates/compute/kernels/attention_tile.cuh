// Attention of a tile of queries with a range of the keys of one context, on tensor cores: what prefill and branch attention share.
//
// Algorithm: FlashAttention-2 (Dao 2023): online softmax (Milakov and Gimelshein 2018) over tiles of keys, sums in f32, exponentials in
// base 2 with the scale folded in. The query heads that share a key-value head are rows of the same tile (as in Flash-Decoding for grouped
// heads): query m of a tile is row m / group, head kv_head * group + m % group, so that a key is read once for all of them.
//
// Layout: keys and values of one layer lie in pages `[page][kv_head][PAGE][D]`, bf16, D the head's width rounded up; columns behind the
// true width are zero. In shared memory a row of D elements is cut into chunks of 16 bytes, whose places are exchanged by an XOR with the
// row, so that the 8 rows of a matrix of ldmatrix lie in different banks.
//
// Invariant, bit for bit: the result of a query depends on the query and on the keys it sees, nothing else. Tiles of keys begin at
// multiples of KEYS of the absolute position. A tile behind what a query sees leaves its state as it was: its weights are 0 and its
// correction 1. The sum of the weights is taken by an mma with ones, in the order of keys, from the same rounded weights that multiply the
// values. Therefore both ways to share out the work (below) give the same bits:
//   attend_by_rows   a warp has 16 or 32 queries and all keys of a tile: most arithmetic per byte, for tiles of many queries;
//   attend_by_keys   four warps have the same 32 queries and share keys, then columns: a quarter of the time for tiles of few queries.
// Keys and values from `end` on are never read (zeros take their place): what lies behind a context may be NaN, and 0 * NaN is NaN.
#pragma once

#include "common.cuh"

// Warps of a block.
constexpr int WARPS = 4;
constexpr int THREADS = WARPS * 32;

// Queries that attend_by_keys takes.
constexpr int FEW_QUERIES = 32;

// Sizes for heads of (padded) width `width`, a multiple of 16.
template <int width> struct Sizes {
    static constexpr int D = width;
    // Keys in a tile. Every split of a context begins at a multiple of it.
    static constexpr int KEYS = D <= 64 ? 64 : 32;
    static constexpr int PAGES = KEYS / PAGE;
    // Tiles of 16 queries that a warp of attend_by_rows has: two of them read a key once for both.
    static constexpr int QUERY_TILES = D <= 128 ? 2 : 1;
    // Queries that attend_by_rows takes.
    static constexpr int QUERIES = WARPS * 16 * QUERY_TILES;
    // 16-byte chunks of a row.
    static constexpr int CHUNKS = D / 8;
    // Elements of a tile of keys or of values.
    static constexpr int TILE = KEYS * D;
};

// Exchange of chunks in a row, for rows whose number is `row` modulo 8. Chunk c lies at c ^ exchange.
template <int D> __device__ __forceinline__ int exchange_of(int row) {
    constexpr int chunks = D / 8;
    if constexpr (chunks >= 8) {
        return row & 7;
    } else {
        return (row / (8 / chunks)) & (chunks - 1);
    }
}

// Address of a chunk in a matrix `[rows][D]` that begins at a multiple of 128 bytes.
template <int D> __device__ __forceinline__ SharedAddress chunk_at(SharedAddress matrix, int row, int chunk) {
    return matrix + static_cast<uint32_t>(row * D * 2 + (chunk ^ exchange_of<D>(row)) * 16);
}

// Address of chunk c + chunks from that of c, where the two numbers have no bit in common.
__device__ __forceinline__ SharedAddress advance(SharedAddress chunk, int chunks) {
    return (chunk ^ static_cast<uint32_t>(chunks * 16 & 96)) + static_cast<uint32_t>(chunks * 16 & ~127);
}

// One context as a key-value head sees it.
struct Context {
    // The head's part of page 0.
    const bf16 *keys, *values;
    // Elements from one page to the next.
    size_t page_stride;
    // Pages from position 0 on.
    const int *pages;
    // First position that is not read.
    int end;
};

// Copies tiles of keys and values to shared memory. The page numbers of a tile are looked up a tile ahead, so that a copy never waits for
// them.
template <class S> struct TileCopy {
    Context context;
    // Pages of the tile that is copied next.
    int ahead[S::PAGES];

    __device__ __forceinline__ void look_up(int first_key) {
#pragma unroll
        for (int page = 0; page < S::PAGES; ++page) {
            const int position = first_key + page * PAGE;
            ahead[page] = position < context.end ? __ldg(context.pages + position / PAGE) : 0;
        }
    }

    // Starts the copy of the tile at `first_key`, which was looked up before.
    __device__ __forceinline__ void start(SharedAddress keys, SharedAddress values, int first_key) const {
        constexpr int rows_per_step = THREADS / S::CHUNKS;
        const int thread = static_cast<int>(threadIdx.x), chunk = thread % S::CHUNKS, first_row = thread / S::CHUNKS;
        const size_t place = static_cast<size_t>(first_row % PAGE * S::D + chunk * 8);
        if constexpr (rows_per_step > PAGE) {
            // Narrow heads: one step is the whole tile.
            const size_t offset = (first_row < PAGE ? ahead[0] : ahead[S::PAGES - 1]) * context.page_stride + place;
            copy_chunk(keys, values, context.keys + offset, context.values + offset, first_row, chunk, first_key);
        } else {
#pragma unroll
            for (int page = 0; page < S::PAGES; ++page) {
                const size_t offset = ahead[page] * context.page_stride + place;
                const bf16 *const from_keys = context.keys + offset, *const from_values = context.values + offset;
#pragma unroll
                for (int row = 0; row < PAGE; row += rows_per_step) {
                    copy_chunk(
                        keys, values, from_keys + row * S::D, from_values + row * S::D, first_row + page * PAGE + row, chunk, first_key);
                }
            }
        }
    }

private:
    __device__ __forceinline__ void copy_chunk(
        SharedAddress keys, SharedAddress values, const bf16 *from_keys, const bf16 *from_values, int row, int chunk, int first_key) const {
        const bool valid = first_key + row < context.end;
        cp_async_16(chunk_at<S::D>(keys, row, chunk), from_keys, valid);
        cp_async_16(chunk_at<S::D>(values, row, chunk), from_values, valid);
    }
};

// Starts the copy of `count` queries to `target`, `[capacity][D]`; rows behind them are zero. `queries` is the first row of the tile.
template <class S, int capacity>
__device__ __forceinline__ void copy_queries(SharedAddress target, const bf16 *queries, int count, int group, int q_heads, int first_head) {
    for (int at = static_cast<int>(threadIdx.x); at < capacity * S::CHUNKS; at += THREADS) {
        const int query = at / S::CHUNKS, chunk = at % S::CHUNKS;
        const int row = query / group, head = first_head + query % group;
        const bool valid = query < count;
        const bf16 *source = valid ? queries + (static_cast<size_t>(row) * q_heads + head) * S::D + chunk * 8 : queries;
        cp_async_16(chunk_at<S::D>(target, query, chunk), source, valid);
    }
}

// What a tile attends to.
struct Range {
    // Keys of [first_key, end of the context) are met; first_key is a multiple of KEYS.
    int first_key;
    // Query m sees keys up to position limit + m / group; INT_MAX / 2 for all.
    int limit;
    int queries, group;
    // log2(e) / sqrt(width of a head).
    float scale;
};

// Weights of the keys of one query: s becomes 2^(scale (s - maximum)).
__device__ __forceinline__ float weight_of(float logit, float scale, float scaled_maximum) {
    return exp2_approx(__fmaf_rn(logit, scale, -scaled_maximum));
}

// What a maximum that grew from `old` to `maximum` makes of earlier weights.
__device__ __forceinline__ float correction_of(float old, float maximum, float scale) {
    return exp2_approx(__fmul_rn(__fsub_rn(old, maximum), scale));
}

constexpr uint32_t ONES = 0x3f803f80u;

// State of the queries that a warp has, as accumulators of mma: lane (g, t) = (lane / 4, lane % 4) holds, of query tile i,
// query first_query + 16 i + g in parts 0 and 1 and query first_query + 16 i + g + 8 in parts 2 and 3 ("halves"), columns
// first_column + 8 block + 2 t and the next.
template <int query_tiles, int blocks> struct State {
    static constexpr int QUERY_TILES = query_tiles, BLOCKS = blocks;
    float out[QUERY_TILES][BLOCKS][4];
    // Sum of the weights, by half.
    float sum[QUERY_TILES][2];
    // Largest logit, unscaled, by half.
    float maximum[QUERY_TILES][2];
    int first_query, first_column;

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int tile = 0; tile < QUERY_TILES; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) maximum[tile][half] = negative_infinity(), sum[tile][half] = 0.0f;
#pragma unroll
            for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
                for (int part = 0; part < 4; ++part) out[tile][block][part] = 0.0f;
            }
        }
    }

    // Multiplies what there is by the corrections. Most tiles of a long context raise no maximum, and times 1 changes nothing.
    __device__ __forceinline__ void correct(const float (&corrections)[QUERY_TILES][2]) {
        bool needed = false;
#pragma unroll
        for (int tile = 0; tile < QUERY_TILES; ++tile) needed = needed || corrections[tile][0] != 1.0f || corrections[tile][1] != 1.0f;
        if (!__any_sync(FULL_WARP, needed)) return;
#pragma unroll
        for (int tile = 0; tile < QUERY_TILES; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sum[tile][half] = __fmul_rn(sum[tile][half], corrections[tile][half]);
#pragma unroll
                for (int block = 0; block < BLOCKS; ++block) {
#pragma unroll
                    for (int part = half * 2; part < half * 2 + 2; ++part) {
                        out[tile][block][part] = __fmul_rn(out[tile][block][part], corrections[tile][half]);
                    }
                }
            }
        }
    }
};

template <class S> using RowState = State<S::QUERY_TILES, S::D / 8>;

// Shared memory of attend_by_rows, in bytes: queries, two stages of keys, two of values, and the last key that each query sees.
template <class S> constexpr int by_rows_bytes = (S::QUERIES * S::D + 4 * S::TILE) * 2 + S::QUERIES * 4;

// Attends with up to S::QUERIES queries. The copy of the queries to the beginning of `shared` was started and not committed.
template <class S>
__device__ __forceinline__ void attend_by_rows(RowState<S> &state, unsigned char *memory, TileCopy<S> &copy, const Range &range) {
    constexpr int D = S::D, KEYS = S::KEYS, QUERY_TILES = S::QUERY_TILES;
    constexpr bool in_registers = D <= 64;
    constexpr uint32_t tile_bytes = S::TILE * 2, rows_bytes = 16 * D * 2;
    const SharedAddress shared = shared_address(memory), keys = shared + S::QUERIES * D * 2, values = keys + 2 * tile_bytes;
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int first_query = warp * 16 * QUERY_TILES;
    // The last key that any of this warp's queries sees; none if it has no query. Tiles behind it would change nothing.
    const int last_query = min(first_query + 16 * QUERY_TILES, range.queries) - 1;
    const int warp_last = last_query >= first_query ? range.limit + last_query / range.group : -1;

    // The chunk that this lane names to ldmatrix, in the first 16 rows and columns: the four matrices of a query lie first below each
    // other, those of keys first beside each other, those of values below each other.
    const SharedAddress query_chunk = chunk_at<D>(shared, first_query + lane % 16, lane / 16);
    const SharedAddress key_chunk = chunk_at<D>(keys, lane / 16 * 8 + lane % 8, lane / 8 % 2);
    const SharedAddress value_chunk = chunk_at<D>(values, lane / 8 % 2 * 8 + lane % 8, lane / 16);

    state.clear();
    state.first_query = first_query, state.first_column = 0;
    // They are looked up where they matter, at the end of a context: registers are scarce.
    int *const limits = reinterpret_cast<int *>(memory + (S::QUERIES * D + 4 * S::TILE) * 2);
    if (static_cast<int>(threadIdx.x) < S::QUERIES) {
        limits[threadIdx.x] = min(range.limit + static_cast<int>(threadIdx.x) / range.group, copy.context.end - 1);
    }
    const int warp_limit = range.limit + first_query / range.group;

    copy.look_up(range.first_key);
    copy.start(keys, values, range.first_key);
    cp_async_commit();
    copy.look_up(range.first_key + KEYS);

    uint32_t kept[in_registers ? QUERY_TILES : 1][in_registers ? D / 16 : 1][4];
    uint32_t stage = 0;
    for (int first_key = range.first_key; first_key < copy.context.end; first_key += KEYS, stage = tile_bytes - stage) {
        cp_async_wait<0>();
        // Everyone's copies of this tile are there, and everyone is done with the tile before, whose place is taken now.
        __syncthreads();
        if (first_key + KEYS < copy.context.end) {
            copy.start(keys + (tile_bytes - stage), values + (tile_bytes - stage), first_key + KEYS);
            copy.look_up(first_key + 2 * KEYS);
        }
        cp_async_commit();
        if (first_key > warp_last) continue;

        if constexpr (in_registers) {
            if (first_key == range.first_key) {
#pragma unroll
                for (int tile = 0; tile < QUERY_TILES; ++tile) {
#pragma unroll
                    for (int step = 0; step < D / 16; ++step) {
                        ldmatrix_x4(kept[tile][step], advance(query_chunk, step * 2) + tile * rows_bytes);
                    }
                }
            }
        }

        float logits[QUERY_TILES][KEYS / 8][4] = {};
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            uint32_t left[QUERY_TILES][4];
#pragma unroll
            for (int tile = 0; tile < QUERY_TILES; ++tile) {
                if constexpr (in_registers) {
#pragma unroll
                    for (int part = 0; part < 4; ++part) left[tile][part] = kept[tile][step][part];
                } else {
                    ldmatrix_x4(left[tile], advance(query_chunk, step * 2) + tile * rows_bytes);
                }
            }
#pragma unroll
            for (int pair = 0; pair < KEYS / 16; ++pair) {
                uint32_t right[4];
                ldmatrix_x4(right, advance(key_chunk + stage, step * 2) + pair * rows_bytes);
#pragma unroll
                for (int tile = 0; tile < QUERY_TILES; ++tile) {
                    mma_m16n8k16_bf16(logits[tile][pair * 2], left[tile], right[0], right[1]);
                    mma_m16n8k16_bf16(logits[tile][pair * 2 + 1], left[tile], right[2], right[3]);
                }
            }
        }

        const bool masked = first_key + KEYS - 1 > warp_limit || first_key + KEYS > copy.context.end;
        uint32_t weights[QUERY_TILES][KEYS / 16][4];
        float corrections[QUERY_TILES][2];
#pragma unroll
        for (int tile = 0; tile < QUERY_TILES; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (masked) {
                    // From this lane's first key.
                    const int last = limits[first_query + tile * 16 + half * 8 + lane / 4] - first_key - lane % 4 * 2;
#pragma unroll
                    for (int block = 0; block < KEYS / 8; ++block) {
#pragma unroll
                        for (int part = 0; part < 2; ++part) {
                            if (block * 8 + part > last) logits[tile][block][half * 2 + part] = negative_infinity();
                        }
                    }
                }
                float maximum = logits[tile][0][half * 2];
#pragma unroll
                for (int block = 0; block < KEYS / 8; ++block) {
                    maximum = fmaxf(maximum, fmaxf(logits[tile][block][half * 2], logits[tile][block][half * 2 + 1]));
                }
                maximum = fmaxf(quad_max(maximum), state.maximum[tile][half]);
                corrections[tile][half] = correction_of(state.maximum[tile][half], maximum, range.scale);
                state.maximum[tile][half] = maximum;
                const float scaled = __fmul_rn(maximum, range.scale);
#pragma unroll
                for (int block = 0; block < KEYS / 8; ++block) {
                    const float low = weight_of(logits[tile][block][half * 2], range.scale, scaled);
                    const float high = weight_of(logits[tile][block][half * 2 + 1], range.scale, scaled);
                    weights[tile][block / 2][block % 2 * 2 + half] = pack_bf16x2(low, high);
                }
            }
        }
        state.correct(corrections);

        float sums[QUERY_TILES][4];
#pragma unroll
        for (int tile = 0; tile < QUERY_TILES; ++tile) {
#pragma unroll
            for (int part = 0; part < 4; ++part) sums[tile][part] = state.sum[tile][part / 2];
        }
#pragma unroll
        for (int step = 0; step < KEYS / 16; ++step) {
#pragma unroll
            for (int pair = 0; pair < D / 16; ++pair) {
                uint32_t right[4];
                ldmatrix_x4_trans(right, advance(value_chunk + stage, pair * 2) + step * rows_bytes);
#pragma unroll
                for (int tile = 0; tile < QUERY_TILES; ++tile) {
                    mma_m16n8k16_bf16(state.out[tile][pair * 2], weights[tile][step], right[0], right[1]);
                    mma_m16n8k16_bf16(state.out[tile][pair * 2 + 1], weights[tile][step], right[2], right[3]);
                }
            }
#pragma unroll
            for (int tile = 0; tile < QUERY_TILES; ++tile) mma_m16n8k16_bf16(sums[tile], weights[tile][step], ONES, ONES);
        }
        // All columns of a product with ones are equal.
#pragma unroll
        for (int tile = 0; tile < QUERY_TILES; ++tile) state.sum[tile][0] = sums[tile][0], state.sum[tile][1] = sums[tile][2];
    }
    cp_async_wait<0>();
}

// Columns that a warp of attend_by_keys has, in blocks of 8. Narrow heads leave warps without any.
template <class S> constexpr int blocks_by_keys = S::D >= 32 ? S::D / 32 : 1;
template <class S> using ColumnState = State<FEW_QUERIES / 16, blocks_by_keys<S>>;

// Tiles under way in attend_by_keys: its blocks compute little and wait for memory.
template <class S> constexpr int stages_by_keys = S::D <= 128 ? 4 : 2;

// Shared memory of attend_by_keys, in bytes: queries, stages of keys and values, weights, the last key of each query, maxima by warp.
template <class S>
constexpr int by_keys_bytes =
    (FEW_QUERIES * S::D + 2 * stages_by_keys<S> * S::TILE + FEW_QUERIES * S::KEYS) * 2 + (1 + WARPS) * FEW_QUERIES * 4;

// Attends with up to FEW_QUERIES queries. The copy of the queries to the beginning of `memory` was started and not committed. First every
// warp takes a quarter of the keys and makes weights of them, then a quarter of the columns with the weights of all.
template <class S>
__device__ __forceinline__ void attend_by_keys(ColumnState<S> &state, unsigned char *memory, TileCopy<S> &copy, const Range &range) {
    constexpr int D = S::D, KEYS = S::KEYS, TILES = ColumnState<S>::QUERY_TILES, BLOCKS = ColumnState<S>::BLOCKS,
                  STAGES = stages_by_keys<S>;
    // Blocks of 8 keys that a warp has.
    constexpr int KEY_BLOCKS = KEYS / 8 / WARPS;
    constexpr uint32_t tile_bytes = S::TILE * 2, stage_bytes = 2 * tile_bytes;
    const SharedAddress queries = shared_address(memory), stages = queries + FEW_QUERIES * D * 2;
    unsigned char *const behind = memory + FEW_QUERIES * D * 2 + STAGES * stage_bytes;
    const SharedAddress weights = shared_address(behind);
    int *const limits = reinterpret_cast<int *>(behind + FEW_QUERIES * KEYS * 2);
    float *const maxima = reinterpret_cast<float *>(limits + FEW_QUERIES);
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int first_block = warp * BLOCKS;
    const bool has_columns = first_block * 8 < D;

    state.clear();
    state.first_query = 0, state.first_column = first_block * 8;
    if (static_cast<int>(threadIdx.x) < FEW_QUERIES) {
        limits[threadIdx.x] = min(range.limit + static_cast<int>(threadIdx.x) / range.group, copy.context.end - 1);
    }

    // The chunk that this lane names to ldmatrix, as in attend_by_rows. A warp with one block of keys or columns takes four matrices of it.
    const SharedAddress query_chunk = chunk_at<D>(queries, lane % 16, lane / 16);
    const SharedAddress weight_chunk = chunk_at<KEYS>(weights, lane % 16, lane / 16);
    SharedAddress key_chunk, value_chunk;
    if constexpr (KEY_BLOCKS == 1) {
        key_chunk = chunk_at<D>(stages, warp * 8 + lane % 8, lane / 8);
    } else {
        key_chunk = chunk_at<D>(stages, warp * 16 + lane / 16 * 8 + lane % 8, lane / 8 % 2);
    }
    if constexpr (BLOCKS == 1) {
        value_chunk = chunk_at<D>(stages + tile_bytes, lane, has_columns ? first_block : 0);
    } else {
        value_chunk = chunk_at<D>(stages + tile_bytes, lane / 8 % 2 * 8 + lane % 8, first_block + lane / 16);
    }

#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        copy.look_up(range.first_key + stage * KEYS);
        const SharedAddress to = stages + stage * stage_bytes;
        if (range.first_key + stage * KEYS < copy.context.end) copy.start(to, to + tile_bytes, range.first_key + stage * KEYS);
        cp_async_commit();
    }
    copy.look_up(range.first_key + (STAGES - 1) * KEYS);

    // Wide heads would fill the registers; they read the queries anew for every tile.
    constexpr bool in_registers = D <= 128;
    uint32_t left[TILES][D / 16][4];
    uint32_t stage = 0, next_stage = (STAGES - 1) * stage_bytes;
    for (int first_key = range.first_key; first_key < copy.context.end; first_key += KEYS) {
        cp_async_wait<STAGES - 2>();
        // Everyone's copies of this tile are there, and everyone is done with the tile before, whose place is taken now.
        __syncthreads();
        const int next_key = first_key + (STAGES - 1) * KEYS;
        if (next_key < copy.context.end) {
            copy.start(stages + next_stage, stages + next_stage + tile_bytes, next_key);
            copy.look_up(next_key + KEYS);
        }
        cp_async_commit();
        if (!in_registers || first_key == range.first_key) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                for (int step = 0; step < D / 16; ++step) ldmatrix_x4(left[tile][step], advance(query_chunk, step * 2) + tile * 16 * D * 2);
            }
        }

        float logits[TILES][KEY_BLOCKS][4] = {};
        if constexpr (KEY_BLOCKS == 1) {
#pragma unroll
            for (int step = 0; step < D / 16; step += 2) {
                uint32_t right[4];
                ldmatrix_x4(right, advance(key_chunk + stage, step * 2));
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    mma_m16n8k16_bf16(logits[tile][0], left[tile][step], right[0], right[1]);
                    mma_m16n8k16_bf16(logits[tile][0], left[tile][step + 1], right[2], right[3]);
                }
            }
        } else {
#pragma unroll
            for (int step = 0; step < D / 16; ++step) {
                uint32_t right[4];
                ldmatrix_x4(right, advance(key_chunk + stage, step * 2));
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    mma_m16n8k16_bf16(logits[tile][0], left[tile][step], right[0], right[1]);
                    mma_m16n8k16_bf16(logits[tile][KEY_BLOCKS - 1], left[tile][step], right[2], right[3]);
                }
            }
        }

        const bool masked = first_key + KEYS - 1 > range.limit || first_key + KEYS > copy.context.end;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int query = tile * 16 + half * 8 + lane / 4;
                if (masked) {
                    const int last = limits[query] - first_key - warp * (KEY_BLOCKS * 8) - lane % 4 * 2;
#pragma unroll
                    for (int block = 0; block < KEY_BLOCKS; ++block) {
#pragma unroll
                        for (int part = 0; part < 2; ++part) {
                            if (block * 8 + part > last) logits[tile][block][half * 2 + part] = negative_infinity();
                        }
                    }
                }
                float maximum = logits[tile][0][half * 2];
#pragma unroll
                for (int block = 0; block < KEY_BLOCKS; ++block) {
                    maximum = fmaxf(maximum, fmaxf(logits[tile][block][half * 2], logits[tile][block][half * 2 + 1]));
                }
                maximum = quad_max(maximum);
                if (lane % 4 == 0) maxima[warp * FEW_QUERIES + query] = maximum;
            }
        }
        __syncthreads();

        float corrections[TILES][2];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int query = tile * 16 + half * 8 + lane / 4;
                float maximum = state.maximum[tile][half];
#pragma unroll
                for (int other = 0; other < WARPS; ++other) maximum = fmaxf(maximum, maxima[other * FEW_QUERIES + query]);
                corrections[tile][half] = correction_of(state.maximum[tile][half], maximum, range.scale);
                state.maximum[tile][half] = maximum;
                const float scaled = __fmul_rn(maximum, range.scale);
#pragma unroll
                for (int block = 0; block < KEY_BLOCKS; ++block) {
                    const float low = weight_of(logits[tile][block][half * 2], range.scale, scaled);
                    const float high = weight_of(logits[tile][block][half * 2 + 1], range.scale, scaled);
                    const int chunk = (warp * KEY_BLOCKS + block) ^ exchange_of<KEYS>(query);
                    *reinterpret_cast<uint32_t *>(behind + query * (KEYS * 2) + chunk * 16 + lane % 4 * 4) = pack_bf16x2(low, high);
                }
            }
        }
        state.correct(corrections);
        __syncthreads();

        if (has_columns) {
            float sums[TILES][4];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                for (int part = 0; part < 4; ++part) sums[tile][part] = state.sum[tile][part / 2];
            }
#pragma unroll
            for (int pair = 0; pair < KEYS / 32; ++pair) {
                uint32_t weight[TILES][2][4];
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                    for (int step = 0; step < 2; ++step) {
                        ldmatrix_x4(weight[tile][step], advance(weight_chunk, pair * 4 + step * 2) + tile * 16 * KEYS * 2);
                    }
                }
                if constexpr (BLOCKS == 1) {
                    uint32_t right[4];
                    ldmatrix_x4_trans(right, value_chunk + stage + pair * 32 * D * 2);
#pragma unroll
                    for (int tile = 0; tile < TILES; ++tile) {
                        mma_m16n8k16_bf16(state.out[tile][0], weight[tile][0], right[0], right[1]);
                        mma_m16n8k16_bf16(state.out[tile][0], weight[tile][1], right[2], right[3]);
                    }
                } else {
#pragma unroll
                    for (int step = 0; step < 2; ++step) {
#pragma unroll
                        for (int block = 0; block < BLOCKS; block += 2) {
                            uint32_t right[4];
                            ldmatrix_x4_trans(right, advance(value_chunk + stage, block) + (pair * 2 + step) * 16 * D * 2);
#pragma unroll
                            for (int tile = 0; tile < TILES; ++tile) {
                                mma_m16n8k16_bf16(state.out[tile][block], weight[tile][step], right[0], right[1]);
                                mma_m16n8k16_bf16(state.out[tile][block + 1], weight[tile][step], right[2], right[3]);
                            }
                        }
                    }
                }
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                    for (int step = 0; step < 2; ++step) mma_m16n8k16_bf16(sums[tile], weight[tile][step], ONES, ONES);
                }
            }
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) state.sum[tile][0] = sums[tile][0], state.sum[tile][1] = sums[tile][2];
        }
        stage = stage == (STAGES - 1) * stage_bytes ? 0 : stage + stage_bytes;
        next_stage = next_stage == (STAGES - 1) * stage_bytes ? 0 : next_stage + stage_bytes;
    }
    cp_async_wait<0>();
}

// What the host passes as dynamic shared memory, in bytes.
static_assert(by_rows_bytes<Sizes<16>> == 12800 && by_keys_bytes<Sizes<16>> == 22144);
static_assert(by_rows_bytes<Sizes<32>> == 25088 && by_keys_bytes<Sizes<32>> == 39552);
static_assert(by_rows_bytes<Sizes<64>> == 49664 && by_keys_bytes<Sizes<64>> == 74368);
static_assert(by_rows_bytes<Sizes<128>> == 66048 && by_keys_bytes<Sizes<128>> == 76416);
static_assert(by_rows_bytes<Sizes<256>> == 98560 && by_keys_bytes<Sizes<256>> == 84608);
