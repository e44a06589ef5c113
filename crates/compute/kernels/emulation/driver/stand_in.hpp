// A stand-in for the NVIDIA driver and cuBLAS, so that a binary built for a GPU runs where there is none: to rehearse, never to measure.
//
// Place in the flow: `cargo xtask gpu --rehearse` builds one library of this folder and ../library.cpp, names it libcuda.so.1, libcublas.so.13
// and so on, and puts it before the real ones. Kernels run through the emulation, products in plain loops, device memory is host memory.
//
//   memory.cpp    what was given out, and whether an address may be touched
//   streams.cpp   queues of work, events, and the order in which work is carried out
//   driver.cpp    the functions of the driver: device, context, modules, launches
//   queues.cpp    those for memory, copies, streams and events
//   cublas.cpp    those of cuBLAS
//   others.cpp    those of cuRAND and the CUDA runtime, which are linked and hardly used
//
// It is as lazy and as unkind as a driver may be. Work is carried out only when something waits for it, in any order that streams and events
// leave open (BEAMLINE_STAND_IN_SEED chooses); a copy out of page-locked memory reads it then. Memory is NaN when it is given out, fenced by
// pages that cannot be touched, and never given out again. What CUDA leaves undefined, or only happens to allow, ends the process with a
// message that names the call.
//
// What it cannot show: time; what the hardware's memory model allows; what a real driver refuses and this does not know of.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace stand_in {

// Ends the process: the host did what it may not.
[[noreturn]] void fail(const std::string &call, const std::string &why);

inline void require(bool holds, const char *call, const char *why) {
    if (!holds) fail(call, why);
}

// What functions of the driver return; 0 is what every function returns that did what it was asked.
constexpr int SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_READY = 600;

// One call at a time.
extern std::mutex one_at_a_time;
using Turn = std::lock_guard<std::mutex>;

// A number from the environment.
std::uint64_t setting(const char *name, std::uint64_t otherwise);

// ------------------------------------------------------------------------------------------------------------------------------------ memory

constexpr std::uint64_t ALIGNMENT = 256;

// A place in device memory that cannot be touched before `arrive`. 0 if the device has less memory.
std::uint64_t promise(std::size_t bytes);
// The memory is there, and is NaN.
void arrive(std::uint64_t address);
// It is not there any more. `call` says who gives it back.
void release(const std::string &call, std::uint64_t address);
// A release has been asked for; asking twice is an error.
void doom(const std::string &call, std::uint64_t address);
// These bytes were given out and not given back; `now` if they must be there already. `what` names them.
void check_device(const std::string &call, const char *what, std::uint64_t address, std::size_t bytes, bool now);
// Whether the address lies where device memory is given out.
bool is_device(std::uint64_t address);
struct Usage {
    std::size_t total, used, reserved;
};
Usage usage();
// Released memory stays with the process, as it does with the pool's threshold at its greatest.
void keep_released_memory();

void *allocate_pinned(std::size_t bytes);
void release_pinned(void *address);
// Whether these host bytes are page-locked; an error if some are and some are not, or if they are device memory.
bool is_pinned(const std::string &call, const void *address, std::size_t bytes);

// ----------------------------------------------------------------------------------------------------------------------------------- streams

// A point in a stream that something may wait for.
struct Stream;
struct Record {
    Stream *stream;
    bool done = false;
};

struct Operation {
    std::string what;
    std::function<void()> carry_out;
    // Not before this.
    std::shared_ptr<Record> waits_for;
    std::shared_ptr<Record> completes;
    // Page-locked memory that is read or written when it is carried out.
    const unsigned char *pinned = nullptr;
    std::size_t pinned_bytes = 0;
};

// Work on device memory that must be there when it is carried out.
inline Operation work(const std::string &call, std::function<void()> carry_out) { return {call, std::move(carry_out), nullptr, nullptr}; }

struct Stream {
    std::deque<Operation> queue;
};

struct Event {
    std::shared_ptr<Record> latest;
};

Stream *make_stream();
// A stream that was made and not destroyed. The default streams are refused: nothing here is to use them.
Stream &stream_of(const std::string &call, void *stream);
void destroy_stream(const std::string &call, void *stream);
Event *make_event();
Event &event_of(const std::string &call, void *event);
void destroy_event(const std::string &call, void *event);

void enqueue(Stream &stream, Operation operation);
// Carries out what must be done before this is.
void wait_for(const std::string &call, const std::shared_ptr<Record> &record);
// Whether this is over. Time passes between two calls: now and then it is by the second.
bool may_be_over(const std::shared_ptr<Record> &record);
void wait_for_stream(const std::string &call, Stream &stream);
void wait_for_all(const std::string &call);
// Whether queued work will touch this page-locked memory; its name, or nothing.
std::string user_of_pinned(const void *address, std::size_t bytes);
// What is being carried out, for messages.
const std::string &being_carried_out();

// ----------------------------------------------------------------------------------------------------------------------------------- context

// The driver was initialised, and the calling thread has a context.
void require_context(const std::string &call);

} // namespace stand_in
