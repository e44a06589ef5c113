// The step of expand.cu in one launch, for requests that have few candidates whatever their beams are.
//
// Place in the flow: instead of the launches of expand.cu, with the same descriptors and the same result, where the host knows
// a bound: the step has at most 2048 children before the filter, for instance because every beam continues by one token, or
// because the nodes of a deep level have few children each. One block per request.
//
// Algorithm: the candidates (candidates.cuh) go into shared memory and are sorted there by a bitonic network (Batcher 1968).
//
// Invariant: a request with more than 2048 children, or beams, fails; it is never cut short.

#include "candidates.cuh"

namespace expand {

constexpr uint32_t MOST_CANDIDATES = 2048;

struct Small {
    u64 keys[MOST_CANDIDATES];
    uint32_t parents[MOST_CANDIDATES];
    uint32_t starts[TILE + 1];
    uint32_t warp_sums[THREADS / 32];
    NormalizeScratch normalize;
    uint32_t count;
};

// Sorts `size` entries, a power of two, greatest key first.
__device__ __forceinline__ void sort_descending(Small &small, uint32_t size) {
    for (uint32_t run = 2; run <= size; run *= 2) {
        for (uint32_t distance = run / 2; distance > 0; distance /= 2) {
            __syncthreads();
            for (uint32_t pair = threadIdx.x; pair < size / 2; pair += THREADS) {
                const uint32_t first = pair / distance * 2 * distance + pair % distance, second = first + distance;
                const u64 a = small.keys[first], b = small.keys[second];
                // Every other run is sorted the other way, so that two of them rise and fall.
                if (((first & run) == 0) != (a < b)) continue;
                small.keys[first] = b, small.keys[second] = a;
                const uint32_t parent = small.parents[first];
                small.parents[first] = small.parents[second], small.parents[second] = parent;
            }
        }
    }
    __syncthreads();
}

// Grid: requests, blocks of 256 threads.
extern "C" __global__ void __launch_bounds__(THREADS, 3) expand_small(const ExpandStep *__restrict__ steps) {
    SHARED_ARRAY(Small, shared, 1);
    Small &small = shared[0];
    const ExpandStep &step = steps[blockIdx.x];
    const Workspace w = workspace_of(step);
    if (threadIdx.x == 0) small.count = 0;
    begin_step<THREADS, MOST_CANDIDATES / THREADS>(step, w, small.warp_sums);
    __syncthreads();
    if (w.state->children <= MOST_CANDIDATES) {
        if (step.normalizers == nullptr) {
            normalize_beams(step, w, small.normalize, 0, 1);
            __syncthreads();
        }
        for_each_candidate(step, w, small.starts, 0, 0, 1, [&](u64 key, uint32_t beam) {
            const uint32_t place = atomicAdd(&small.count, 1u);
            small.keys[place] = key;
            small.parents[place] = beam;
        });
    } else if (threadIdx.x == 0) {
        fail(step);
    }
    __threadfence();
    __syncthreads();
    const uint32_t count = small.count, survivors = fresh(step.failed) ? 0 : count < step.width ? count : step.width;
    if (threadIdx.x == 0) *step.to.count = survivors;
    uint32_t size = 1;
    while (size < count) size *= 2;
    // Less than any key.
    for (uint32_t i = count + threadIdx.x; i < size; i += THREADS) small.keys[i] = 0;
    sort_descending(small, size);
    for (uint32_t i = threadIdx.x; i < survivors; i += THREADS) put_beam(step, i, small.keys[i], small.parents[i]);
}

}  // namespace expand
