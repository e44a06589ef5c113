// The functions of the driver for memory, copies, streams and events, as far as beamline's binaries import them.
#include "stand_in.hpp"

#include <cstring>

using namespace stand_in;

namespace {

// The one pool; its address is its name.
int pool_of_device;

} // namespace

extern "C" {

int cuMemGetInfo_v2(std::size_t *free, std::size_t *total) {
    Turn turn(one_at_a_time);
    require_context("cuMemGetInfo");
    const Usage now = usage();
    // What a pool keeps is not free to others, and is not told as free.
    *free = now.total - now.reserved, *total = now.total;
    return SUCCESS;
}

int cuDeviceGetDefaultMemPool(void **pool, int) {
    *pool = &pool_of_device;
    return SUCCESS;
}

int cuMemPoolSetAttribute(void *pool, int attribute, void *value) {
    Turn turn(one_at_a_time);
    require(pool == &pool_of_device, "cuMemPoolSetAttribute", "there is no such pool");
    require(attribute == 4, "cuMemPoolSetAttribute", "the stand-in knows the release threshold only");
    if (*static_cast<std::uint64_t *>(value) == ~std::uint64_t(0)) keep_released_memory();
    return SUCCESS;
}

int cuMemPoolGetAttribute(void *pool, int attribute, void *value) {
    Turn turn(one_at_a_time);
    require(pool == &pool_of_device, "cuMemPoolGetAttribute", "there is no such pool");
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
    enqueue(on, work("cuMemAllocAsync", [given] { arrive(given); }));
    *address = given;
    return SUCCESS;
}

int cuMemFreeAsync(std::uint64_t address, void *stream) {
    Turn turn(one_at_a_time);
    require_context("cuMemFreeAsync");
    Stream &on = stream_of("cuMemFreeAsync", stream);
    doom("cuMemFreeAsync", address);
    enqueue(on, work("cuMemFreeAsync", [address] { release("cuMemFreeAsync", address); }));
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
    Operation copy = work(name, [=] {
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
    Operation copy = work(name, [=] {
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
    enqueue(stream_of(name, stream), work(name, [=] {
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
    enqueue(stream_of(name, stream), work(name, [=] {
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
