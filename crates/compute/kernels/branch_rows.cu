// The rows of a branch step, from the beams that an expansion left on the device.
//
// Place in the flow: the host lays out a step without knowing how many beams are alive, so it reserves as many rows as the
// beam is wide. This kernel fills them in before the forward pass; afterwards `expand.cu` takes the beams a step further.
//
//   tokens, positions, slots  [rows of the step]        what embed.cu and rotary_store.cu read
//   lineage                   [rows of the request][entries] for each request, from its `first_lineage` on: slots (page * 32 +
//                             offset) of the rows that a beam consists of, oldest first, its own last; what branch_attention.cu
//                             reads
//
// Invariants. Row i of a request is beam i. A row beyond the beams alive is dead: it repeats row 0, with a slot of -1, so
// that nothing is stored for it. It costs work, but reads only what is there and changes nothing. Row 0 is never dead: where
// no beam is alive it has token 0 and a lineage of first places, which were stored in every step; so nothing that was never
// written is read.
//
// What this must not know: scores, the trie.

#include "common.cuh"

typedef unsigned long long u64;

struct BranchRows {
    const uint32_t *tokens;        // [width] of the beams
    const uint32_t *lineage;       // [width][entries] of the beams: branch rows, numbered step * width + place
    const uint32_t *count;         // one value: beams alive
    const uint32_t *branch_pages;  // page numbers of the request's branch rows, 32 rows each
    uint32_t width;                // rows reserved
    uint32_t entries;              // steps done: branch rows that a beam consists of, its own included; at least 1
    uint32_t context_length;       // the rows stand at position context_length + entries - 1
    uint32_t first_row;            // of the step
    u64 first_lineage;             // where the request's part of the step's lineage begins
};

static_assert(sizeof(BranchRows) == 56, "the host builds these");

constexpr uint32_t ROWS_PER_BLOCK = 128;

// Grid: (width of the widest request / 128 rounded up, requests), blocks of 128 threads.
extern "C" __global__ void __launch_bounds__(ROWS_PER_BLOCK)
    branch_rows(const BranchRows *__restrict__ requests, uint32_t *__restrict__ tokens, uint32_t *__restrict__ positions,
                int32_t *__restrict__ slots, int32_t *__restrict__ lineage) {
    const BranchRows &request = requests[blockIdx.y];
    const uint32_t row = blockIdx.x * ROWS_PER_BLOCK + threadIdx.x;
    if (row >= request.width) return;
    const uint32_t alive = *request.count, entries = request.entries, own = (entries - 1) * request.width + row;
    const auto slot_of = [&](uint32_t branch_row) {
        return static_cast<int32_t>(request.branch_pages[branch_row / PAGE] * PAGE + branch_row % PAGE);
    };
    const uint32_t beam = row < alive ? row : 0;
    const uint32_t place = request.first_row + row;
    tokens[place] = alive > 0 ? request.tokens[beam] : 0;
    positions[place] = request.context_length + entries - 1;
    slots[place] = row == beam ? slot_of(own) : -1;
    int32_t *const out = lineage + request.first_lineage + static_cast<u64>(row) * entries;
    for (uint32_t s = 0; s < entries; ++s) {
        out[s] = slot_of(alive > 0 ? request.lineage[static_cast<u64>(beam) * entries + s] : s * request.width);
    }
}
