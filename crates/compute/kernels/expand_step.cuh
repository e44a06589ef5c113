// What one step of a constrained beam search reads, writes and keeps: the descriptor that the host fills, the workspace
// that the kernels of `expand.cu` share, and the order of candidates.
//
// All addresses are device addresses. Structures have the layout of `repr(C)` on a 64-bit host; sizes are checked below.
//
// What this must not know: how logits are computed, pages, attention.

#pragma once

#include "catalog.cuh"

// The beams of one request, best first, each array `width` long unless said otherwise. Nodes are pairwise different.
struct Beams {
    uint32_t *nodes;    // index within the level of the trie
    uint32_t *tokens;   // last token; not read by an expansion
    float *scores;      // sum of log-probabilities
    uint32_t *parents;  // place in the beam of the step before; written only, may be null
    uint32_t *lineage;  // [width][entries] rows of the request's branch pages, own row last; may be null in the last step
    uint32_t *count;    // one value: beams alive
};

enum StepKind : uint32_t {
    STEP_LEVEL = 0,  // the next level of the SID: a beam continues by the allowed children of its node
    STEP_FIXED = 1,  // every beam continues by one token and stays at its node; the filter is not asked
};

// One request's step. Read only on the device.
struct ExpandStep {
    // The trie below the level of the beams. Node n of that level has the children children[n]..children[n + 1] in the
    // next level, whose node c has the token symbols[c], ascending within a parent, and owns the leaves
    // leaves[c]..leaves[c + 1].
    const uint32_t *children;  // null: node n has the one child n
    const uint32_t *symbols;
    const uint32_t *leaves;  // null: node c owns the one leaf c
    Filter filter;
    // Without `normalizers`: the leaves that continuations are normalised over, those of `filter` and perhaps more.
    Filter normalize_over;
    // The logit of token t for beam b is logits[b * logits_stride + t - first_token].
    const float *logits;
    // Log-sum-exp of all logits of each beam, none of which exceeds it; null: over the allowed continuations only.
    const float *normalizers;
    u64 logits_stride;
    Beams from;
    Beams to;                  // other memory than `from`
    uint32_t *failed;          // one value; set when a logit is not a number, or a normaliser not finite; stays set
    unsigned char *workspace;  // expand_workspace_bytes(width, capacity), 16-byte aligned, need not be initialised
    uint32_t first_token;
    uint32_t kind;  // StepKind
    uint32_t fixed_token;
    uint32_t width;     // most beams, 1 to MOST_BEAMS
    uint32_t capacity;  // candidates kept for the last selection, at least `width`
    uint32_t is_first;  // not 0: `from` is made up here, as one beam of score 0 at `start_node`, and `failed` is cleared
    uint32_t start_node;
    uint32_t steps_done;  // steps before this one; `from.lineage` has as many entries per beam, `to.lineage` one more
};

static_assert(sizeof(u64) == 8 && sizeof(void *) == 8, "addresses and u64 are 64 bits wide");
static_assert(sizeof(Filter) == 32 && sizeof(Beams) == 48 && sizeof(ExpandStep) == 256, "the host builds these");

constexpr uint32_t MOST_BEAMS = 8192;
// Bins of a histogram.
constexpr uint32_t BINS = 2048;

// What the blocks of one request agree on.
struct ExpandState {
    u64 lowest;   // once settled: candidates with at least this key are collected. Before: the start of an interval of
                  // keys that holds the last survivor
    u64 highest;  // before: the end of that interval, itself included
    u64 smallest_seen, greatest_seen;  // of the keys in the interval (of all keys, at first) that the current pass met
    uint32_t children;                 // candidates before the filter
    uint32_t above;                    // candidates above the interval
    uint32_t collected;                // once settled: how many are collected, at most `capacity`
    uint32_t survivors;                // once settled: beams of the next step, at most `width`
    uint32_t settled;
    uint32_t beams;     // alive when the step began; 0 if the request has failed
    uint32_t finished;  // blocks done with the current pass
    float best;         // score of the best beam, which no candidate exceeds
};

struct Workspace {
    ExpandState *state;
    uint32_t *histogram;       // [BINS]
    uint32_t *bin_starts;      // [BINS] candidates in better bins
    uint32_t *bin_filled;      // [BINS] candidates collected
    uint32_t *child_starts;    // [width + 1] children of the beams before
    uint32_t *first_children;  // [width] node of the first one
    float *normalizers;        // [width] over the allowed continuations
    uint32_t *parents;         // [capacity] of the collected candidates
    u64 *keys;                 // [capacity] bin by bin
};

__host__ __device__ inline u64 round_up_16(u64 bytes) { return (bytes + 15) / 16 * 16; }

// Bytes of the workspace of one request.
__host__ __device__ inline u64 expand_workspace_bytes(uint32_t width, uint32_t capacity) {
    return round_up_16(sizeof(ExpandState)) + 3 * BINS * 4ull + round_up_16((width + 1) * 4ull) + 2 * round_up_16(width * 4ull) +
           round_up_16(capacity * 4ull) + round_up_16(capacity * 8ull);
}

__device__ inline Workspace workspace_of(const ExpandStep &step) {
    unsigned char *next = step.workspace;
    const auto take = [&](u64 bytes) {
        unsigned char *taken = next;
        next += round_up_16(bytes);
        return taken;
    };
    Workspace w;
    w.state = reinterpret_cast<ExpandState *>(take(sizeof(ExpandState)));
    w.histogram = reinterpret_cast<uint32_t *>(take(BINS * 4ull));
    w.bin_starts = reinterpret_cast<uint32_t *>(take(BINS * 4ull));
    w.bin_filled = reinterpret_cast<uint32_t *>(take(BINS * 4ull));
    w.child_starts = reinterpret_cast<uint32_t *>(take((step.width + 1) * 4ull));
    w.first_children = reinterpret_cast<uint32_t *>(take(step.width * 4ull));
    w.normalizers = reinterpret_cast<float *>(take(step.width * 4ull));
    w.parents = reinterpret_cast<uint32_t *>(take(step.capacity * 4ull));
    w.keys = reinterpret_cast<u64 *>(take(step.capacity * 8ull));
    return w;
}

// Scores as integers of the same order; -0 comes before +0.
__host__ __device__ inline uint32_t ordered(uint32_t bits) { return bits & 0x80000000u ? ~bits : bits | 0x80000000u; }
__host__ __device__ inline uint32_t unordered(uint32_t rank) { return rank & 0x80000000u ? rank & 0x7fffffffu : ~rank; }

// Rank of negative infinity. Every score is at least that.
constexpr uint32_t LOWEST_SCORE = 0x007fffffu;

// The order of candidates as one number, greater is better: first the score, then the smaller node, which is the smaller
// path because the nodes of a level are numbered in the order of their paths. No two candidates of a step are equal.
__device__ __forceinline__ u64 key_of(float score, uint32_t node) {
    return static_cast<u64>(ordered(__float_as_uint(score))) << 32 | static_cast<uint32_t>(~node);
}

__device__ __forceinline__ float score_of(u64 key) { return __uint_as_float(unordered(static_cast<uint32_t>(key >> 32))); }

__device__ __forceinline__ uint32_t node_of(u64 key) { return ~static_cast<uint32_t>(key); }

// The bin of a score, better scores first. With d nats below the best beam, bins are the leading bits of d + 16: 1/32 nat
// wide up to d = 16, 1/16 up to 48, 1/8 up to 112, 1/4 up to 240; the last bin holds whatever is further off. Monotone,
// because every operation rounds monotonically.
__device__ __forceinline__ uint32_t bin_of(float best, float score) {
    if (score == negative_infinity()) return BINS - 1;
    const float shifted = __fadd_rn(__fsub_rn(best, score), 16.0f);
    const uint32_t bin = (__float_as_uint(shifted) - 0x41800000u) >> 14;
    return bin < BINS ? bin : BINS - 1;
}
