// Runs CUDA kernels on the CPU, thread for thread, from the same source that nvcc compiles.
//
// Place in the flow: a kernel includes ../common.cuh, which takes CUDA's own headers under nvcc and this one under a host compiler. A test
// includes the .cu file and calls `emulation::launch`. No GPU and no CUDA toolkit is needed.
//
// How: every thread of a block is a fiber. A fiber runs until it meets a collective (barrier, shuffle, vote, mma, ldmatrix), where it waits
// for the others it names. Blocks run one after the other. The order of threads and blocks is chosen by `options().schedule`; results that
// change with it show a race.
//
// What is an error, told by an `emulation::Error` that names block, thread and line:
//   * a collective that a named lane has left, or that lanes meet at different lines; a barrier that not all living threads reach;
//   * a thread that ends with cp.async copies in flight.
// What is caught by values: shared memory is NaN (all bits set) when a block begins; the target of a cp.async is NaN from the copy to the
// wait that covers it, so neither a missing wait nor a copy into memory that is still being read goes unseen.
// What sanitizers add: -fsanitize=address finds accesses outside of shared and global buffers, -fsanitize=undefined misaligned vectors,
// -fsanitize=thread data races between threads of a block: only barriers and __syncwarp order accesses (shuffles, votes, mma and relaxed
// atomics do not, as CUDA documents). Blocks are ordered there; races between blocks show by changing the schedule.
//
// One launch at a time, from any thread of the host.
// What it is not: no timing, no memory model weaker than that of the host, no warp lock step. Approximate instructions (ex2, rsqrt, ..) are
// computed exactly and rounded, which is closer to the truth than the hardware is. The sum within an mma is exact and rounded once; the
// hardware's order and rounding are not documented.
//
// Compile with: -std=c++20 -O2 -ffp-contract=off -fno-strict-aliasing -Wno-unknown-pragmas
#pragma once

#ifdef __CUDACC__
#error "for host compilers only"
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMULATION_UNSANITIZED __attribute__((no_sanitize("thread"), noinline))
#else
#define EMULATION_UNSANITIZED
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// ---------------------------------------------------------------------------------------------------------------------------------------
// Words of the language
// ---------------------------------------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

// Shared memory is declared through these two macros, which common.cuh defines for nvcc as well. `__shared__` itself is left undefined
// here.
//   DYNAMIC_SHARED(name)            unsigned char name[], 128-byte aligned, as large as the launch says
//   SHARED_ARRAY(type, name, count) type name[count]
#define DYNAMIC_SHARED(name) unsigned char *name = ::emulation::block().dynamic_shared
#define SHARED_ARRAY(type, name, count)                                                                                                    \
    static ::emulation::StaticShared name##_storage(sizeof(type) * (count));                                                               \
    type(&name)[count] = *reinterpret_cast<type(*)[count]>(name##_storage.bytes())

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define EMULATION_VECTORS(scalar, name)                                                                                                    \
    struct alignas(2 * sizeof(scalar)) name##2 { scalar x, y; };                                                                           \
    struct alignas(4 * sizeof(scalar) > 16 ? 16 : 4 * sizeof(scalar)) name##4 { scalar x, y, z, w; };                                      \
    inline name##2 make_##name##2(scalar x, scalar y) { return {x, y}; }                                                                   \
    inline name##4 make_##name##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
EMULATION_VECTORS(int, int)
EMULATION_VECTORS(unsigned, uint)
EMULATION_VECTORS(float, float)
EMULATION_VECTORS(unsigned short, ushort)
#undef EMULATION_VECTORS
struct alignas(16) ulonglong2 {
    unsigned long long x, y;
};

// ---------------------------------------------------------------------------------------------------------------------------------------
// Fibers, blocks, collectives
// ---------------------------------------------------------------------------------------------------------------------------------------

namespace emulation {

using Location = std::source_location;

// A kernel broke a rule.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum class Schedule { Forward, Backward, Shuffled };

struct Options {
    Schedule schedule = Schedule::Forward;
    std::uint64_t seed = 1;
    // Turns given to threads before a block counts as hanging.
    std::uint64_t most_turns = std::uint64_t(1) << 31;
    std::size_t stack_bytes = 256 * 1024;
};
inline Options &options() {
    static Options options;
    return options;
}

// What was executed since the last reset, over all launches; collectives count once per warp.
struct Counters {
    std::uint64_t mma = 0, ldmatrix = 0, barriers = 0, copies = 0;
    // Passes over shared memory that ldmatrix needed beyond one per 8 rows.
    std::uint64_t bank_conflicts = 0;
};
inline Counters &counters() {
    static Counters counters;
    return counters;
}

struct Copy {
    void *target;
    const void *source;
    unsigned bytes;
};

enum class Kind { None, SyncThreads, SyncWarp, Shuffle, Vote, Reduce, Match, Mma, Ldmatrix };
inline const char *name_of(Kind kind) {
    static const char *const names[] = {
        "nothing", "__syncthreads", "__syncwarp", "a shuffle", "a vote", "a reduction", "a match", "mma", "ldmatrix"};
    return names[int(kind)];
}

// One thread of the running block.
struct Fiber {
    dim3 thread_index;
    unsigned lane = 0, warp = 0, number = 0;
    bool alive = false, ready = false;
    Kind waits_for = Kind::None;
    Location where;
    // cp.async: copies by group, the last group still open.
    std::vector<std::vector<Copy>> copies;

    std::unique_ptr<unsigned char[]> stack;
    std::size_t stack_bytes = 0;
#if defined(__x86_64__)
    void *stack_pointer = nullptr;
#else
    ucontext_t context{};
#endif
#if defined(__SANITIZE_ADDRESS__)
    void *fake_stack = nullptr;
    const void *stack_bottom = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
    void *thread_sanitizer = nullptr;
    ~Fiber() {
        if (thread_sanitizer && stack) __tsan_destroy_fiber(thread_sanitizer);
    }
#endif
};

// Lanes of one warp that gather at one place.
struct Gathering {
    Kind kind = Kind::None;
    unsigned mask = 0, arrived = 0;
    const char *file = nullptr;
    unsigned line = 0;
    void *operands[32] = {};
    Fiber *fibers[32] = {};
};

struct Block {
    dim3 index, size, grid;
    unsigned threads = 0;
    unsigned char *dynamic_shared = nullptr;
    // By the lowest lane of the mask: masks of gatherings under way are disjoint.
    Gathering (*gatherings)[32] = nullptr;
    // Barrier of the block.
    unsigned arrived = 0, alive = 0;
    const char *barrier_file = nullptr;
    unsigned barrier_line = 0;
    int vote_count = 0, vote_result = 0;
    void (*body)(void *) = nullptr;
    void *arguments = nullptr;
};

struct Machine {
    std::vector<std::unique_ptr<Fiber>> fibers;
    Fiber main;
    Fiber *current = nullptr;
    Block block;
    std::unique_ptr<Gathering[][32]> gatherings;
    std::string failure;
    bool failed = false;
    std::uint64_t launches = 0;
};
inline Machine machine;
inline Block &block() { return machine.block; }
inline Fiber &self() { return *machine.current; }

// Memory of one SHARED_ARRAY. Allocated at its exact size, so that AddressSanitizer sees its ends.
class StaticShared {
public:
    explicit StaticShared(std::size_t size)
        : size_(size), bytes_(static_cast<unsigned char *>(std::aligned_alloc(16, (size + 15) / 16 * 16))) {
#if defined(__SANITIZE_ADDRESS__)
        ASAN_POISON_MEMORY_REGION(bytes_ + size, (size + 15) / 16 * 16 - size);
#endif
        std::memset(bytes_, 0xff, size);
        all().push_back(this);
    }
    unsigned char *bytes() { return bytes_; }
    static void poison() {
        for (StaticShared *each : all()) std::memset(each->bytes_, 0xff, each->size_);
    }

private:
    static std::vector<StaticShared *> &all() {
        static std::vector<StaticShared *> all;
        return all;
    }
    std::size_t size_;
    unsigned char *bytes_;
};

#if defined(__x86_64__)
extern "C" void emulation_switch_stacks(void **save, void *load);
asm(R"(
    .text
    .weak emulation_switch_stacks
    .type emulation_switch_stacks, @function
emulation_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulation_switch_stacks, .-emulation_switch_stacks
)");
#endif

#if defined(__SANITIZE_ADDRESS__)
// A kernel that broke a rule is left where it stands, with what its stack owns.
extern "C" __attribute__((weak)) const char *__asan_default_options() { return "detect_leaks=0"; }

// Fibers are only ever entered from the main stack, whose bounds are learnt here.
inline void finish_switch(Fiber &entered) {
    if (&entered == &machine.main) {
        __sanitizer_finish_switch_fiber(entered.fake_stack, nullptr, nullptr);
    } else {
        __sanitizer_finish_switch_fiber(entered.fake_stack, &machine.main.stack_bottom, &machine.main.stack_bytes);
    }
}
#endif

EMULATION_UNSANITIZED inline void switch_to(Fiber &from, Fiber &to) {
    machine.current = &to;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_bottom, to.stack_bytes);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(to.thread_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
    emulation_switch_stacks(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    finish_switch(from);
#endif
}

// Gives the turn back to the scheduler.
EMULATION_UNSANITIZED inline void give_turn() { switch_to(*machine.current, machine.main); }

// Ordering of memory, for ThreadSanitizer.
EMULATION_UNSANITIZED inline void order_before(void *where) {
#if defined(__SANITIZE_THREAD__)
    __tsan_release(where);
#else
    (void)where;
#endif
}
EMULATION_UNSANITIZED inline void order_after(void *where) {
#if defined(__SANITIZE_THREAD__)
    __tsan_acquire(where);
#else
    (void)where;
#endif
}

EMULATION_UNSANITIZED inline void set_failed(bool failed) { machine.failed = failed; }
EMULATION_UNSANITIZED inline void set_current(Fiber &fiber) { machine.current = &fiber; }

[[noreturn]] inline void fail(const std::string &message) {
    Fiber &fiber = self();
    const Block &at = block();
    char place[200];
    std::snprintf(place, sizeof place, "block (%u, %u, %u), thread (%u, %u, %u): ", at.index.x, at.index.y, at.index.z,
        fiber.thread_index.x, fiber.thread_index.y, fiber.thread_index.z);
    if (&fiber == &machine.main) throw Error(message);
    machine.failure = place + message;
    order_before(&machine);
    set_failed(true);
    give_turn();
    std::abort(); // A failed fiber never runs again.
}

inline std::string at_line(const char *file, unsigned line) { return std::string(file ? file : "?") + ":" + std::to_string(line); }

EMULATION_UNSANITIZED inline void run_thread(Fiber &fiber) {
    block().body(block().arguments);
    bool in_flight = false;
    for (const auto &group : fiber.copies) in_flight = in_flight || !group.empty();
    if (in_flight) fail("ends with cp.async copies in flight");
    fiber.alive = false;
    block().alive -= 1;
}

[[noreturn]] EMULATION_UNSANITIZED inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    finish_switch(self());
#endif
    for (;;) {
        run_thread(self());
        give_turn();
    }
}

inline std::unique_ptr<Fiber> make_fiber() {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack_bytes = options().stack_bytes;
    fiber->stack.reset(new unsigned char[fiber->stack_bytes]);
#if defined(__SANITIZE_ADDRESS__)
    fiber->stack_bottom = fiber->stack.get();
#endif
#if defined(__x86_64__)
    auto top = (reinterpret_cast<std::uintptr_t>(fiber->stack.get()) + fiber->stack_bytes) & ~std::uintptr_t(15);
    void **slot = reinterpret_cast<void **>(top);
    *--slot = nullptr; // A return address that is never used; keeps the stack aligned as after a call.
    *--slot = reinterpret_cast<void *>(&fiber_main);
    for (int saved = 0; saved < 6; ++saved) *--slot = nullptr;
    fiber->stack_pointer = slot;
#else
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.get();
    fiber->context.uc_stack.ss_size = fiber->stack_bytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, reinterpret_cast<void (*)()>(&fiber_main), 0);
#endif
#if defined(__SANITIZE_THREAD__)
    fiber->thread_sanitizer = __tsan_create_fiber(0);
#endif
    return fiber;
}

#if defined(__SANITIZE_THREAD__)
// What `first` did comes before what `second` does. Called by main.
EMULATION_UNSANITIZED inline void order_between(Fiber &first, Fiber &second) {
    void *const main = machine.main.thread_sanitizer;
    if (first.thread_sanitizer != main) __tsan_switch_to_fiber(first.thread_sanitizer, __tsan_switch_to_fiber_no_sync);
    __tsan_release(&first);
    __tsan_switch_to_fiber(second.thread_sanitizer, __tsan_switch_to_fiber_no_sync);
    __tsan_acquire(&first);
    if (second.thread_sanitizer != main) __tsan_switch_to_fiber(main, __tsan_switch_to_fiber_no_sync);
}
#endif

using Exchange = void (*)(void *const *operands, unsigned mask);

// Waits for all lanes of `mask` at one line; the last one runs `exchange` on the operands of all. Lanes outside of `mask` have null
// operands.
EMULATION_UNSANITIZED inline void gather(Kind kind, unsigned mask, void *operand, Exchange exchange, const Location &where) {
    Fiber &fiber = self();
    const unsigned bit = 1u << fiber.lane;
    if (!(mask & bit))
        fail(std::string(name_of(kind)) + " at " + at_line(where.file_name(), where.line()) + " by a lane that is not in its mask");
    Gathering &here = block().gatherings[fiber.warp][__builtin_ctz(mask)];
    if (here.arrived == 0) {
        for (unsigned lane = 0; lane < 32; ++lane) {
            if (!((mask >> lane) & 1)) continue;
            const unsigned number = fiber.warp * 32 + lane;
            if (number >= block().threads || !machine.fibers[number]->alive) {
                fail(std::string(name_of(kind)) + " at " + at_line(where.file_name(), where.line()) + " names lane " +
                     std::to_string(lane) + ", which has ended or does not exist");
            }
        }
        here.kind = kind, here.mask = mask, here.file = where.file_name(), here.line = where.line();
        for (unsigned lane = 0; lane < 32; ++lane) here.operands[lane] = nullptr;
    } else if (here.kind != kind || here.mask != mask || here.line != where.line()) {
        fail(std::string(name_of(kind)) + " at " + at_line(where.file_name(), where.line()) + ", but other lanes of the warp are at " +
             name_of(here.kind) + " at " + at_line(here.file, here.line) + (here.mask != mask ? " with another mask" : ""));
    }
    here.operands[fiber.lane] = operand;
    here.fibers[fiber.lane] = &fiber;
    here.arrived |= bit;
    if (here.arrived == mask) {
        here.arrived = 0;
        if (exchange) exchange(here.operands, mask);
        for (unsigned lane = 0; lane < 32; ++lane) {
            if ((mask >> lane) & 1) here.fibers[lane]->ready = true;
        }
        return;
    }
    fiber.waits_for = kind, fiber.where = where, fiber.ready = false;
    give_turn();
    fiber.waits_for = Kind::None;
}

// Barrier of the block. Returns how many threads voted `vote`.
EMULATION_UNSANITIZED inline int block_barrier(bool vote, const Location &where) {
    Fiber &fiber = self();
    Block &here = block();
    if (here.arrived == 0) {
        here.barrier_file = where.file_name(), here.barrier_line = where.line();
    } else if (here.barrier_line != where.line()) {
        fail("__syncthreads at " + at_line(where.file_name(), where.line()) + ", but other threads of the block are at that of " +
             at_line(here.barrier_file, here.barrier_line));
    }
    here.vote_count += vote;
    here.arrived += 1;
    order_before(&here);
    fiber.waits_for = Kind::SyncThreads, fiber.where = where, fiber.ready = false;
    give_turn(); // The scheduler opens the barrier: threads may end after others have arrived.
    fiber.waits_for = Kind::None;
    order_after(&here);
    return here.vote_result;
}

// A place where another thread may get its turn.
EMULATION_UNSANITIZED inline void yield() {
    if (machine.current == &machine.main) return;
    self().ready = true;
    give_turn();
}

inline void land(std::vector<Copy> &group) {
    for (const Copy &copy : group) {
        if (copy.bytes) std::memcpy(copy.target, copy.source, copy.bytes);
        std::memset(static_cast<char *>(copy.target) + copy.bytes, 0, 16 - copy.bytes);
    }
    group.clear();
}

EMULATION_UNSANITIZED inline void count_copy() { counters().copies += 1; }

// cp.async.cg.shared.global: `bytes` of 16 are copied and the rest is zero.
inline void copy_async(void *target, const void *source, unsigned bytes) {
    if (reinterpret_cast<std::uintptr_t>(target) % 16 || (bytes && reinterpret_cast<std::uintptr_t>(source) % 16))
        fail("cp.async is not aligned to 16 bytes");
    if (bytes > 16) fail("cp.async of more than 16 bytes");
    auto &groups = self().copies;
    if (groups.empty()) groups.emplace_back();
    std::memset(target, 0xff, 16);
    groups.back().push_back({target, source, bytes});
    count_copy();
}
inline void copy_async_commit() {
    auto &groups = self().copies;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}
inline void copy_async_wait(unsigned pending) {
    auto &groups = self().copies;
    if (groups.empty()) return;
    const std::size_t committed = groups.size() - 1;
    const std::size_t landing = committed > pending ? committed - pending : 0;
    for (std::size_t group = 0; group < landing; ++group) land(groups[group]);
    groups.erase(groups.begin(), groups.begin() + std::ptrdiff_t(landing));
}

EMULATION_UNSANITIZED inline std::string where_all_wait() {
    std::string message = "deadlock: no thread can go on;";
    unsigned told = 0;
    for (unsigned number = 0; number < block().threads && told < 8; ++number) {
        const Fiber &fiber = *machine.fibers[number];
        if (!fiber.alive) continue;
        message += " thread " + std::to_string(number) + " waits at " + name_of(fiber.waits_for) + " at " +
                   at_line(fiber.where.file_name(), fiber.where.line()) + ";";
        told += 1;
    }
    return message;
}

EMULATION_UNSANITIZED inline void run_block(const std::vector<unsigned> &order) {
    Block &here = block();
    std::uint64_t turns = 0;
    while (here.alive > 0) {
        bool progress = false;
        for (unsigned number : order) {
            Fiber &fiber = *machine.fibers[number];
            if (!fiber.alive || !fiber.ready) continue;
            progress = true;
            turns += 1;
            switch_to(machine.main, fiber);
            if (machine.failed) {
                order_after(&machine);
                return;
            }
        }
        if (here.alive > 0 && here.arrived == here.alive) {
            here.arrived = 0;
            here.vote_result = here.vote_count, here.vote_count = 0;
            counters().barriers += 1;
            for (unsigned number : order) machine.fibers[number]->ready = true;
            continue;
        }
        if (here.alive > 0 && !progress) {
            machine.failure = where_all_wait(), machine.failed = true;
            return;
        }
        if (turns > options().most_turns) {
            machine.failure = "a block has not ended after " + std::to_string(turns) + " turns", machine.failed = true;
            return;
        }
    }
}

struct Geometry {
    dim3 grid, block;
    std::size_t dynamic_shared = 0;
};

// Runs a kernel to its end.
template <class... Parameters, class... Arguments>
void launch(const Geometry &geometry, void (*kernel)(Parameters...), Arguments... arguments) {
    const dim3 grid = geometry.grid, size = geometry.block;
    const unsigned threads = size.x * size.y * size.z;
    if (threads == 0 || threads > 1024) throw Error("a block of " + std::to_string(threads) + " threads");
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) throw Error("a grid that cannot be launched");
    if (geometry.dynamic_shared > 227 * 1024) throw Error("more than 227 KiB of shared memory");

    std::tuple<Parameters...> values(arguments...);
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> *values;
    } call{kernel, &values};

    Machine &m = machine;
    while (m.fibers.size() < threads) m.fibers.push_back(make_fiber());
    m.gatherings.reset(new Gathering[(threads + 31) / 32][32]);
    set_failed(false);
    set_current(m.main);
#if defined(__SANITIZE_THREAD__)
    m.main.thread_sanitizer = __tsan_get_current_fiber();
#endif
    unsigned char *shared = static_cast<unsigned char *>(std::aligned_alloc(128, (geometry.dynamic_shared + 127) / 128 * 128 + 128));
#if defined(__SANITIZE_ADDRESS__)
    const std::size_t slack = (geometry.dynamic_shared + 127) / 128 * 128 + 128 - geometry.dynamic_shared;
    ASAN_POISON_MEMORY_REGION(shared + geometry.dynamic_shared, slack);
#endif

    std::mt19937_64 random(options().seed + m.launches++);
    std::vector<std::uint64_t> blocks(std::uint64_t(grid.x) * grid.y * grid.z);
    for (std::size_t at = 0; at < blocks.size(); ++at) blocks[at] = at;
    std::vector<unsigned> order(threads);
    for (unsigned at = 0; at < threads; ++at) order[at] = at;
    if (options().schedule == Schedule::Backward) std::reverse(blocks.begin(), blocks.end()), std::reverse(order.begin(), order.end());
    if (options().schedule == Schedule::Shuffled) std::shuffle(blocks.begin(), blocks.end(), random);

    for (std::uint64_t at : blocks) {
        if (options().schedule == Schedule::Shuffled) std::shuffle(order.begin(), order.end(), random);
        m.block = Block{};
        m.block.index = dim3(unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y));
        m.block.size = size, m.block.grid = grid, m.block.threads = threads, m.block.alive = threads;
        m.block.dynamic_shared = shared;
        m.block.gatherings = m.gatherings.get();
        m.block.arguments = &call;
        m.block.body = [](void *pointer) {
            Call &call = *static_cast<Call *>(pointer);
            std::apply(call.kernel, *call.values);
        };
        std::memset(shared, 0xff, geometry.dynamic_shared);
        StaticShared::poison();
        for (unsigned number = 0; number < threads; ++number) {
            Fiber &fiber = *m.fibers[number];
            fiber.thread_index = dim3(number % size.x, number / size.x % size.y, number / size.x / size.y);
            fiber.number = number, fiber.lane = number % 32, fiber.warp = number / 32;
            fiber.alive = true, fiber.ready = true, fiber.waits_for = Kind::None;
            fiber.copies.clear();
#if defined(__SANITIZE_THREAD__)
            // A launch, and the poison of a block, come before its threads.
            order_between(m.main, fiber);
#endif
        }
        run_block(order);
#if defined(__SANITIZE_THREAD__)
        // What threads did comes before the next block and before what follows the launch.
        for (unsigned number = 0; number < threads; ++number) {
            order_between(*m.fibers[number], m.main);
        }
#endif
        if (m.failed) break;
    }
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(shared + geometry.dynamic_shared, slack);
#endif
    std::free(shared);
    if (m.failed) {
        std::string message;
        message.swap(m.failure);
        m.fibers.clear(); // Some stopped in the middle.
        throw Error(message);
    }
}

} // namespace emulation

#define threadIdx (::emulation::self().thread_index)
#define blockIdx (::emulation::block().index)
#define blockDim (::emulation::block().size)
#define gridDim (::emulation::block().grid)
#define warpSize 32

// ---------------------------------------------------------------------------------------------------------------------------------------
// Synchronisation, votes, shuffles, reductions
// ---------------------------------------------------------------------------------------------------------------------------------------

inline void __syncthreads(emulation::Location where = emulation::Location::current()) { emulation::block_barrier(false, where); }
inline int __syncthreads_count(int predicate, emulation::Location where = emulation::Location::current()) {
    return emulation::block_barrier(predicate != 0, where);
}
inline int __syncthreads_or(int predicate, emulation::Location where = emulation::Location::current()) {
    return emulation::block_barrier(predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, emulation::Location where = emulation::Location::current()) {
    return emulation::block_barrier(predicate == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, emulation::Location where = emulation::Location::current()) {
    void *place = &emulation::block().gatherings[emulation::self().warp][__builtin_ctz(mask)];
    emulation::order_before(place);
    emulation::gather(emulation::Kind::SyncWarp, mask, nullptr, nullptr, where);
    emulation::order_after(place);
}
inline void __threadfence() { emulation::yield(); }
inline void __threadfence_block() { emulation::yield(); }
inline void __nanosleep(unsigned) { emulation::yield(); }
inline void __trap() { emulation::fail("__trap"); }

namespace emulation {

struct ShuffleOperand {
    std::uint64_t value, result;
    unsigned source; // Lane, already resolved.
};

EMULATION_UNSANITIZED inline void exchange_shuffle(void *const *operands, unsigned mask) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!((mask >> lane) & 1)) continue;
        auto &operand = *static_cast<ShuffleOperand *>(operands[lane]);
        // A lane outside of the mask gives an undefined value: NaN.
        operand.result = (mask >> operand.source) & 1 ? static_cast<ShuffleOperand *>(operands[operand.source])->value : ~std::uint64_t(0);
    }
}

template <class T> T shuffle(unsigned mask, T value, unsigned source, const Location &where) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    ShuffleOperand operand{0, 0, source};
    std::memcpy(&operand.value, &value, sizeof(T));
    gather(Kind::Shuffle, mask, &operand, exchange_shuffle, where);
    std::memcpy(&value, &operand.result, sizeof(T));
    return value;
}

struct VoteOperand {
    unsigned predicate, result;
};
EMULATION_UNSANITIZED inline void exchange_vote(void *const *operands, unsigned mask) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if ((mask >> lane) & 1 && static_cast<VoteOperand *>(operands[lane])->predicate) votes |= 1u << lane;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
        if ((mask >> lane) & 1) static_cast<VoteOperand *>(operands[lane])->result = votes;
    }
}
inline unsigned vote(unsigned mask, bool predicate, const Location &where) {
    VoteOperand operand{predicate, 0};
    gather(Kind::Vote, mask, &operand, exchange_vote, where);
    return operand.result;
}

enum class Reduction { Add, Min, Max, And, Or, Xor };
template <class T> struct ReduceOperand {
    T value, result;
    Reduction reduction;
};
template <class T> EMULATION_UNSANITIZED void exchange_reduce(void *const *operands, unsigned mask) {
    T result{};
    bool first = true;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!((mask >> lane) & 1)) continue;
        const auto &operand = *static_cast<ReduceOperand<T> *>(operands[lane]);
        const T value = operand.value;
        if (first) {
            result = value, first = false;
            continue;
        }
        switch (operand.reduction) {
        case Reduction::Add: result = T(std::uint32_t(result) + std::uint32_t(value)); break;
        case Reduction::Min: result = value < result ? value : result; break;
        case Reduction::Max: result = value > result ? value : result; break;
        case Reduction::And: result = T(result & value); break;
        case Reduction::Or: result = T(result | value); break;
        case Reduction::Xor: result = T(result ^ value); break;
        }
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
        if ((mask >> lane) & 1) static_cast<ReduceOperand<T> *>(operands[lane])->result = result;
    }
}
template <class T> T reduce(unsigned mask, T value, Reduction reduction, const Location &where) {
    ReduceOperand<T> operand{value, T{}, reduction};
    gather(Kind::Reduce, mask, &operand, exchange_reduce<T>, where);
    return operand.result;
}

template <class T> struct MatchOperand {
    T value;
    unsigned result;
};
template <class T> EMULATION_UNSANITIZED void exchange_match(void *const *operands, unsigned mask) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!((mask >> lane) & 1)) continue;
        auto &mine = *static_cast<MatchOperand<T> *>(operands[lane]);
        mine.result = 0;
        for (unsigned other = 0; other < 32; ++other) {
            if ((mask >> other) & 1 && static_cast<MatchOperand<T> *>(operands[other])->value == mine.value) mine.result |= 1u << other;
        }
    }
}

} // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emulation::Location where = emulation::Location::current()) {
    const unsigned lane = emulation::self().lane, base = lane & ~unsigned(width - 1);
    return emulation::shuffle(mask, value, base + (unsigned(source) & unsigned(width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, emulation::Location where = emulation::Location::current()) {
    const unsigned lane = emulation::self().lane, source = lane ^ unsigned(lanes);
    // A source in a later segment than the lane's own gives the lane's own value.
    const bool inside = source < (lane & ~unsigned(width - 1)) + unsigned(width);
    return emulation::shuffle(mask, value, inside ? source : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, emulation::Location where = emulation::Location::current()) {
    const unsigned lane = emulation::self().lane;
    const bool inside = (lane & unsigned(width - 1)) + delta < unsigned(width);
    return emulation::shuffle(mask, value, inside ? lane + delta : lane, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, emulation::Location where = emulation::Location::current()) {
    const unsigned lane = emulation::self().lane;
    const bool inside = (lane & unsigned(width - 1)) >= delta;
    return emulation::shuffle(mask, value, inside ? lane - delta : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, emulation::Location where = emulation::Location::current()) {
    return emulation::vote(mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate, emulation::Location where = emulation::Location::current()) {
    return emulation::vote(mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emulation::Location where = emulation::Location::current()) {
    return emulation::vote(mask, predicate == 0, where) == 0;
}
template <class T> unsigned __match_any_sync(unsigned mask, T value, emulation::Location where = emulation::Location::current()) {
    emulation::MatchOperand<T> operand{value, 0};
    emulation::gather(emulation::Kind::Match, mask, &operand, emulation::exchange_match<T>, where);
    return operand.result;
}

#define EMULATION_REDUCTION(name, reduction)                                                                                               \
    inline unsigned __reduce_##name##_sync(unsigned mask, unsigned value, emulation::Location where = emulation::Location::current()) {    \
        return emulation::reduce(mask, value, emulation::Reduction::reduction, where);                                                     \
    }                                                                                                                                      \
    inline int __reduce_##name##_sync(unsigned mask, int value, emulation::Location where = emulation::Location::current()) {              \
        return emulation::reduce(mask, value, emulation::Reduction::reduction, where);                                                     \
    }
EMULATION_REDUCTION(add, Add)
EMULATION_REDUCTION(min, Min)
EMULATION_REDUCTION(max, Max)
EMULATION_REDUCTION(and, And)
EMULATION_REDUCTION(or, Or)
EMULATION_REDUCTION(xor, Xor)
#undef EMULATION_REDUCTION

// ---------------------------------------------------------------------------------------------------------------------------------------
// Atomics. Relaxed, as CUDA's; each lets other threads of the block take a turn, so that loops that wait for another thread end.
// ---------------------------------------------------------------------------------------------------------------------------------------

namespace emulation {
template <class T> struct Bits {
    using Type = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint16_t>>;
};
template <class T, class Change> T atomic(T *where, Change change) {
    using Word = typename Bits<T>::Type;
    yield();
    Word *word = reinterpret_cast<Word *>(where);
    Word before = __atomic_load_n(word, __ATOMIC_RELAXED);
    for (;;) {
        T old;
        std::memcpy(&old, &before, sizeof(T));
        T value = change(old);
        Word after;
        std::memcpy(&after, &value, sizeof(T));
        if (__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return old;
    }
}
} // namespace emulation

// The value's type is that of the memory, as CUDA's overloads have it.
template <class T> T atomicAdd(T *where, std::type_identity_t<T> value) {
    return emulation::atomic(where, [=](T old) { return T(old + value); });
}
template <class T> T atomicSub(T *where, std::type_identity_t<T> value) {
    return emulation::atomic(where, [=](T old) { return T(old - value); });
}
template <class T> T atomicMax(T *where, std::type_identity_t<T> value) {
    static_assert(std::is_integral_v<T>, "CUDA has atomicMax for integers");
    return emulation::atomic(where, [=](T old) { return old < value ? value : old; });
}
template <class T> T atomicMin(T *where, std::type_identity_t<T> value) {
    static_assert(std::is_integral_v<T>, "CUDA has atomicMin for integers");
    return emulation::atomic(where, [=](T old) { return value < old ? value : old; });
}
template <class T> T atomicOr(T *where, std::type_identity_t<T> value) {
    return emulation::atomic(where, [=](T old) { return T(old | value); });
}
template <class T> T atomicAnd(T *where, std::type_identity_t<T> value) {
    return emulation::atomic(where, [=](T old) { return T(old & value); });
}
template <class T> T atomicXor(T *where, std::type_identity_t<T> value) {
    return emulation::atomic(where, [=](T old) { return T(old ^ value); });
}
template <class T> T atomicExch(T *where, std::type_identity_t<T> value) {
    return emulation::atomic(where, [=](T) { return value; });
}
template <class T> T atomicCAS(T *where, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
    return emulation::atomic(where, [=](T old) { return old == compare ? value : old; });
}

// ---------------------------------------------------------------------------------------------------------------------------------------
// Scalar intrinsics
// ---------------------------------------------------------------------------------------------------------------------------------------

template <class T> T __ldg(const T *where) { return *where; }
template <class T> T __ldcs(const T *where) { return *where; }
template <class T> T __ldcg(const T *where) { return *where; }
template <class T> void __stcs(T *where, std::type_identity_t<T> value) { *where = value; }
template <class T> void __stcg(T *where, std::type_identity_t<T> value) { *where = value; }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __clz(int value) { return value ? __builtin_clz(unsigned(value)) : 32; }
inline int __clzll(long long value) { return value ? __builtin_clzll(static_cast<unsigned long long>(value)) : 64; }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline unsigned __brev(unsigned value) {
    unsigned result = 0;
    for (int bit = 0; bit < 32; ++bit) result |= ((value >> bit) & 1) << (31 - bit);
    return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((std::uint64_t(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline int __float_as_int(float value) { return int(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }

inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float a) { return float(1.0 / std::sqrt(double(a))); }
inline float __frsqrt_rn(float a) { return rsqrtf(a); }
inline float __expf(float a) { return float(std::exp(double(a))); }
inline float __logf(float a) { return float(std::log(double(a))); }
inline float __log2f(float a) { return float(std::log2(double(a))); }
inline float __exp2f(float a) { return float(std::exp2(double(a))); }
inline float __sinf(float a) { return float(std::sin(double(a))); }
inline float __cosf(float a) { return float(std::cos(double(a))); }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
inline int __float2int_rn(float a) { return int(std::nearbyint(a)); }
inline int __float2int_rd(float a) { return int(std::floor(a)); }
inline float __int2float_rn(int a) { return float(a); }
inline float __uint2float_rn(unsigned a) { return float(a); }

// The overloads that CUDA puts into the global namespace.
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return b < a ? b : a; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return b < a ? b : a; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return b < a ? b : a; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// ---------------------------------------------------------------------------------------------------------------------------------------
// bf16
// ---------------------------------------------------------------------------------------------------------------------------------------

struct alignas(2) __nv_bfloat16 {
    unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }
// Round to nearest, ties to even; every NaN becomes 0x7fff, as cvt.rn.bf16.f32 has it.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    if (std::isnan(value)) return {0x7fff};
    const unsigned bits = __float_as_uint(value);
    return {static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 value) { return __floats2bfloat162_rn(value.x, value.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 value) { return {__bfloat162float(value.x), __bfloat162float(value.y)}; }
inline float __low2float(__nv_bfloat162 value) { return __bfloat162float(value.x); }
inline float __high2float(__nv_bfloat162 value) { return __bfloat162float(value.y); }

// ---------------------------------------------------------------------------------------------------------------------------------------
// Tensor core instructions; ../ptx.cuh gives them their names
// ---------------------------------------------------------------------------------------------------------------------------------------

namespace emulation {

struct LdmatrixOperand {
    unsigned short row[8]; // The row whose address this lane gave.
    std::uintptr_t address;
    std::uint32_t result[4];
    bool transposed;
};

// Matrix i has its 8 rows from lanes 8 i .. 8 i + 7. Lane l receives elements (l / 4, 2 (l % 4) .. + 1) of each, of the transpose if asked.
EMULATION_UNSANITIZED inline void exchange_ldmatrix(void *const *operands, unsigned) {
    counters().ldmatrix += 1;
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
        unsigned most = 1;
        for (unsigned row = 0; row < 8; ++row) {
            const std::uintptr_t at = static_cast<LdmatrixOperand *>(operands[matrix * 8 + row])->address;
            unsigned same = 1;
            for (unsigned other = 0; other < row; ++other) {
                const std::uintptr_t to = static_cast<LdmatrixOperand *>(operands[matrix * 8 + other])->address;
                same += to != at && to / 16 % 8 == at / 16 % 8;
            }
            most = same > most ? same : most;
        }
        counters().bank_conflicts += most - 1;
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
        auto &mine = *static_cast<LdmatrixOperand *>(operands[lane]);
        for (unsigned matrix = 0; matrix < 4; ++matrix) {
            unsigned short element[2];
            for (unsigned half = 0; half < 2; ++half) {
                const unsigned row = lane / 4, column = lane % 4 * 2 + half;
                const unsigned from_row = mine.transposed ? column : row, from_column = mine.transposed ? row : column;
                element[half] = static_cast<LdmatrixOperand *>(operands[matrix * 8 + from_row])->row[from_column];
            }
            mine.result[matrix] = std::uint32_t(element[0]) | std::uint32_t(element[1]) << 16;
        }
    }
}

inline void ldmatrix_x4(std::uint32_t (&result)[4], const void *row, bool transposed, const Location &where) {
    LdmatrixOperand operand;
    operand.address = reinterpret_cast<std::uintptr_t>(row), operand.transposed = transposed;
    if (operand.address % 16) fail("ldmatrix of a row that is not aligned to 16 bytes");
    const auto *elements = static_cast<const unsigned short *>(row);
    for (int column = 0; column < 8; ++column) operand.row[column] = elements[column];
    gather(Kind::Ldmatrix, 0xffffffffu, &operand, exchange_ldmatrix, where);
    for (int matrix = 0; matrix < 4; ++matrix) result[matrix] = operand.result[matrix];
}

struct MmaOperand {
    std::uint32_t a[4], b[2];
    float accumulator[4];
};

// Fragments of mma.m16n8k16 with bf16 inputs, PTX ISA; g = lane / 4, t = lane % 4, pairs with the lower column (a) or row (b) in the low
// half:
//   a[0] (g, 2t)  a[1] (g + 8, 2t)  a[2] (g, 2t + 8)  a[3] (g + 8, 2t + 8);  b[0] (2t, g)  b[1] (2t + 8, g)
//   accumulator[0..1] (g, 2t .. + 1), [2..3] (g + 8, 2t .. + 1)
EMULATION_UNSANITIZED inline void exchange_mma(void *const *operands, unsigned) {
    counters().mma += 1;
    double a[16][16], b[16][8], sum[16][8];
    union {
        std::uint32_t bits;
        float value;
    } word;
    for (unsigned lane = 0; lane < 32; ++lane) {
        const auto &mine = *static_cast<MmaOperand *>(operands[lane]);
        const unsigned g = lane / 4, t = lane % 4;
        for (unsigned part = 0; part < 4; ++part) {
            const unsigned row = g + part % 2 * 8, column = 2 * t + part / 2 * 8;
            word.bits = mine.a[part] << 16, a[row][column] = word.value;
            word.bits = mine.a[part] & 0xffff0000u, a[row][column + 1] = word.value;
            sum[g + part / 2 * 8][2 * t + part % 2] = mine.accumulator[part];
        }
        for (unsigned part = 0; part < 2; ++part) {
            const unsigned row = 2 * t + part * 8;
            word.bits = mine.b[part] << 16, b[row][g] = word.value;
            word.bits = mine.b[part] & 0xffff0000u, b[row + 1][g] = word.value;
        }
    }
    for (unsigned row = 0; row < 16; ++row) {
        for (unsigned inner = 0; inner < 16; ++inner) {
            for (unsigned column = 0; column < 8; ++column) sum[row][column] += a[row][inner] * b[inner][column];
        }
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
        auto &mine = *static_cast<MmaOperand *>(operands[lane]);
        for (unsigned part = 0; part < 4; ++part) mine.accumulator[part] = float(sum[lane / 4 + part / 2 * 8][lane % 4 * 2 + part % 2]);
    }
}

inline void mma_m16n8k16_bf16(float (&accumulator)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], const Location &where) {
    MmaOperand operand;
    for (int part = 0; part < 4; ++part) operand.a[part] = a[part], operand.accumulator[part] = accumulator[part];
    for (int part = 0; part < 2; ++part) operand.b[part] = b[part];
    gather(Kind::Mma, 0xffffffffu, &operand, exchange_mma, where);
    for (int part = 0; part < 4; ++part) accumulator[part] = operand.accumulator[part];
}

} // namespace emulation
