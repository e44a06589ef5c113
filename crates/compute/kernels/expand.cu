// One step of exact constrained beam search, for many requests at once, without the host in between.
//
// Purpose. Every beam continues by those children of its trie node below which the filter allows a leaf; the best `width`
// continuations of all beams become the next beams, best first, equal scores by the smaller node (path order): the
// semantics of `decode.rs`. How many beams are alive and how many children they have is known on the device only.
// Where the host knows that there are few, expand_small.cu does the same in one launch.
//
// Algorithm. The candidates (candidates.cuh) are computed anew in each pass and never stored, so the workspace does not grow
// with them. There is no table over products of codebooks and nothing is padded to the hottest beam.
//
//   expand_begin      one block per request: prefix sum over children; clears the workspace
//   expand_normalize  only for requests normalised over allowed continuations: log-sum-exp per beam
//   expand_histogram  counts candidates by score bin; the block that finishes last finds the bin of the last survivor. If
//                     that bin and all better ones fit the capacity, the cut is settled
//   expand_refine     launched as often as the host likes, also never; returns at once where the cut is settled. Else splits
//                     the interval of keys that holds the last survivor into 2048 parts. Where no launch is left, the last
//                     block repeats this alone until the cut is settled: slower, never wrong
//   expand_collect    writes the candidates above the cut into the places of their bins
//   expand_finish     ranks each candidate within its bin, which is the sort, and writes the next beams
//
// Keys (score, node) are pairwise different, so an interval of one key ends the refinement whatever the scores: six parts
// of 2048 at most. Selection by histogram of leading bits is the radix select of Alabi et al. (2012); ranking within
// buckets is sample sort with the histogram's bins as splitters.
//
// Invariants. Beams come best first and no candidate is better than its beam, hence a tile whose first beam is below the cut
// ends a pass. The result depends on the request alone: neither on the grid nor on the order in which blocks run. A request
// that has failed yields no beams, here and in all later steps, until a step that `is_first`.
//
// Geometry. Blocks of 256 threads, 1024 in expand_begin; no dynamic shared memory. A grid is (blocks, requests), any number of
// blocks gives the same result. With `most` children at most (width times the largest number of children in the level, or
// the nodes of the next level, or, for a fixed token, the width):
//
//   expand_begin                                     requests
//   expand_normalize                                 ceil(width / 8) blocks
//   expand_histogram, expand_refine, expand_collect  ceil(most / 1024) blocks, but not more than fill the device
//   expand_finish                                    ceil(capacity / 256) blocks
//
// A capacity of 2 * width + 2048 settles the cut at once unless very many scores are equal.
//
#include "candidates.cuh"

namespace expand {

constexpr uint32_t BEGIN_THREADS = 1024;

// Grid: requests, blocks of 1024 threads.
extern "C" __global__ void __launch_bounds__(BEGIN_THREADS) expand_begin(const ExpandStep *__restrict__ steps) {
    SHARED_ARRAY(uint32_t, warp_sums, BEGIN_THREADS / 32);
    const ExpandStep &step = steps[blockIdx.x];
    const Workspace w = workspace_of(step);
    for (uint32_t bin = threadIdx.x; bin < BINS; bin += BEGIN_THREADS) w.histogram[bin] = w.bin_filled[bin] = 0;
    begin_step<BEGIN_THREADS, MOST_BEAMS / BEGIN_THREADS>(step, w, warp_sums);
}

// Grid: (any, requests).
extern "C" __global__ void __launch_bounds__(THREADS, 3) expand_normalize(const ExpandStep *__restrict__ steps) {
    SHARED_ARRAY(NormalizeScratch, scratch, 1);
    const ExpandStep &step = steps[blockIdx.y];
    if (step.normalizers != nullptr) return;
    normalize_beams(step, workspace_of(step), scratch[0], blockIdx.x, gridDim.x);
}

// Shared memory of a pass.
struct Pass {
    uint32_t histogram[BINS];
    uint32_t starts[TILE + 1];  // child_starts of the beams of a tile, and of the one after them
    uint32_t warp_sums[THREADS / 32];
    // What one thread tells the others.
    uint32_t bin, above, count;
    uint32_t interval[2];
    bool is_last;
};

// Whether all other blocks of the request are done with this pass. Then their writes are seen.
__device__ bool is_last_block(ExpandState *state, Pass &pass) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        pass.is_last = atomicAdd(&state->finished, 1u) == gridDim.x - 1;
        if (pass.is_last) state->finished = 0;
    }
    __syncthreads();
    if (pass.is_last) __threadfence();
    return pass.is_last;
}

__device__ void clear_histogram(Pass &pass) {
    for (uint32_t bin = threadIdx.x; bin < BINS; bin += THREADS) pass.histogram[bin] = 0;
    __syncthreads();
}

// Adds the block's histogram, and the range of keys it met, to those of the request.
__device__ void add_to_request(const Workspace &w, const Pass &pass, u64 smallest, u64 greatest) {
    __syncthreads();
    for (uint32_t bin = threadIdx.x; bin < BINS; bin += THREADS) {
        if (pass.histogram[bin] != 0) atomicAdd(w.histogram + bin, pass.histogram[bin]);
    }
    for (uint32_t distance = 16; distance > 0; distance /= 2) {
        const u64 other_smallest = __shfl_xor_sync(FULL_WARP, smallest, distance);
        const u64 other_greatest = __shfl_xor_sync(FULL_WARP, greatest, distance);
        smallest = other_smallest < smallest ? other_smallest : smallest;
        greatest = other_greatest > greatest ? other_greatest : greatest;
    }
    // Nothing met: the smallest is above the greatest.
    if (threadIdx.x % 32 == 0 && smallest <= greatest) {
        atomicMin(&w.state->smallest_seen, smallest);
        atomicMax(&w.state->greatest_seen, greatest);
    }
}

// Finds in the request's histogram the bin that holds candidate number `wanted` (from 1), and clears the histogram. Tells
// all threads the bin, the candidates in better bins and those in this one; returns the sum over all bins. If that is less
// than `wanted`, the rest is undefined. If asked, writes how many candidates precede each bin.
__device__ uint32_t find_bin(const Workspace &w, Pass &pass, uint32_t wanted, uint32_t *starts) {
    constexpr uint32_t SHARE = BINS / THREADS;
    uint32_t counts[SHARE], sum = 0, total;
#pragma unroll
    for (uint32_t i = 0; i < SHARE; ++i) {
        counts[i] = fresh(w.histogram + threadIdx.x * SHARE + i);
        w.histogram[threadIdx.x * SHARE + i] = 0;
        sum += counts[i];
    }
    uint32_t before = exclusive_sum<THREADS>(sum, pass.warp_sums, total);
#pragma unroll
    for (uint32_t i = 0; i < SHARE; ++i) {
        if (starts != nullptr) starts[threadIdx.x * SHARE + i] = before;
        if (before < wanted && counts[i] >= wanted - before) {
            pass.bin = threadIdx.x * SHARE + i;
            pass.above = before;
            pass.count = counts[i];
        }
        before += counts[i];
    }
    __syncthreads();
    return total;
}

// Fixes the cut if what lies in `[lowest, highest]` and above fits the capacity, else keeps the interval. By one thread.
__device__ void settle(const ExpandStep &step, ExpandState &state, u64 lowest, u64 highest, uint32_t above, uint32_t count) {
    const u64 smallest = fresh(&state.smallest_seen), greatest = fresh(&state.greatest_seen);
    state.settled = count <= step.capacity - above;
    state.collected = above + count;
    state.above = above;
    // Equal scores: what was met may be far narrower than the interval.
    state.lowest = smallest > lowest ? smallest : lowest;
    state.highest = greatest < highest ? greatest : highest;
    state.smallest_seen = ~0ull;
    state.greatest_seen = 0;
}

// Parts of [lowest, highest] are 2^shift keys wide.
__device__ __forceinline__ uint32_t part_shift(u64 lowest, u64 highest) {
    const uint32_t bits = 64 - __clzll(static_cast<long long>(highest - lowest));
    return bits > 11 ? bits - 11 : 0;
}

// One pass over the interval that holds the last survivor: counts its candidates part by part, better parts first.
__device__ void count_parts(const ExpandStep &step, const Workspace &w, Pass &pass, uint32_t tile, uint32_t stride) {
    const u64 lowest = fresh(&w.state->lowest), highest = fresh(&w.state->highest);
    const uint32_t shift = part_shift(lowest, highest);
    u64 smallest = ~0ull, greatest = 0;
    clear_histogram(pass);
    for_each_candidate(step, w, pass.starts, lowest, tile, stride, [&](u64 key, uint32_t) {
        if (key > highest) return;
        atomicAdd(pass.histogram + (BINS - 1 - static_cast<uint32_t>((key - lowest) >> shift)), 1u);
        smallest = key < smallest ? key : smallest;
        greatest = key > greatest ? key : greatest;
    });
    add_to_request(w, pass, smallest, greatest);
}

// Narrows the interval to one part. By the last block.
__device__ void narrow_interval(const ExpandStep &step, const Workspace &w, Pass &pass) {
    const u64 lowest = fresh(&w.state->lowest), highest = fresh(&w.state->highest);
    const uint32_t above = fresh(&w.state->above), shift = part_shift(lowest, highest);
    find_bin(w, pass, step.width - above, nullptr);
    if (threadIdx.x == 0) {
        const u64 start = lowest + (static_cast<u64>(BINS - 1 - pass.bin) << shift);
        const u64 rest = highest - start, part = (1ull << shift) - 1;
        settle(step, *w.state, start, start + (rest < part ? rest : part), above + pass.above, pass.count);
    }
    __threadfence();
    __syncthreads();
}

// Repeats both by one block until the cut is settled.
__device__ void refine_alone(const ExpandStep &step, const Workspace &w, Pass &pass) {
    while (!fresh(&w.state->settled)) {
        count_parts(step, w, pass, 0, 1);
        __threadfence();
        __syncthreads();
        narrow_interval(step, w, pass);
    }
}

// The rank (`ordered`) of the lowest score whose bin is at most `bin`. A warp asks together.
__device__ __forceinline__ uint32_t first_score_within(float best, uint32_t bin) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t low = LOWEST_SCORE, high = ordered(__float_as_uint(best));  // the answer lies in [low, high]
    while (low < high) {
        const uint32_t stride = (high - low + 31) / 32, probe = low + lane * stride;
        const bool is_below = probe < high && bin_of(best, __uint_as_float(unordered(probe))) > bin;
        const uint32_t probes_below = __popc(__ballot_sync(FULL_WARP, is_below));
        const uint32_t last = low + probes_below * stride;
        high = last < high ? last : high;
        low += probes_below > 0 ? (probes_below - 1) * stride + 1 : 0;
    }
    return low;
}

// Grid: (any, requests). `refinements` launches of expand_refine follow.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    expand_histogram(const ExpandStep *__restrict__ steps, uint32_t refinements) {
    SHARED_ARRAY(Pass, shared, 1);
    Pass &pass = shared[0];
    const ExpandStep &step = steps[blockIdx.y];
    const Workspace w = workspace_of(step);
    const float best = w.state->best;
    u64 smallest = ~0ull, greatest = 0;
    clear_histogram(pass);
    for_each_candidate(step, w, pass.starts, 0, blockIdx.x, gridDim.x, [&](u64 key, uint32_t) {
        atomicAdd(pass.histogram + bin_of(best, score_of(key)), 1u);
        smallest = key < smallest ? key : smallest;
        greatest = key > greatest ? key : greatest;
    });
    add_to_request(w, pass, smallest, greatest);
    if (!is_last_block(w.state, pass)) return;

    const uint32_t total = find_bin(w, pass, step.width, w.bin_starts);
    // The scores of the bin are an interval, because bin_of is monotone: where it begins, and where the bin above begins.
    if (total > step.capacity && threadIdx.x / 32 < 2) {
        const uint32_t warp = threadIdx.x / 32, best_rank = ordered(__float_as_uint(best));
        const uint32_t start = pass.bin < warp ? best_rank + 1 : first_score_within(best, pass.bin - warp);
        if (threadIdx.x % 32 == 0) pass.interval[warp] = start;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ExpandState &state = *w.state;
        state.survivors = total < step.width ? total : step.width;
        if (total <= step.capacity) {
            settle(step, state, 0, ~0ull, 0, total);
        } else {
            const u64 lowest = static_cast<u64>(pass.interval[0]) << 32, above = static_cast<u64>(pass.interval[1]) << 32;
            settle(step, state, lowest, above - 1, pass.above, pass.count);
        }
    }
    __threadfence();
    __syncthreads();
    if (refinements == 0) refine_alone(step, w, pass);
}

// Grid: (any, requests). `refinements` more launches of this follow.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    expand_refine(const ExpandStep *__restrict__ steps, uint32_t refinements) {
    SHARED_ARRAY(Pass, shared, 1);
    Pass &pass = shared[0];
    const ExpandStep &step = steps[blockIdx.y];
    const Workspace w = workspace_of(step);
    if (w.state->settled) return;
    count_parts(step, w, pass, blockIdx.x, gridDim.x);
    if (!is_last_block(w.state, pass)) return;
    narrow_interval(step, w, pass);
    if (refinements == 0) refine_alone(step, w, pass);
}

// Grid: (any, requests).
extern "C" __global__ void __launch_bounds__(THREADS, 3) expand_collect(const ExpandStep *__restrict__ steps) {
    SHARED_ARRAY(Pass, shared, 1);
    Pass &pass = shared[0];
    const ExpandStep &step = steps[blockIdx.y];
    const Workspace w = workspace_of(step);
    const float best = w.state->best;
    for_each_candidate(step, w, pass.starts, w.state->lowest, blockIdx.x, gridDim.x, [&](u64 key, uint32_t beam) {
        const uint32_t bin = bin_of(best, score_of(key));
        const uint32_t place = read_only(w.bin_starts + bin) + atomicAdd(w.bin_filled + bin, 1u);
        w.keys[place] = key;
        w.parents[place] = beam;
    });
}

// Grid: (any, requests), a thread per collected candidate.
extern "C" __global__ void __launch_bounds__(THREADS) expand_finish(const ExpandStep *__restrict__ steps) {
    const ExpandStep &step = steps[blockIdx.y];
    const Workspace w = workspace_of(step);
    const bool failed = *step.failed;
    if (blockIdx.x == 0 && threadIdx.x == 0) *step.to.count = failed ? 0 : w.state->survivors;
    if (failed) return;
    const float best = w.state->best;
    const uint32_t collected = w.state->collected;
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < collected; i += gridDim.x * THREADS) {
        const u64 key = read_only(w.keys + i);
        const uint32_t bin = bin_of(best, score_of(key));
        const uint32_t begin = read_only(w.bin_starts + bin), count = read_only(w.bin_filled + bin);
        uint32_t rank = begin;
#pragma unroll 4
        for (uint32_t other = begin; other < begin + count; ++other) rank += read_only(w.keys + other) > key;
        if (rank >= step.width) continue;
        put_beam(step, rank, key, read_only(w.parents + i));
    }
}

}  // namespace expand
