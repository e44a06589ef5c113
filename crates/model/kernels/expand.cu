// One step of exact constrained beam search, for many requests at once, without the host in between.
//
// Purpose. Every beam continues by those children of its trie node below which the filter allows a leaf; the best `width`
// continuations of all beams become the next beams, best first, equal scores by the smaller node (path order): the
// semantics of `decode.rs`. How many beams are alive and how many children they have is known on the device only.
//
//   score = beam score + (logit - normaliser)    two operations in single precision, each rounded to nearest
//
// Algorithm. Candidates are enumerated, never stored: a prefix sum over the children of the beams numbers them, blocks
// take tiles of numbers and find the beams of a tile by binary search, so a beam with a million children and a thousand
// beams with one child each cost alike. There is no table over products of codebooks and nothing is padded to the hottest
// beam. The cut is a selection by histogram, each pass computing the candidates anew:
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
// buckets is sample sort with the histogram's bins as splitters. Load balancing by prefix sum and search: Baxter (2013).
//
// Invariants. No candidate is better than its beam: a logit above its normaliser is a failure, as is one that is not a
// number, or a normaliser that is not finite (all of them are caught by `!(logit - normaliser <= 0)` and a check per
// beam). A logit of negative infinity is a candidate of score negative infinity. Beams come best first, hence tiles whose
// first beam is below the cut end a pass. The result depends on the request alone: neither on the grid nor on the order in
// which blocks run.
//
// A request that has failed yields no beams, here and in all later steps, until a step that `is_first`.
//
// Workspace: expand_workspace_bytes(width, capacity) per request, whatever the number of candidates.

#include "expand_step.cuh"

namespace expand {

constexpr uint32_t THREADS = 256;  // of every kernel but expand_begin
constexpr uint32_t BEGIN_THREADS = 1024;
constexpr uint32_t BEAMS_PER_THREAD = MOST_BEAMS / BEGIN_THREADS;
constexpr uint32_t PER_THREAD = 4;
constexpr uint32_t TILE = THREADS * PER_THREAD;
// Beams of a block of expand_normalize, one per warp; and the most children that one warp sees to.
constexpr uint32_t NORMALIZED_BEAMS = THREADS / 32;
constexpr uint32_t WARP_CHILDREN = 256;

// Exclusive prefix sum over the threads of a block; `total` is the sum, for all of them. Every thread must come.
template <uint32_t BLOCK> __device__ uint32_t exclusive_sum(uint32_t value, uint32_t *warp_sums, uint32_t &total) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t inclusive = value;
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        const uint32_t other = __shfl_up_sync(FULL_WARP, inclusive, distance);
        if (lane >= distance) inclusive += other;
    }
    __syncthreads();  // the sums of the call before were read
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    uint32_t before = 0;
    total = 0;
    for (uint32_t w = 0; w < BLOCK / 32; ++w) {
        const uint32_t sum = warp_sums[w];
        before += w < warp ? sum : 0;
        total += sum;
    }
    return before + inclusive - value;
}

__device__ __forceinline__ bool is_finite(float x) { return x - x == 0.0f; }

// The request yields nothing more.
__device__ __forceinline__ void fail(const ExpandStep &step) { atomicOr(step.failed, 1u); }

extern "C" __global__ void __launch_bounds__(BEGIN_THREADS) expand_begin(const ExpandStep *__restrict__ steps) {
    SHARED_ARRAY(uint32_t, warp_sums, BEGIN_THREADS / 32);
    const ExpandStep &step = steps[blockIdx.x];
    const Workspace w = workspace_of(step);
    const uint32_t thread = threadIdx.x;
    const bool is_first = step.is_first != 0;
    const uint32_t count = is_first ? 1 : *step.from.count;
    const bool failed = !is_first && *step.failed != 0;
    const uint32_t beams = failed ? 0 : count < step.width ? count : step.width;
    for (uint32_t bin = thread; bin < BINS; bin += BEGIN_THREADS) w.histogram[bin] = w.bin_filled[bin] = 0;
    __syncthreads();  // all have read `failed`
    if (is_first && thread == 0) {
        step.from.nodes[0] = step.start_node;
        step.from.scores[0] = 0.0f;
        *step.from.count = 1;
        *step.failed = 0;
    }
    __syncthreads();  // `failed` is cleared before somebody sets it

    // Neighbouring beams for each thread; all loads before all stores, so that they overlap.
    const uint32_t share = (beams + BEGIN_THREADS - 1) / BEGIN_THREADS;
    uint32_t firsts[BEAMS_PER_THREAD], counts[BEAMS_PER_THREAD], children = 0;
#pragma unroll
    for (uint32_t i = 0; i < BEAMS_PER_THREAD; ++i) {
        const uint32_t beam = thread * share + i;
        firsts[i] = counts[i] = 0;
        if (i >= share || beam >= beams) continue;
        const uint32_t node = is_first ? step.start_node : read_only(step.from.nodes + beam);
        firsts[i] = node;
        counts[i] = 1;
        if (step.kind == STEP_LEVEL && step.children != nullptr) {
            firsts[i] = read_only(step.children + node);
            counts[i] = read_only(step.children + node + 1) - firsts[i];
        }
        children += counts[i];
        if (step.normalizers != nullptr && !is_finite(read_only(step.normalizers + beam))) fail(step);
    }
    uint32_t total;
    uint32_t start = exclusive_sum<BEGIN_THREADS>(children, warp_sums, total);
#pragma unroll
    for (uint32_t i = 0; i < BEAMS_PER_THREAD; ++i) {
        const uint32_t beam = thread * share + i;
        if (i >= share || beam >= beams) continue;
        w.first_children[beam] = firsts[i];
        w.child_starts[beam] = start;
        start += counts[i];
    }
    if (thread == 0) {
        w.child_starts[beams] = total;
        ExpandState state = {};
        state.smallest_seen = ~0ull;
        state.children = total;
        state.beams = beams;
        state.best = beams > 0 && !is_first ? read_only(step.from.scores) : 0.0f;
        *w.state = state;
    }
}

// A candidate without its score: where its logit comes from, and the leaves it leads to.
struct Child {
    uint32_t token;
    uint32_t begin, end;
};

// Loads only, and no question about what was loaded: so that the loads of several children overlap.
__device__ __forceinline__ Child child_at(const ExpandStep &step, uint32_t node) {
    const bool is_level = step.kind == STEP_LEVEL, has_offsets = is_level && step.leaves != nullptr;
    Child child = {step.fixed_token, node, node + 1};
    if (is_level) child.token = read_only(step.symbols + node);
    if (has_offsets) child.begin = read_only(step.leaves + node);
    if (has_offsets) child.end = read_only(step.leaves + node + 1);
    return child;
}

__device__ __forceinline__ bool is_allowed(const ExpandStep &step, const Child &child) {
    return step.kind != STEP_LEVEL || allows_any(step.filter, child.begin, child.end);
}

__device__ __forceinline__ float logit_of(const ExpandStep &step, uint32_t beam, uint32_t token) {
    return read_only(step.logits + static_cast<u64>(beam) * step.logits_stride + (token - step.first_token));
}

// log(sum of e^x) over values met one after the other: `sum` is relative to `max` and at least 1 once there is a finite
// value. Values of negative infinity add nothing; one that is not a number makes the sum not a number.
struct LogSum {
    float max = negative_infinity();
    float sum = 0.0f;

    __device__ __forceinline__ void add(float x) {
        if (x > max) {
            sum = sum * expf(max - x) + 1.0f;
            max = x;
        } else if (x != negative_infinity()) {
            sum += expf(x - max);
        }
    }

    __device__ __forceinline__ void merge(float other_max, float other_sum) {
        const float larger = other_max > max ? other_max : max;
        if (larger == negative_infinity()) {
            sum += other_sum;  // zeros, or not a number
        } else {
            sum = sum * expf(max - larger) + other_sum * expf(other_max - larger);
        }
        max = larger;
    }

    __device__ __forceinline__ float value() const { return max + logf(sum); }
};

// Adds the logits of the allowed continuations number `first`, `first + stride`, ... of a beam. Says whether there are any.
__device__ __forceinline__ bool add_allowed(const ExpandStep &step, const Workspace &w, uint32_t beam, uint32_t first,
                                            uint32_t stride, LogSum &log_sum) {
    const uint32_t count = w.child_starts[beam + 1] - w.child_starts[beam], first_child = w.first_children[beam];
    bool any = false;
    for (uint32_t i = first; i < count; i += PER_THREAD * stride) {
        // Several at a time, so that their loads overlap; past the end the first one stands in.
        Child children[PER_THREAD];
        float logits[PER_THREAD];
#pragma unroll
        for (uint32_t k = 0; k < PER_THREAD; ++k) {
            const uint32_t number = i + k * stride;
            children[k] = child_at(step, first_child + (number < count ? number : i));
        }
#pragma unroll
        for (uint32_t k = 0; k < PER_THREAD; ++k) logits[k] = logit_of(step, beam, children[k].token);
#pragma unroll
        for (uint32_t k = 0; k < PER_THREAD; ++k) {
            if (i + k * stride < count && is_allowed(step, children[k])) {
                log_sum.add(logits[k]);
                any = true;
            }
        }
    }
    return any;
}

__device__ __forceinline__ void merge_lanes(LogSum &log_sum) {
    for (uint32_t distance = 16; distance > 0; distance /= 2) {
        const float max = __shfl_xor_sync(FULL_WARP, log_sum.max, distance);
        const float sum = __shfl_xor_sync(FULL_WARP, log_sum.sum, distance);
        log_sum.merge(max, sum);
    }
}

// Grid: (any, requests). The order of additions depends on the number of children alone.
extern "C" __global__ void __launch_bounds__(THREADS, 3) expand_normalize(const ExpandStep *__restrict__ steps) {
    SHARED_ARRAY(float, warp_maxima, THREADS / 32);
    SHARED_ARRAY(float, warp_sums, THREADS / 32);
    const ExpandStep &step = steps[blockIdx.y];
    if (step.normalizers != nullptr) return;
    const Workspace w = workspace_of(step);
    const uint32_t beams = w.state->beams;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // A beam none of whose continuations is allowed has no use for a normaliser, so it does not fail for want of one.
    const auto put = [&](uint32_t beam, const LogSum &log_sum, bool any) {
        const float normalizer = log_sum.value();
        w.normalizers[beam] = normalizer;
        if (any && !is_finite(normalizer)) fail(step);
    };
    for (uint32_t base = blockIdx.x * NORMALIZED_BEAMS; base < beams; base += gridDim.x * NORMALIZED_BEAMS) {
        const uint32_t own = base + warp;
        if (own < beams && w.child_starts[own + 1] - w.child_starts[own] <= WARP_CHILDREN) {
            LogSum log_sum;
            const bool any = __any_sync(FULL_WARP, add_allowed(step, w, own, lane, 32, log_sum));
            merge_lanes(log_sum);
            if (lane == 0) put(own, log_sum, any);
        }
        // Beams with many children: the whole block, one after the other.
        for (uint32_t beam = base; beam < base + NORMALIZED_BEAMS && beam < beams; ++beam) {
            if (w.child_starts[beam + 1] - w.child_starts[beam] <= WARP_CHILDREN) continue;
            LogSum log_sum;
            const bool any = __syncthreads_or(add_allowed(step, w, beam, threadIdx.x, THREADS, log_sum));
            merge_lanes(log_sum);
            if (lane == 0) {
                warp_maxima[warp] = log_sum.max;
                warp_sums[warp] = log_sum.sum;
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                for (uint32_t other = 1; other < THREADS / 32; ++other) {
                    log_sum.merge(warp_maxima[other], warp_sums[other]);
                }
                put(beam, log_sum, any);
            }
            // The barrier of the next beam's __syncthreads_or keeps its sums from overwriting these too early.
        }
    }
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

// The beam that holds child `number`: the last one whose children start there or before. A warp asks together, and all its
// threads get the answer.
__device__ __forceinline__ uint32_t beam_holding(const uint32_t *child_starts, uint32_t beams, uint32_t number) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t first = 0, count = beams;
    while (count > 1) {
        const uint32_t stride = (count + 31) / 32;
        const bool before = lane * stride < count && read_only(child_starts + first + lane * stride) <= number;
        // The first probe always holds.
        const uint32_t skipped = (__popc(__ballot_sync(FULL_WARP, before)) - 1) * stride;
        first += skipped;
        count = count - skipped < stride ? count - skipped : stride;
    }
    return first;
}

// Calls `visit(key, beam)` for every allowed candidate with at least the key `lowest` in the tiles `tile`, `tile + stride`,
// ..., once. All threads of the block must come.
template <class Visit>
__device__ __forceinline__ void for_each_candidate(const ExpandStep &step, const Workspace &w, Pass &pass, u64 lowest,
                                                   uint32_t tile, uint32_t stride, Visit visit) {
    const uint32_t beams = w.state->beams, children = w.state->children;
    const float *const normalizers = step.normalizers != nullptr ? step.normalizers : w.normalizers;
    const uint32_t lowest_score = static_cast<uint32_t>(lowest >> 32);
    for (u64 at = static_cast<u64>(tile) * TILE; at < children; at += static_cast<u64>(stride) * TILE) {
        const uint32_t begin = static_cast<uint32_t>(at);
        const uint32_t size = children - begin < TILE ? children - begin : TILE;
        const uint32_t first_beam = beam_holding(w.child_starts, beams, begin);
        const uint32_t tile_beams = beam_holding(w.child_starts, beams, begin + size - 1) - first_beam + 1;
        // Nothing from here on is better than this beam.
        if (ordered(__float_as_uint(read_only(step.from.scores + first_beam))) < lowest_score) break;
        __syncthreads();  // the tile before was read
        for (uint32_t i = threadIdx.x; i <= tile_beams; i += THREADS) {
            pass.starts[i] = read_only(w.child_starts + first_beam + i);
        }
        __syncthreads();
        // Stage by stage for all candidates of a thread, so that their loads overlap.
        uint32_t parents[PER_THREAD], nodes[PER_THREAD];
        Child candidates[PER_THREAD];
        float logits[PER_THREAD], normalizer[PER_THREAD], scores[PER_THREAD];
#pragma unroll
        for (uint32_t k = 0; k < PER_THREAD; ++k) {
            // Threads past the end compute the last candidate once more and forget it.
            const uint32_t i = k * THREADS + threadIdx.x, number = begin + (i < size ? i : size - 1);
            uint32_t low = 0, count = tile_beams;
            while (count > 1) {
                const uint32_t half = count / 2;
                const bool right = pass.starts[low + half] <= number;
                low += right ? half : 0;
                count = right ? count - half : half;
            }
            parents[k] = first_beam + low;
            nodes[k] = number - pass.starts[low];
        }
#pragma unroll
        for (uint32_t k = 0; k < PER_THREAD; ++k) {
            nodes[k] += read_only(w.first_children + parents[k]);
            scores[k] = read_only(step.from.scores + parents[k]);
            normalizer[k] = read_only(normalizers + parents[k]);
        }
#pragma unroll
        for (uint32_t k = 0; k < PER_THREAD; ++k) candidates[k] = child_at(step, nodes[k]);
#pragma unroll
        for (uint32_t k = 0; k < PER_THREAD; ++k) logits[k] = logit_of(step, parents[k], candidates[k].token);
#pragma unroll
        for (uint32_t k = 0; k < PER_THREAD; ++k) {
            const float log_probability = __fsub_rn(logits[k], normalizer[k]);
            const u64 key = key_of(__fadd_rn(scores[k], log_probability), nodes[k]);
            const bool is_number = log_probability <= 0.0f;
            // The filter last: it may cost a search, and what is below the cut need not ask it.
            if (k * THREADS + threadIdx.x >= size || (is_number && key < lowest)) continue;
            if (!is_allowed(step, candidates[k])) continue;
            if (is_number) {
                visit(key, parents[k]);
            } else {
                fail(step);
            }
        }
    }
}

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

// A load of what other blocks wrote during this kernel.
template <class T> __device__ __forceinline__ T fresh(const T *address) {
    return *static_cast<const volatile T *>(address);
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
    for_each_candidate(step, w, pass, lowest, tile, stride, [&](u64 key, uint32_t) {
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
    for_each_candidate(step, w, pass, 0, blockIdx.x, gridDim.x, [&](u64 key, uint32_t) {
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
    for_each_candidate(step, w, pass, w.state->lowest, blockIdx.x, gridDim.x, [&](u64 key, uint32_t beam) {
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
    const uint32_t collected = w.state->collected, steps_done = step.steps_done;
    for (uint32_t i = blockIdx.x * THREADS + threadIdx.x; i < collected; i += gridDim.x * THREADS) {
        const u64 key = read_only(w.keys + i);
        const uint32_t bin = bin_of(best, score_of(key));
        const uint32_t begin = read_only(w.bin_starts + bin), count = read_only(w.bin_filled + bin);
        uint32_t rank = begin;
#pragma unroll 4
        for (uint32_t other = begin; other < begin + count; ++other) rank += read_only(w.keys + other) > key;
        if (rank >= step.width) continue;
        const uint32_t parent = read_only(w.parents + i), node = node_of(key);
        step.to.nodes[rank] = node;
        step.to.tokens[rank] = step.kind == STEP_LEVEL ? read_only(step.symbols + node) : step.fixed_token;
        step.to.scores[rank] = score_of(key);
        if (step.to.parents != nullptr) step.to.parents[rank] = parent;
        if (step.to.lineage != nullptr) {
            // Row `step * width + place` of the branch pages holds what the beam at that place has computed in that step.
            uint32_t *const lineage = step.to.lineage + static_cast<u64>(rank) * (steps_done + 1);
            const uint32_t *const old = step.from.lineage + static_cast<u64>(parent) * steps_done;
            for (uint32_t s = 0; s < steps_done; ++s) lineage[s] = read_only(old + s);
            lineage[steps_done] = steps_done * step.width + rank;
        }
    }
}

}  // namespace expand
