// Which leaves of the catalog a request allows: the device's view of `beamline_catalog::Filter`.
//
// Place in the flow: `expand.cu` asks for every candidate child whether its interval of leaves holds an allowed leaf.
// The arrays are those of the catalog crate (`index_set.rs`, `rank_bits.rs`), copied to device memory as they are.
//
// Invariants: lists are sorted and without repetitions; every removed leaf is in the base set; bits past the last leaf are
// zero; intervals are never empty and end at the number of leaves or before.
//
// What this must not know: beams, scores, tokens.

#pragma once

#include "common.cuh"

typedef unsigned long long u64;

// `Filter::kind`.
enum FilterKind : uint32_t {
    FILTER_ALL = 0,   // every leaf but the listed ones (an empty list allows everything)
    FILTER_BITS = 1,  // leaves whose bit is set, but the listed ones
    FILTER_LIST = 2,  // the listed leaves
};

struct Filter {
    const u64 *words;       // one bit per leaf; only for FILTER_BITS
    const uint32_t *ranks;  // set bits before each block of 512 bits, and at last all of them; only for FILTER_BITS
    const uint32_t *list;   // leaves taken out of the base set, or, for FILTER_LIST, the allowed leaves
    uint32_t list_length;
    uint32_t kind;
};

// A load from memory that nobody writes while the kernel runs.
template <class T>
__device__ __forceinline__ T read_only(const T *address) {
#ifdef __CUDA_ARCH__
    return __ldg(address);
#else
    return *address;
#endif
}

// How many entries of a sorted list are less than `value`.
__device__ __forceinline__ uint32_t entries_below(const uint32_t *list, uint32_t length, uint32_t value) {
    uint32_t first = 0;
    while (length > 0) {
        const uint32_t half = length / 2;
        if (read_only(list + first + half) < value) {
            first += half + 1;
            length -= half + 1;
        } else {
            length = half;
        }
    }
    return first;
}

// Set bits before bit `i`, which is at most the number of leaves.
__device__ __forceinline__ uint32_t rank_of(const Filter &filter, uint32_t i) {
    const uint32_t word = i / 64;
    uint32_t rank = read_only(filter.ranks + word / 8);
    for (uint32_t w = word / 8 * 8; w < word; ++w) rank += __popcll(read_only(filter.words + w));
    // The word past the last one does not exist.
    if (i % 64 != 0) rank += __popcll(read_only(filter.words + word) & ((1ull << (i % 64)) - 1));
    return rank;
}

// Whether the interval [begin, end) of leaves, not empty, holds an allowed leaf. Constant time, plus
// binary searches of the filter's list: one where it holds allowed leaves, up to two where it holds
// removals.
__device__ __forceinline__ bool allows_any(const Filter &filter, uint32_t begin, uint32_t end) {
    if (filter.kind == FILTER_LIST) {
        const uint32_t at = entries_below(filter.list, filter.list_length, begin);
        return at < filter.list_length && read_only(filter.list + at) < end;
    }
    const auto removed = [&] {
        const uint32_t first = entries_below(filter.list, filter.list_length, begin);
        // Lists are short and intervals narrow, so mostly there is nothing to count.
        if (first == filter.list_length || read_only(filter.list + first) >= end) return 0u;
        return entries_below(filter.list + first, filter.list_length - first, end);
    };
    if (filter.kind == FILTER_ALL) {
        // More leaves than removals: no need to look for them.
        return end - begin > filter.list_length || end - begin > removed();
    }
    const uint32_t first = begin / 64, last = (end - 1) / 64;
    const u64 head = read_only(filter.words + first) >> (begin % 64) << (begin % 64);
    if (first == last) {
        // Most nodes of a deep level own a few leaves: one word answers.
        const u64 bits = end % 64 == 0 ? head : head & ((1ull << (end % 64)) - 1);
        return bits != 0 && (filter.list_length == 0 || static_cast<uint32_t>(__popcll(bits)) > removed());
    }
    if (filter.list_length == 0 && head != 0) return true;
    const uint32_t count = rank_of(filter, end) - rank_of(filter, begin);
    return count > 0 && (filter.list_length == 0 || count > removed());
}
