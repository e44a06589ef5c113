// The candidates of a step: the children of the beams, numbered one after the other, with their scores.
//
// Place in the flow: expand.cu and expand_small.cu go over them, each in its way of selecting the best.
//
// Algorithm. Candidates are enumerated, never stored: a prefix sum over the children of the beams numbers them, blocks take
// tiles of numbers and find the beams of a tile by binary search (Baxter 2013), so a beam with a million children and a
// thousand beams with one child each cost alike.
//
//   score = beam score + (logit - normaliser)    two operations in single precision, each rounded to nearest
//
// Invariants. No candidate is better than its beam: a logit above its normaliser makes the request fail, as does one that is
// not a number (`!(logit - normaliser <= 0)` catches both), or a normaliser that is not finite. A logit of negative infinity
// is a candidate of score negative infinity. Every node above the leaves has children, so a tile meets as many beams as it
// has numbers at most.
//
// What this must not know: how many of them survive.

#pragma once

#include "expand_step.cuh"

namespace expand {

constexpr uint32_t THREADS = 256;  // of every kernel but expand_begin
constexpr uint32_t PER_THREAD = 4;
constexpr uint32_t TILE = THREADS * PER_THREAD;
// Beams that a block normalises together, one per warp; and the most children that one warp sees to.
constexpr uint32_t NORMALIZED_BEAMS = THREADS / 32;
constexpr uint32_t WARP_CHILDREN = 256;

// Exclusive prefix sum over the threads of a block; `total` is the sum, for all of them. Every thread must come.
template <uint32_t BLOCK>
__device__ uint32_t exclusive_sum(uint32_t value, uint32_t *warp_sums, uint32_t &total) {
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

// A load of what other threads wrote during this kernel.
template <class T>
__device__ __forceinline__ T fresh(const T *address) {
    return *static_cast<const volatile T *>(address);
}

// The request yields nothing more.
__device__ __forceinline__ void fail(const ExpandStep &step) { atomicOr(step.failed, 1u); }

// Begins a step: makes up the first beam if asked, numbers the children of all beams, and writes the state of the request. A block
// of BLOCK threads sees to at most SHARE beams per thread; a request with more of them fails. `warp_sums` is scratch.
template <uint32_t BLOCK, uint32_t SHARE>
__device__ __forceinline__ void begin_step(const ExpandStep &step, const Workspace &w, uint32_t *warp_sums) {
    const uint32_t thread = threadIdx.x;
    const bool is_first = step.is_first != 0;
    const uint32_t count = is_first ? 1 : *step.from.count;
    const bool failed = !is_first && *step.failed != 0;
    const bool too_many = count > step.width || count > BLOCK * SHARE;
    const uint32_t beams = failed || too_many ? 0 : count;
    __syncthreads();  // all have read `failed`
    if (is_first && thread == 0) {
        step.from.nodes[0] = step.start_node;
        step.from.scores[0] = 0.0f;
        *step.from.count = 1;
        *step.failed = 0;
    }
    __syncthreads();  // `failed` is cleared before somebody sets it
    if (too_many && thread == 0) fail(step);

    // Neighbouring beams for each thread; all loads before all stores, so that they overlap.
    const uint32_t share = (beams + BLOCK - 1) / BLOCK;
    uint32_t firsts[SHARE], counts[SHARE], children = 0;
#pragma unroll
    for (uint32_t i = 0; i < SHARE; ++i) {
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
    uint32_t start = exclusive_sum<BLOCK>(children, warp_sums, total);
#pragma unroll
    for (uint32_t i = 0; i < SHARE; ++i) {
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

__device__ __forceinline__ bool is_allowed(const ExpandStep &step, const Filter &filter, const Child &child) {
    return step.kind != STEP_LEVEL || allows_any(filter, child.begin, child.end);
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

// Adds the logits of the allowed continuations number `first`, `first + stride`, ... of a beam.
__device__ __forceinline__ void add_allowed(const ExpandStep &step, const Workspace &w, uint32_t beam, uint32_t first,
                                            uint32_t stride, LogSum &log_sum) {
    const uint32_t count = w.child_starts[beam + 1] - w.child_starts[beam], first_child = w.first_children[beam];
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
            if (i + k * stride < count && is_allowed(step, step.normalize_over, children[k])) log_sum.add(logits[k]);
        }
    }
}

__device__ __forceinline__ void merge_lanes(LogSum &log_sum) {
    for (uint32_t distance = 16; distance > 0; distance /= 2) {
        const float max = __shfl_xor_sync(FULL_WARP, log_sum.max, distance);
        const float sum = __shfl_xor_sync(FULL_WARP, log_sum.sum, distance);
        log_sum.merge(max, sum);
    }
}

struct NormalizeScratch {
    float maxima[THREADS / 32], sums[THREADS / 32];
};

// Log-sum-exp over the allowed continuations of each beam, groups of beams `first`, `first + stride`, ... by this block. The order
// of additions depends on the number of children alone. A beam none of whose continuations is allowed gets negative infinity, which
// nobody reads; where one is not finite for another reason, the logit at fault is a candidate that makes the request fail.
__device__ __forceinline__ void normalize_beams(const ExpandStep &step, const Workspace &w, NormalizeScratch &scratch,
                                                uint32_t first, uint32_t stride) {
    const uint32_t beams = w.state->beams;
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (uint32_t base = first * NORMALIZED_BEAMS; base < beams; base += stride * NORMALIZED_BEAMS) {
        const uint32_t own = base + warp;
        if (own < beams && w.child_starts[own + 1] - w.child_starts[own] <= WARP_CHILDREN) {
            LogSum log_sum;
            add_allowed(step, w, own, lane, 32, log_sum);
            merge_lanes(log_sum);
            if (lane == 0) w.normalizers[own] = log_sum.value();
        }
        // Beams with many children: the whole block, one after the other.
        for (uint32_t beam = base; beam < base + NORMALIZED_BEAMS && beam < beams; ++beam) {
            if (w.child_starts[beam + 1] - w.child_starts[beam] <= WARP_CHILDREN) continue;
            LogSum log_sum;
            add_allowed(step, w, beam, threadIdx.x, THREADS, log_sum);
            merge_lanes(log_sum);
            __syncthreads();  // the scratch of the beam before was read
            if (lane == 0) {
                scratch.maxima[warp] = log_sum.max;
                scratch.sums[warp] = log_sum.sum;
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                for (uint32_t other = 1; other < THREADS / 32; ++other) {
                    log_sum.merge(scratch.maxima[other], scratch.sums[other]);
                }
                w.normalizers[beam] = log_sum.value();
            }
        }
    }
}

// The beam that holds child `number`: the last one whose children start there or before. A warp asks together, and all its
// threads get the answer.
__device__ __forceinline__ uint32_t beam_holding(const uint32_t *child_starts, uint32_t beams, uint32_t number) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t first = 0, count = beams;
    while (count > 1) {
        const uint32_t stride = (count + 31) / 32;
        const bool before = lane * stride < count && child_starts[first + lane * stride] <= number;
        // The first probe always holds.
        const uint32_t skipped = (__popc(__ballot_sync(FULL_WARP, before)) - 1) * stride;
        first += skipped;
        count = count - skipped < stride ? count - skipped : stride;
    }
    return first;
}

// Calls `visit(key, beam)` for every allowed candidate with at least the key `lowest` in the tiles `tile`, `tile + stride`,
// ..., once. `starts` is shared memory. All threads of the block must come.
template <class Visit>
__device__ __forceinline__ void for_each_candidate(const ExpandStep &step, const Workspace &w, uint32_t (&starts)[TILE + 1],
                                                   u64 lowest, uint32_t tile, uint32_t stride, Visit visit) {
    const uint32_t beams = w.state->beams, children = w.state->children;
    const float *const normalizers = step.normalizers != nullptr ? step.normalizers : w.normalizers;
    const uint32_t lowest_score = static_cast<uint32_t>(lowest >> 32);
    for (u64 at = static_cast<u64>(tile) * TILE; at < children; at += static_cast<u64>(stride) * TILE) {
        const uint32_t begin = static_cast<uint32_t>(at);
        const uint32_t size = children - begin < TILE ? children - begin : TILE;
        const uint32_t first_beam = beam_holding(w.child_starts, beams, begin);
        const uint32_t tile_beams = beam_holding(w.child_starts, beams, begin + size - 1) - first_beam + 1;
        // Nothing from here on is better than this beam.
        if (ordered(__float_as_uint(step.from.scores[first_beam])) < lowest_score) break;
        __syncthreads();  // the tile before was read
        for (uint32_t i = threadIdx.x; i <= tile_beams; i += THREADS) {
            starts[i] = w.child_starts[first_beam + i];
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
                const bool right = starts[low + half] <= number;
                low += right ? half : 0;
                count = right ? count - half : half;
            }
            parents[k] = first_beam + low;
            nodes[k] = number - starts[low];
        }
#pragma unroll
        for (uint32_t k = 0; k < PER_THREAD; ++k) {
            nodes[k] += w.first_children[parents[k]];
            scores[k] = step.from.scores[parents[k]];
            normalizer[k] = normalizers[parents[k]];
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
            if (!is_allowed(step, step.filter, candidates[k])) continue;
            if (is_number) {
                visit(key, parents[k]);
            } else {
                fail(step);
            }
        }
    }
}

// Writes beam number `rank` of the next step.
__device__ __forceinline__ void put_beam(const ExpandStep &step, uint32_t rank, u64 key, uint32_t parent) {
    const uint32_t node = node_of(key), steps_done = step.steps_done;
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

}  // namespace expand
