// The stand-in for the driver: that it does work in the order of streams and events and in no other, and that it ends the process where a host
// does what it may not. Each misuse runs in a process of its own, which must end with a message that names the call.
#include "library.cpp"

#include "driver/cublas.cpp"
#include "driver/driver.cpp"
#include "driver/memory.cpp"
#include "driver/queues.cpp"
#include "driver/streams.cpp"

#include <sys/wait.h>

namespace {

int complaints = 0;

void expect(bool holds, const std::string &what) {
    if (holds) return;
    std::printf("FAILED: %s\n", what.c_str());
    complaints += 1;
}

// What a process says that does this, and its exit status.
std::pair<int, std::string> said_by(const std::function<void()> &deed) {
    int ends[2];
    if (pipe(ends) != 0) std::abort();
    std::fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        deed();
        _exit(0);
    }
    close(ends[1]);
    std::string said;
    char part[512];
    for (ssize_t got; (got = read(ends[0], part, sizeof part)) > 0;) said.append(part, std::size_t(got));
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, said};
}

void refused(const std::string &call, const std::string &why, const std::function<void()> &deed) {
    const auto [status, said] = said_by(deed);
    expect(status == 86 && said.find(call) != std::string::npos && said.find(why) != std::string::npos,
        call + ", " + why + ": ended with " + std::to_string(status) + " and said " + said);
}

struct Device {
    void *context = nullptr, *stream = nullptr, *other = nullptr;
    Device() {
        cuInit(0);
        cuDevicePrimaryCtxRetain(&context, 0);
        cuCtxSetCurrent(context);
        cuStreamCreate(&stream, 1);
        cuStreamCreate(&other, 1);
    }
    std::uint64_t memory(std::size_t bytes) {
        std::uint64_t address = 0;
        cuMemAllocAsync(&address, bytes, stream);
        cuStreamSynchronize(stream);
        return address;
    }
    unsigned char *pinned(std::size_t bytes, unsigned char value) {
        void *address = nullptr;
        cuMemHostAlloc(&address, bytes, 0);
        std::memset(address, value, bytes);
        return static_cast<unsigned char *>(address);
    }
    void *event() {
        void *event = nullptr;
        cuEventCreate(&event, 2);
        return event;
    }
};

void work_is_lazy_and_in_order() {
    Device device;
    const auto a = device.memory(256);
    auto *from = device.pinned(256, 1), *to = device.pinned(256, 0);
    cuMemcpyHtoDAsync_v2(a, from, 256, device.stream);
    cuMemcpyDtoHAsync_v2(to, a, 256, device.stream);
    expect(to[0] == 0xff, "a copy to the host has not happened before it is waited for");
    from[0] = 9;
    cuStreamSynchronize(device.stream);
    expect(to[0] == 9 && to[1] == 1, "page-locked memory is read when the copy is carried out");
    unsigned char pageable[4] = {5, 5, 5, 5};
    cuMemcpyHtoDAsync_v2(a, pageable, 4, device.stream);
    pageable[0] = 6;
    cuMemcpyDtoHAsync_v2(to, a, 4, device.stream);
    cuStreamSynchronize(device.stream);
    expect(to[0] == 5, "pageable memory is read at once");
}

// How often the second stream saw what the first wrote.
int seen(Device &device, bool ordered) {
    const auto a = device.memory(256);
    auto *to = device.pinned(256, 0);
    void *written = device.event();
    int count = 0;
    for (int round = 0; round < 60; ++round) {
        cuMemsetD8Async(a, 0, 256, device.stream);
        cuStreamSynchronize(device.stream);
        cuMemsetD8Async(a, 7, 256, device.stream);
        cuEventRecord(written, device.stream);
        if (ordered) cuStreamWaitEvent(device.other, written, 0);
        cuMemcpyDtoHAsync_v2(to, a, 256, device.other);
        if (round % 2) cuStreamSynchronize(device.other);
        else cuCtxSynchronize();
        count += to[0] == 7;
    }
    return count;
}

void events_order_streams_and_nothing_else_does() {
    Device device;
    expect(seen(device, true) == 60, "what waits for an event comes after it");
    const int lucky = seen(device, false);
    expect(lucky > 0 && lucky < 60, "what waits for nothing comes before or after: " + std::to_string(lucky) + " of 60");
    void *event = device.event();
    expect(cuEventSynchronize(event) == 0, "an event that was never recorded is over");
    bool over = false;
    cuEventRecord(event, device.stream);
    for (int ask = 0; ask < 100 && !over; ++ask) over = cuEventQuery(event) == 0;
    expect(over, "asked often enough, work gets done");
}

void products_are_products() {
    Device device;
    void *handle = nullptr;
    cublasCreate_v2(&handle);
    cublasSetStream_v2(handle, device.stream);
    cublasSetWorkspace_v2(handle, reinterpret_cast<void *>(device.memory(4096)), 4096);
    // Two rows of three values with four of weights, in bf16: 1, 2, 3 and 4, 5, 6.
    const std::uint16_t x[] = {0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0}, w[] = {0x3f80, 0, 0, 0, 0x3f80, 0, 0, 0, 0x3f80, 0x3f80, 0x3f80, 0x3f80};
    const auto left = device.memory(sizeof w), right = device.memory(sizeof x), out = device.memory(8 * 4);
    cuMemcpyHtoDAsync_v2(left, w, sizeof w, device.stream);
    cuMemcpyHtoDAsync_v2(right, x, sizeof x, device.stream);
    const float one = 1, zero = 0;
    const auto pointer = [](std::uint64_t address) { return reinterpret_cast<void *>(address); };
    cublasGemmEx(handle, 1, 0, 4, 2, 3, &one, pointer(left), 14, 3, pointer(right), 14, 3, &zero, pointer(out), 0, 4, 68, -1);
    float got[8];
    cuMemcpyDtoHAsync_v2(got, out, sizeof got, device.stream);
    const float expected[] = {1, 2, 3, 6, 4, 5, 6, 15};
    expect(std::memcmp(got, expected, sizeof got) == 0, "a product");
    refused("cublasGemmEx", "no workspace", [&] {
        cublasSetStream_v2(handle, device.stream);
        cublasGemmEx(handle, 1, 0, 4, 2, 3, &one, pointer(left), 14, 3, pointer(right), 14, 3, &zero, pointer(out), 0, 4, 68, -1);
    });
    refused("cublasGemmEx", "end behind an allocation", [&] {
        cublasGemmEx(handle, 1, 0, 4, 3, 3, &one, pointer(left), 14, 3, pointer(right), 14, 3, &zero, pointer(out), 0, 4, 68, -1);
    });
    refused("cublasGemmEx", "leading dimension", [&] {
        cublasGemmEx(handle, 1, 0, 4, 2, 3, &one, pointer(left), 14, 3, pointer(right), 14, 3, &zero, pointer(out), 0, 2, 68, -1);
    });
}

void fills_with_a_kernel(Device &device, std::uint64_t to, std::uint64_t values, unsigned shared) {
    const std::uint32_t magic[2] = {0xba55ed50u, 0};
    void *module = nullptr, *function = nullptr;
    alignas(8) unsigned char image[16];
    std::memcpy(image, magic, sizeof magic);
    cuModuleLoadData(&module, image);
    cuModuleGetFunction(&function, module, "fill_normal");
    std::uint32_t seed = 1;
    float deviation = 1;
    void *arguments[] = {&to, &values, &seed, &deviation};
    cuLaunchKernel(function, 1, 1, 1, 256, 1, 1, shared, device.stream, arguments, nullptr);
    seed = 99, values = 0; // They were taken when it was asked for.
    cuStreamSynchronize(device.stream);
}

void misuse_ends_the_process() {
    Device device;
    const auto memory = device.memory(1000);
    auto *pinned = device.pinned(256, 0);
    refused("cuMemcpyHtoDAsync", "end behind an allocation of 1000", [&] { cuMemcpyHtoDAsync_v2(memory + 900, pinned, 101, device.stream); });
    refused("cuMemcpyHtoDAsync", "ends behind a piece of page-locked memory", [&] { cuMemcpyHtoDAsync_v2(memory, pinned + 200, 57, device.stream); });
    refused("cuMemsetD8Async", "not device memory", [&] { cuMemsetD8Async(0x1234, 0, 1, device.stream); });
    refused("cuMemsetD8Async", "default stream", [&] { cuMemsetD8Async(memory, 0, 1, nullptr); });
    refused("cuMemFreeHost", "still uses", [&] {
        cuMemcpyHtoDAsync_v2(memory, pinned, 256, device.stream);
        cuMemFreeHost(pinned);
    });
    refused("cuMemsetD8Async", "was released", [&] {
        cuMemFreeAsync(memory, device.stream);
        cuMemsetD8Async(memory, 0, 1, device.stream);
    });
    refused("cuMemFreeAsync", "given back before", [&] {
        cuMemFreeAsync(memory, device.stream);
        cuMemFreeAsync(memory, device.stream);
    });
    refused("cuMemsetD8Async", "was released", [&] {
        cuMemsetD8Async(memory, 0, 1, device.other);
        cuMemFreeAsync(memory, device.stream);
        cuStreamSynchronize(device.stream);
        cuStreamSynchronize(device.other);
        // By chance the other stream came first: again.
        for (int round = 0; round < 40; ++round) {
            const auto again = device.memory(100);
            cuMemsetD8Async(again, 0, 1, device.other);
            cuMemFreeAsync(again, device.stream);
            cuStreamSynchronize(device.stream);
        }
        cuCtxSynchronize();
    });
    refused("cuFuncSetAttribute", "101377 bytes of shared memory", [&] {
        void *function = new stand_in::Function{};
        cuFuncSetAttribute(function, 8, 101377);
    });
    refused("cuLaunchKernel of fill_normal", "where cuFuncSetAttribute allowed", [&] { fills_with_a_kernel(device, memory, 500, 50000); });
    refused("cuLaunchKernel of fill_normal", "behind an allocation of 1000", [&] { fills_with_a_kernel(device, memory, 5000, 0); });
    refused("cuMemFreeAsync", "written behind an allocation of 1000", [&] {
        fills_with_a_kernel(device, memory, 501, 0);
        cuMemFreeAsync(memory, device.stream);
        cuStreamSynchronize(device.stream);
    });
    fills_with_a_kernel(device, memory, 500, 0);
    std::uint16_t got[500];
    cuMemcpyDtoHAsync_v2(got, memory, sizeof got, device.stream);
    expect(std::count(got, got + 500, 0xffff) == 0, "a kernel runs");
}

} // namespace

int main() {
    // Before this process has one.
    refused("cuStreamCreate", "no context", [] {
        cuInit(0);
        void *stream;
        cuStreamCreate(&stream, 1);
    });
    work_is_lazy_and_in_order();
    events_order_streams_and_nothing_else_does();
    products_are_products();
    misuse_ends_the_process();
    if (complaints == 0) std::printf("the stand-in for the driver: all as promised\n");
    return complaints != 0;
}
