// Queues of work, and the order in which it is carried out.
//
// A stream carries out its own work in order. Between streams only events order anything, and what they leave open is decided by chance, anew
// at every wait: only what must be done; or everything else first; or any of it in any order.
#include "stand_in.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <unistd.h>

namespace stand_in {

std::mutex one_at_a_time;

void fail(const std::string &call, const std::string &why) {
    std::fprintf(stderr, "\nstand-in driver: %s: %s\n", call.c_str(), why.c_str());
    std::fflush(nullptr);
    _exit(86);
}

std::uint64_t setting(const char *name, std::uint64_t otherwise) {
    const char *said = std::getenv(name);
    return said ? std::strtoull(said, nullptr, 0) : otherwise;
}

namespace {

// A real queue holds about this number of operations before a call blocks.
constexpr std::size_t QUEUE = 1000;

struct Streams {
    std::vector<Stream *> all;
    std::set<Event *> events;
    std::string running = "no work";
    std::mt19937_64 random{setting("BEAMLINE_STAND_IN_SEED", 1)};
};

Streams &streams() {
    static auto *streams = new Streams;
    return *streams;
}

bool is_blocked(const Stream &stream) {
    const auto &waits_for = stream.queue.front().waits_for;
    return waits_for && !waits_for->done;
}

// The stream whose next operation must be carried out for this one to go on.
Stream *needed(Stream *stream) {
    while (is_blocked(*stream)) stream = stream->queue.front().waits_for->stream;
    return stream;
}

void carry_out_next(Stream &stream) {
    Operation next = std::move(stream.queue.front());
    stream.queue.pop_front();
    streams().running = next.what;
    if (next.carry_out) next.carry_out();
    streams().running = "no work";
    if (next.completes) next.completes->done = true;
}

// Carries out work until there is no more need; `wanted` is the stream that something waits for.
void carry_out(Stream *wanted, const std::function<bool()> &is_done) {
    enum { OnlyWhatIsNeeded, OthersFirst, Any };
    const auto order = streams().random() % 3;
    while (!is_done()) {
        std::vector<Stream *> ready;
        for (Stream *stream : streams().all) {
            if (!stream->queue.empty() && !is_blocked(*stream) && (order == Any || stream != wanted)) ready.push_back(stream);
        }
        Stream *next = needed(wanted);
        if (order != OnlyWhatIsNeeded && !ready.empty()) next = ready[streams().random() % ready.size()];
        carry_out_next(*next);
    }
}

} // namespace

Stream *make_stream() { return streams().all.emplace_back(new Stream); }

Stream &stream_of(const std::string &call, void *stream) {
    if (stream == nullptr || stream == reinterpret_cast<void *>(1) || stream == reinterpret_cast<void *>(2)) {
        fail(call, "a default stream is used, which orders itself with nothing here");
    }
    for (Stream *known : streams().all) {
        if (known == stream) return *known;
    }
    fail(call, "there is no such stream");
}

void destroy_stream(const std::string &call, void *stream) {
    Stream &known = stream_of(call, stream);
    wait_for_stream(call, known);
    auto &all = streams().all;
    // Records may still name it.
    all.erase(std::find(all.begin(), all.end(), &known));
}

Event *make_event() { return *streams().events.insert(new Event).first; }

Event &event_of(const std::string &call, void *event) {
    auto *known = static_cast<Event *>(event);
    if (streams().events.count(known) == 0) fail(call, "there is no such event");
    return *known;
}

void destroy_event(const std::string &call, void *event) {
    Event &known = event_of(call, event);
    streams().events.erase(&known);
    delete &known;
}

void enqueue(Stream &stream, Operation operation) {
    if (stream.queue.size() >= QUEUE) {
        carry_out(&stream, [&] { return stream.queue.size() < QUEUE / 2; });
    }
    stream.queue.push_back(std::move(operation));
}

void wait_for(const std::string &, const std::shared_ptr<Record> &record) {
    // An event that was never recorded is over.
    if (record && !record->done) carry_out(record->stream, [&] { return record->done; });
}

bool may_be_over(const std::shared_ptr<Record> &record) {
    if (record && !record->done && streams().random() % 2) wait_for("", record);
    return !record || record->done;
}

void wait_for_stream(const std::string &, Stream &stream) {
    if (!stream.queue.empty()) carry_out(&stream, [&] { return stream.queue.empty(); });
}

void wait_for_all(const std::string &call) {
    for (Stream *stream : streams().all) wait_for_stream(call, *stream);
}

std::string user_of_pinned(const void *address, std::size_t bytes) {
    const auto *first = static_cast<const unsigned char *>(address);
    for (Stream *stream : streams().all) {
        for (const Operation &operation : stream->queue) {
            const bool touches = operation.pinned && operation.pinned < first + bytes && first < operation.pinned + operation.pinned_bytes;
            if (touches) return operation.what;
        }
    }
    return {};
}

const std::string &being_carried_out() { return streams().running; }

} // namespace stand_in
