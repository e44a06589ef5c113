// The emulation itself: what it computes, and that it finds what it promises to find.
//
// Prints "emulation: passed" and returns 0, or says what is wrong and returns 1.
#include "../common.cuh"

#include <functional>

namespace {

int failures = 0;

void check(bool condition, const char *what) {
    if (!condition) {
        std::printf("emulation: %s\n", what);
        failures += 1;
    }
}

// Whether a launch fails with a message that holds `word`.
void check_fails(const char *word, const std::function<void()> &launch) {
    try {
        launch();
        std::printf("emulation: nothing was found, expected '%s'\n", word);
        failures += 1;
    } catch (const emulation::Error &error) {
        if (!std::strstr(error.what(), word)) {
            std::printf("emulation: '%s' does not speak of '%s'\n", error.what(), word);
            failures += 1;
        }
    }
}

const emulation::Geometry one_warp{1, 32, 1024};

// Sum of a block by shuffles, shared memory and an atomic over the grid.
void sum_kernel(const float *values, float *total, int count) {
    SHARED_ARRAY(float, partial, 32);
    const int at = int(blockIdx.x * blockDim.x + threadIdx.x);
    const float sum = warp_sum(at < count ? values[at] : 0.0f);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        const float all = warp_sum(threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f);
        if (threadIdx.x == 0) atomicAdd(total, all);
    }
}

void poison_kernel(int *poisoned) {
    DYNAMIC_SHARED(dynamic);
    SHARED_ARRAY(uint32_t, fixed, 4);
    if (threadIdx.x == 0) {
        poisoned[blockIdx.x] = fixed[0] == 0xffffffffu && std::isnan(*reinterpret_cast<float *>(dynamic));
        fixed[0] = 1;
        *reinterpret_cast<float *>(dynamic) = 1.0f;
    }
}

void missing_lane_kernel(int) {
    if (threadIdx.x != 7) (void)__shfl_xor_sync(FULL_WARP, 1, 1);
}
void other_line_kernel(int) {
    if (threadIdx.x < 16) {
        __syncwarp();
    } else {
        __syncwarp();
    }
}
void half_barrier_kernel(int) {
    if (threadIdx.x < 16) {
        __syncthreads();
    } else {
        __syncwarp(0xffff0000u);
        while (threadIdx.x == 31) (void)__shfl_sync(0x80000001u, 1, 0);
    }
}
void forgotten_copy_kernel(const uint4 *source) {
    DYNAMIC_SHARED(shared);
    cp_async_16(shared + threadIdx.x * 16, source);
    cp_async_commit();
}

// Copies in two groups and looks at the first after waiting for it, and at both, all zero where not valid.
void copy_kernel(const uint32_t *source, uint32_t *seen) {
    DYNAMIC_SHARED(shared);
    const auto *words = reinterpret_cast<const uint32_t *>(shared);
    if (threadIdx.x != 0) return;
    cp_async_16(shared, source);
    cp_async_commit();
    cp_async_16(shared + 16, source + 4);
    cp_async_16(shared + 32, nullptr, false);
    cp_async_commit();
    seen[0] = words[0];
    cp_async_wait<1>();
    seen[1] = words[0], seen[2] = words[4];
    cp_async_wait<0>();
    seen[3] = words[4], seen[4] = words[8];
}

// c[16][8] = a[16][16] b[16][8] with a and b row by row, through ldmatrix.
void multiply_kernel(const bf16 *a, const bf16 *b, float *c) {
    DYNAMIC_SHARED(shared);
    auto *tile = reinterpret_cast<bf16 *>(shared);
    const int lane = int(threadIdx.x);
    for (int at = lane; at < 256; at += 32) tile[at] = a[at];
    for (int at = lane; at < 128; at += 32) tile[256 + at / 8 * 16 + at % 8] = b[at];
    for (int at = lane; at < 128; at += 32) tile[256 + at / 8 * 16 + 8 + at % 8] = b[at];
    __syncwarp();
    uint32_t left[4], right[4];
    ldmatrix_x4(left, shared_address(tile + (lane % 16) * 16 + lane / 16 * 8));
    ldmatrix_x4_trans(right, shared_address(tile + 256 + (lane % 16) * 16 + lane / 16 * 8));
    float sum[4] = {};
    mma_m16n8k16_bf16(sum, left, right[0], right[1]);
    for (int part = 0; part < 4; ++part) c[(lane / 4 + part / 2 * 8) * 8 + lane % 4 * 2 + part % 2] = sum[part];
}

// The second half of a block waits for a flag that the first half sets.
void spin_kernel(unsigned *flag) {
    if (threadIdx.x < 32) {
        while (atomicAdd(flag, 0) == 0) {
        }
    } else if (threadIdx.x == 32) {
        atomicExch(flag, 1);
    }
}

void values() {
    for (auto schedule : {emulation::Schedule::Forward, emulation::Schedule::Backward, emulation::Schedule::Shuffled}) {
        emulation::options().schedule = schedule;
        std::vector<float> ones(1000, 1.0f);
        float total = 0;
        emulation::launch({4, 256, 0}, sum_kernel, ones.data(), &total, 1000);
        check(total == 1000.0f, "the sum of a grid");
        unsigned flag = 0;
        emulation::launch({1, 64, 0}, spin_kernel, &flag);
        check(flag == 1, "a thread waits for another");
    }
    emulation::options().schedule = emulation::Schedule::Forward;
    int poisoned[3] = {};
    emulation::launch({3, 32, 4}, poison_kernel, poisoned);
    check(poisoned[0] && poisoned[1] && poisoned[2], "shared memory is NaN when a block begins");

    alignas(16) uint32_t source[8] = {11, 0, 0, 0, 22, 0, 0, 0};
    uint32_t seen[5];
    emulation::launch(one_warp, copy_kernel, source, seen);
    check(seen[0] == 0xffffffffu && seen[1] == 11 && seen[2] == 0xffffffffu && seen[3] == 22 && seen[4] == 0, "copies land at their wait");

    bf16 a[256], b[128];
    float c[128];
    for (int at = 0; at < 256; ++at) a[at] = __float2bfloat16_rn(float(at % 13 - 6));
    for (int at = 0; at < 128; ++at) b[at] = __float2bfloat16_rn(float(at % 11 - 5));
    emulation::counters() = {};
    emulation::launch(one_warp, multiply_kernel, a, b, c);
    bool equal = true;
    for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < 8; ++column) {
            float sum = 0;
            for (int inner = 0; inner < 16; ++inner) sum += __bfloat162float(a[row * 16 + inner]) * __bfloat162float(b[inner * 8 + column]);
            equal = equal && sum == c[row * 8 + column];
        }
    }
    check(equal, "ldmatrix and mma multiply");
    check(emulation::counters().mma == 1 && emulation::counters().ldmatrix == 2, "instructions are counted");
    check(emulation::counters().bank_conflicts == 8, "rows of 32 bytes meet in the same banks once");

    const float halves[] = {1.00390625f, 1.01171875f, 1e30f, -0.0f, INFINITY};
    const unsigned short rounded[] = {0x3f80, 0x3f82, 0x714a, 0x8000, 0x7f80};
    for (int at = 0; at < 5; ++at) check(__float2bfloat16_rn(halves[at]).bits == rounded[at], "ties round to even");
    check(__float2bfloat16_rn(NAN).bits == 0x7fff, "NaN stays NaN");
}

void errors() {
    check_fails("ended or does not exist", [] { emulation::launch({1, 16, 0}, missing_lane_kernel, 0); });
    check_fails("shuffle", [] { emulation::launch(one_warp, missing_lane_kernel, 0); });
    check_fails("other lanes of the warp are at", [] { emulation::launch(one_warp, other_line_kernel, 0); });
    check_fails("deadlock", [] { emulation::launch(one_warp, half_barrier_kernel, 0); });
    check_fails("in flight", [] {
        const uint4 source{};
        emulation::launch(one_warp, forgotten_copy_kernel, &source);
    });
    // It works again afterwards.
    std::vector<float> ones(64, 1.0f);
    float total = 0;
    emulation::launch({1, 64, 0}, sum_kernel, ones.data(), &total, 64);
    check(total == 64.0f, "a launch after an error");
}

} // namespace

int main() {
    values();
    errors();
    if (failures == 0) std::printf("emulation: passed\n");
    return failures != 0;
}
