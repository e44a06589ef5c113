// The functions of the driver for device, context, modules and launches, as far as beamline's binaries import them, by their documented arguments. A call that a driver would refuse ends the
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
    enqueue(stream, work(call, [function = &function, arguments, block, shared, call] {
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

} // extern "C"
