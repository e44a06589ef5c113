// The functions of the driver that beamline's binaries import, by their documented arguments. A call that a driver would refuse ends the
// process; only the lack of memory is told the caller, who is to live with it.
#include "stand_in.hpp"

#include <cstdio>
#include <cstring>
#include <map>

extern "C" const std::uint32_t *emulated_parameters(const char *name, std::uint32_t *count);
extern "C" int emulated_launch(const char *name, const std::uint32_t *grid, std::uint32_t block, std::uint32_t shared, void **arguments,
                               std::uint32_t count, char *message, std::size_t message_size);

namespace stand_in {
namespace {

constexpr int INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_READY = 600;

// Shared memory that a block may have with permission, on the least of the devices that kernels are built for; and without.
const std::uint32_t most_shared = std::uint32_t(setting("BEAMLINE_STAND_IN_SHARED", 99 * 1024));
constexpr std::uint32_t DEFAULT_SHARED = 48 * 1024;

struct Function {
    std::string name;
    const std::uint32_t *bytes;
    std::uint32_t parameters;
    std::uint32_t shared = DEFAULT_SHARED;
};

struct Module {
    std::map<std::string, Function> functions;
};

bool is_initialised = false;
int primary_retained = 0;
int primary; // Its address is the context.
thread_local void *current = nullptr;

} // namespace

void require_context(const std::string &call) {
    if (!is_initialised) fail(call, "called before cuInit");
    if (current == nullptr) fail(call, "the calling thread has no context");
    if (primary_retained <= 0) fail(call, "the context was released");
}

namespace {

// Carried out in the order of the stream, on device memory that must be there by then.
Operation on_device(const char *call, std::function<void()> carry_out) { return {call, std::move(carry_out), nullptr, nullptr}; }

int launch(const Function &function, const std::uint32_t (&grid)[3], std::uint32_t block, std::uint32_t shared, Stream &stream, void **parameters) {
    const std::string call = "cuLaunchKernel of " + function.name;
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) fail(call, "a grid without blocks");
    if (grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535) fail(call, "a grid that is too large");
    if (block == 0 || block > 1024) fail(call, std::to_string(block) + " threads in a block");
    if (shared > function.shared) {
        fail(call, std::to_string(shared) + " bytes of shared memory, where cuFuncSetAttribute allowed " + std::to_string(function.shared));
    }
    // The driver copies the arguments before it returns.
    struct Arguments {
        std::vector<std::uint64_t> values;
        std::uint32_t grid[3];
    };
    auto arguments = std::make_shared<Arguments>();
    arguments->values.resize(function.parameters);
    std::memcpy(arguments->grid, grid, sizeof grid);
    for (std::uint32_t at = 0; at < function.parameters; ++at) {
        if (parameters == nullptr || parameters[at] == nullptr) fail(call, "argument " + std::to_string(at) + " is missing");
        std::memcpy(&arguments->values[at], parameters[at], function.bytes[at]);
        const bool is_address = function.bytes[at] == 8 && is_device(arguments->values[at]);
        if (is_address) check_device(call, "an argument", arguments->values[at], 1, false);
    }
    enqueue(stream, on_device(call.c_str(), [function = &function, arguments, block, shared, call] {
        std::vector<void *> places;
        for (std::uint32_t at = 0; at < function->parameters; ++at) {
            auto &value = arguments->values[at];
            if (function->bytes[at] == 8 && is_device(value)) check_device(call, "an argument", value, 1, true);
            places.push_back(&value);
        }
        char message[1024];
        const int failed = emulated_launch(
            function->name.c_str(), arguments->grid, block, shared, places.data(), function->parameters, message, sizeof message);
        if (failed) fail(call, message);
    }));
    return SUCCESS;
}

} // namespace
} // namespace stand_in

using namespace stand_in;

extern "C" {

// ----------------------------------------------------------------------------------------------------------------- device, context, errors

int cuInit(unsigned flags) {
    Turn turn(one_at_a_time);
    require(flags == 0, "cuInit", "flags must be 0");
    if (!is_initialised) std::fprintf(stderr, "stand-in driver: this is no GPU; nothing that is measured means anything\n");
    is_initialised = true;
    return SUCCESS;
}

int cuDeviceGet(int *device, int ordinal) {
    require(is_initialised, "cuDeviceGet", "called before cuInit");
    if (ordinal != 0) return 101; // CUDA_ERROR_INVALID_DEVICE
    *device = 0;
    return SUCCESS;
}

int cuDeviceGetName(char *name, int bytes, int) {
    std::snprintf(name, std::size_t(bytes), "stand-in, no GPU");
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int) {
    switch (attribute) {
    case 16: *value = 4; break;   // multiprocessors
    case 75: *value = 9; break;   // compute capability
    case 76: *value = 0; break;
    case 115: *value = 1; break;  // memory pools
    default: fail("cuDeviceGetAttribute", "the stand-in does not know attribute " + std::to_string(attribute));
    }
    return SUCCESS;
}

int cuGetErrorString(int error, const char **said) {
    *said = error == OUT_OF_MEMORY ? "out of memory" : error == 101 ? "invalid device ordinal" : error == SUCCESS ? "no error" : "an error of the stand-in";
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void **context, int) {
    Turn turn(one_at_a_time);
    require(is_initialised, "cuDevicePrimaryCtxRetain", "called before cuInit");
    primary_retained += 1;
    *context = &primary;
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int) {
    Turn turn(one_at_a_time);
    require(primary_retained > 0, "cuDevicePrimaryCtxRelease", "it was released before");
    wait_for_all("cuDevicePrimaryCtxRelease");
    primary_retained -= 1;
    return SUCCESS;
}

int cuCtxGetCurrent(void **context) {
    require(is_initialised, "cuCtxGetCurrent", "called before cuInit");
    *context = current;
    return SUCCESS;
}

int cuCtxSetCurrent(void *context) {
    require(context == nullptr || context == &primary, "cuCtxSetCurrent", "there is no such context");
    current = context;
    return SUCCESS;
}

int cuCtxSynchronize() {
    Turn turn(one_at_a_time);
    require_context("cuCtxSynchronize");
    wait_for_all("cuCtxSynchronize");
    return SUCCESS;
}

int cuCtxDestroy_v2(void *) { fail("cuCtxDestroy", "the primary context is released, not destroyed"); }

// -------------------------------------------------------------------------------------------------------------------------------- modules

int cuModuleLoadData(void **module, const void *image) {
    Turn turn(one_at_a_time);
    require_context("cuModuleLoadData");
    std::uint32_t magic;
    std::memcpy(&magic, image, sizeof magic);
    require(magic == 0xba55ed50u, "cuModuleLoadData", "this is no fat binary");
    require(reinterpret_cast<std::uintptr_t>(image) % 8 == 0, "cuModuleLoadData", "the image is not aligned to 8 bytes");
    *module = new Module;
    return SUCCESS;
}

int cuModuleLoad(void **, const char *path) { fail("cuModuleLoad", std::string("of a file, ") + path); }

int cuModuleUnload(void *module) {
    Turn turn(one_at_a_time);
    require_context("cuModuleUnload");
    wait_for_all("cuModuleUnload");
    delete static_cast<Module *>(module);
    return SUCCESS;
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    Turn turn(one_at_a_time);
    require_context("cuModuleGetFunction");
    std::uint32_t count = 0;
    const std::uint32_t *bytes = emulated_parameters(name, &count);
    if (bytes == nullptr) return 500; // CUDA_ERROR_NOT_FOUND
    auto &functions = static_cast<Module *>(module)->functions;
    *function = &functions.try_emplace(name, Function{name, bytes, count}).first->second;
    return SUCCESS;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    Turn turn(one_at_a_time);
    require_context("cuFuncSetAttribute");
    require(attribute == 8, "cuFuncSetAttribute", "the stand-in knows the size of shared memory only");
    if (value < 0 || std::uint32_t(value) > most_shared) {
        fail("cuFuncSetAttribute", std::to_string(value) + " bytes of shared memory; a block may have " + std::to_string(most_shared));
    }
    static_cast<Function *>(function)->shared = std::uint32_t(value);
    return SUCCESS;
}

int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    Turn turn(one_at_a_time);
    require_context("cuLaunchKernel");
    require(function != nullptr, "cuLaunchKernel", "no kernel");
    require(block_y == 1 && block_z == 1 && extra == nullptr, "cuLaunchKernel", "the stand-in knows blocks in one dimension only");
    return launch(*static_cast<Function *>(function), {grid_x, grid_y, grid_z}, block_x, shared, stream_of("cuLaunchKernel", stream), parameters);
}

// --------------------------------------------------------------------------------------------------------------------------------- memory

int cuMemGetInfo_v2(std::size_t *free, std::size_t *total) {
    Turn turn(one_at_a_time);
    require_context("cuMemGetInfo");
    const Usage now = usage();
    // What a pool keeps is not free to others, and is not told as free.
    *free = now.total - now.reserved, *total = now.total;
    return SUCCESS;
}

int cuDeviceGetDefaultMemPool(void **pool, int) {
    require(is_initialised, "cuDeviceGetDefaultMemPool", "called before cuInit");
    *pool = &primary_retained;
    return SUCCESS;
}

int cuMemPoolSetAttribute(void *pool, int attribute, void *value) {
    Turn turn(one_at_a_time);
    require(pool == &primary_retained, "cuMemPoolSetAttribute", "there is no such pool");
    require(attribute == 4, "cuMemPoolSetAttribute", "the stand-in knows the release threshold only");
    if (*static_cast<std::uint64_t *>(value) == ~std::uint64_t(0)) keep_released_memory();
    return SUCCESS;
}

int cuMemPoolGetAttribute(void *pool, int attribute, void *value) {
    Turn turn(one_at_a_time);
    require(pool == &primary_retained, "cuMemPoolGetAttribute", "there is no such pool");
    require(attribute == 5 || attribute == 7, "cuMemPoolGetAttribute", "the stand-in knows what is reserved and what is used only");
    *static_cast<std::uint64_t *>(value) = attribute == 5 ? usage().reserved : usage().used;
    return SUCCESS;
}

int cuMemAllocAsync(std::uint64_t *address, std::size_t bytes, void *stream) {
    Turn turn(one_at_a_time);
    require_context("cuMemAllocAsync");
    require(bytes > 0, "cuMemAllocAsync", "of no bytes");
    Stream &on = stream_of("cuMemAllocAsync", stream);
    const std::uint64_t given = promise(bytes);
    if (given == 0) return OUT_OF_MEMORY;
    enqueue(on, on_device("cuMemAllocAsync", [given] { arrive(given); }));
    *address = given;
    return SUCCESS;
}

int cuMemFreeAsync(std::uint64_t address, void *stream) {
    Turn turn(one_at_a_time);
    require_context("cuMemFreeAsync");
    Stream &on = stream_of("cuMemFreeAsync", stream);
    doom("cuMemFreeAsync", address);
    enqueue(on, on_device("cuMemFreeAsync", [address] { release("cuMemFreeAsync", address); }));
    return SUCCESS;
}

int cuMemAlloc_v2(std::uint64_t *, std::size_t) { fail("cuMemAlloc", "memory is allocated in the order of a stream here"); }
int cuMemFree_v2(std::uint64_t) { fail("cuMemFree", "memory is released in the order of a stream here"); }

int cuMemHostAlloc(void **address, std::size_t bytes, unsigned flags) {
    Turn turn(one_at_a_time);
    require_context("cuMemHostAlloc");
    if (bytes == 0 || flags > 7) return INVALID_VALUE;
    *address = allocate_pinned(bytes);
    return SUCCESS;
}

int cuMemFreeHost(void *address) {
    Turn turn(one_at_a_time);
    require_context("cuMemFreeHost");
    release_pinned(address);
    return SUCCESS;
}

int cuMemcpyHtoDAsync_v2(std::uint64_t to, const void *from, std::size_t bytes, void *stream) {
    Turn turn(one_at_a_time);
    const char *name = "cuMemcpyHtoDAsync";
    require_context(name);
    Stream &on = stream_of(name, stream);
    check_device(name, "the target", to, bytes, false);
    const auto *source = static_cast<const unsigned char *>(from);
    std::shared_ptr<std::vector<unsigned char>> staged;
    if (!is_pinned(name, from, bytes)) {
        // Pageable memory has been read when the call returns.
        staged = std::make_shared<std::vector<unsigned char>>(source, source + bytes);
        source = staged->data();
    }
    Operation copy = on_device(name, [=] {
        check_device(name, "the target", to, bytes, true);
        std::memcpy(reinterpret_cast<void *>(to), source, bytes);
        (void)staged;
    });
    if (!staged) copy.pinned = source, copy.pinned_bytes = bytes;
    enqueue(on, std::move(copy));
    return SUCCESS;
}

int cuMemcpyDtoHAsync_v2(void *to, std::uint64_t from, std::size_t bytes, void *stream) {
    Turn turn(one_at_a_time);
    const char *name = "cuMemcpyDtoHAsync";
    require_context(name);
    Stream &on = stream_of(name, stream);
    check_device(name, "the source", from, bytes, false);
    const bool pinned = is_pinned(name, to, bytes);
    // What is read before the copy has been waited for is nothing.
    if (pinned && user_of_pinned(to, bytes).empty()) std::memset(to, 0xff, bytes);
    Operation copy = on_device(name, [=] {
        check_device(name, "the source", from, bytes, true);
        std::memcpy(to, reinterpret_cast<const void *>(from), bytes);
    });
    if (pinned) copy.pinned = static_cast<unsigned char *>(to), copy.pinned_bytes = bytes;
    enqueue(on, std::move(copy));
    // To pageable memory it returns when the copy is done.
    if (!pinned) wait_for_stream(name, on);
    return SUCCESS;
}

int cuMemcpyDtoDAsync_v2(std::uint64_t to, std::uint64_t from, std::size_t bytes, void *stream) {
    Turn turn(one_at_a_time);
    const char *name = "cuMemcpyDtoDAsync";
    require_context(name);
    check_device(name, "the target", to, bytes, false), check_device(name, "the source", from, bytes, false);
    enqueue(stream_of(name, stream), on_device(name, [=] {
        check_device(name, "the target", to, bytes, true), check_device(name, "the source", from, bytes, true);
        std::memcpy(reinterpret_cast<void *>(to), reinterpret_cast<const void *>(from), bytes);
    }));
    return SUCCESS;
}

int cuMemcpyPeerAsync() { fail("cuMemcpyPeerAsync", "there is one device"); }

int cuMemsetD8Async(std::uint64_t address, unsigned char value, std::size_t bytes, void *stream) {
    Turn turn(one_at_a_time);
    const char *name = "cuMemsetD8Async";
    require_context(name);
    check_device(name, "the target", address, bytes, false);
    enqueue(stream_of(name, stream), on_device(name, [=] {
        check_device(name, "the target", address, bytes, true);
        std::memset(reinterpret_cast<void *>(address), value, bytes);
    }));
    return SUCCESS;
}

// --------------------------------------------------------------------------------------------------------------------- streams and events

int cuStreamCreate(void **stream, unsigned flags) {
    Turn turn(one_at_a_time);
    require_context("cuStreamCreate");
    require(flags == 1, "cuStreamCreate", "a stream that orders itself with the default stream");
    *stream = make_stream();
    return SUCCESS;
}

int cuStreamDestroy_v2(void *stream) {
    Turn turn(one_at_a_time);
    require_context("cuStreamDestroy");
    destroy_stream("cuStreamDestroy", stream);
    return SUCCESS;
}

int cuStreamSynchronize(void *stream) {
    Turn turn(one_at_a_time);
    require_context("cuStreamSynchronize");
    wait_for_stream("cuStreamSynchronize", stream_of("cuStreamSynchronize", stream));
    return SUCCESS;
}

int cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    Turn turn(one_at_a_time);
    require_context("cuStreamWaitEvent");
    require(flags == 0, "cuStreamWaitEvent", "flags must be 0");
    const auto &record = event_of("cuStreamWaitEvent", event).latest;
    Stream &on = stream_of("cuStreamWaitEvent", stream);
    if (record && !record->done) enqueue(on, {"cuStreamWaitEvent", {}, record, nullptr});
    return SUCCESS;
}

int cuStreamIsCapturing(void *, int *status) {
    *status = 0;
    return SUCCESS;
}

int cuEventCreate(void **event, unsigned flags) {
    Turn turn(one_at_a_time);
    require_context("cuEventCreate");
    if (flags > 3) return INVALID_VALUE;
    *event = make_event();
    return SUCCESS;
}

int cuEventDestroy_v2(void *event) {
    Turn turn(one_at_a_time);
    require_context("cuEventDestroy");
    destroy_event("cuEventDestroy", event);
    return SUCCESS;
}

int cuEventRecord(void *event, void *stream) {
    Turn turn(one_at_a_time);
    require_context("cuEventRecord");
    Stream &on = stream_of("cuEventRecord", stream);
    auto record = std::make_shared<Record>(Record{&on});
    event_of("cuEventRecord", event).latest = record;
    enqueue(on, {"cuEventRecord", {}, nullptr, record});
    return SUCCESS;
}

int cuEventSynchronize(void *event) {
    Turn turn(one_at_a_time);
    require_context("cuEventSynchronize");
    wait_for("cuEventSynchronize", event_of("cuEventSynchronize", event).latest);
    return SUCCESS;
}

int cuEventQuery(void *event) {
    Turn turn(one_at_a_time);
    require_context("cuEventQuery");
    return may_be_over(event_of("cuEventQuery", event).latest) ? SUCCESS : NOT_READY;
}

} // extern "C"
