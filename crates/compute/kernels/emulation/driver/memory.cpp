// What memory was given out, and whether an address may be touched.
//
// All of it comes from one range of addresses that is reserved at the start and cannot be touched: a piece is made accessible when it arrives
// and inaccessible when it is released, and no address is given out twice. So whatever a kernel touches outside of what is there ends in a
// fault, which is told with the name of the kernel.
#include "stand_in.hpp"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sys/mman.h>
#include <unistd.h>

namespace stand_in {
namespace {

constexpr std::uint64_t PAGE = 4096;
constexpr std::uint64_t RANGE = std::uint64_t(1) << 43;

enum class State { Promised, There, Doomed, Released };

struct Piece {
    std::size_t bytes;
    // The pages it lies in; it ends where they end, up to the alignment.
    std::uint64_t pages, pages_bytes;
    State state;
};

struct Memory {
    std::uint64_t base = 0, next = 0;
    std::map<std::uint64_t, Piece> device, pinned;
    std::size_t used = 0, reserved = 0;
    bool keeps = false;
};

struct sigaction before;

void at_fault(int signal, siginfo_t *info, void *context);

Memory &memory() {
    static Memory *memory = [] {
        auto *made = new Memory;
        void *range = mmap(nullptr, RANGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (range == MAP_FAILED) fail("cuInit", "no address space for device memory");
        made->base = made->next = reinterpret_cast<std::uint64_t>(range);
        struct sigaction action {};
        action.sa_sigaction = at_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &before);
        return made;
    }();
    return *memory;
}

void at_fault(int signal, siginfo_t *info, void *context) {
    const auto address = reinterpret_cast<std::uint64_t>(info->si_addr);
    if (is_device(address)) {
        char where[100];
        std::snprintf(where, sizeof where, "touches %#lx, where no memory is", (unsigned long)address);
        std::string near;
        for (auto &[start, piece] : memory().device) {
            if (address >= start && address < start + piece.bytes) near = piece.state == State::Released ? ": it was released" : ": it is not there yet";
            else if (address >= start + piece.bytes && address < start + piece.bytes + PAGE) near = ": behind an allocation of " + std::to_string(piece.bytes);
        }
        fail(being_carried_out(), where + near);
    }
    if (before.sa_flags & SA_SIGINFO) before.sa_sigaction(signal, info, context);
    else std::_Exit(139);
}

// Pages for this number of bytes, with an untouchable one behind them; returns where the bytes begin.
std::uint64_t take(std::size_t bytes, Piece &piece) {
    Memory &m = memory();
    const std::uint64_t rounded = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    piece = {bytes, m.next, (rounded + PAGE - 1) / PAGE * PAGE, State::Promised};
    m.next += piece.pages_bytes + PAGE;
    if (m.next > m.base + RANGE) fail("cuMemAllocAsync", "the stand-in has no addresses left");
    return piece.pages + piece.pages_bytes - rounded;
}

void open_pages(const Piece &piece) {
    void *pages = mmap(reinterpret_cast<void *>(piece.pages), piece.pages_bytes, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) fail("cuMemAllocAsync", "the machine has no memory for this");
    std::memset(pages, 0xff, piece.pages_bytes);
}

void close_pages(const std::string &call, std::uint64_t address, const Piece &piece) {
    for (std::uint64_t at = address + piece.bytes; at < piece.pages + piece.pages_bytes; ++at) {
        if (*reinterpret_cast<unsigned char *>(at) != 0xff) fail(call, "something was written behind an allocation of " + std::to_string(piece.bytes));
    }
    mmap(reinterpret_cast<void *>(piece.pages), piece.pages_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
}

std::size_t charged(std::size_t bytes) { return (bytes + 511) / 512 * 512; }

Piece &piece_at(const std::string &call, std::uint64_t address) {
    auto found = memory().device.find(address);
    if (found == memory().device.end()) fail(call, "this address was never given out");
    return found->second;
}

// The piece that holds an address, and where it begins.
std::pair<const std::uint64_t, Piece> *holder(std::map<std::uint64_t, Piece> &pieces, std::uint64_t address) {
    auto after = pieces.upper_bound(address);
    if (after == pieces.begin()) return nullptr;
    auto &found = *--after;
    return address < found.first + found.second.bytes ? &found : nullptr;
}

} // namespace

std::uint64_t promise(std::size_t bytes) {
    Memory &m = memory();
    const std::size_t total = usage().total;
    if (charged(bytes) > total - m.used) return 0;
    m.used += charged(bytes);
    if (m.used > m.reserved) m.reserved = m.used;
    Piece piece;
    const std::uint64_t address = take(bytes, piece);
    m.device.emplace(address, piece);
    return address;
}

void arrive(std::uint64_t address) {
    Piece &piece = piece_at("cuMemAllocAsync", address);
    open_pages(piece);
    if (piece.state == State::Promised) piece.state = State::There;
}

void doom(const std::string &call, std::uint64_t address) {
    Piece &piece = piece_at(call, address);
    if (piece.state == State::Doomed || piece.state == State::Released) fail(call, "this memory was given back before");
    piece.state = State::Doomed;
}

void release(const std::string &call, std::uint64_t address) {
    Piece &piece = piece_at(call, address);
    close_pages(call, address, piece);
    piece.state = State::Released;
    Memory &m = memory();
    m.used -= charged(piece.bytes);
    if (!m.keeps) m.reserved = m.used;
}

bool is_device(std::uint64_t address) {
    const Memory &m = memory();
    return address >= m.base && address < m.base + RANGE;
}

void check_device(const std::string &call, const char *what, std::uint64_t address, std::size_t bytes, bool now) {
    char said[40];
    std::snprintf(said, sizeof said, " %#lx", (unsigned long)address);
    const std::string name = what + std::string(said);
    auto *found = holder(memory().device, address);
    if (found == nullptr) fail(call, name + " is not device memory that was given out");
    const Piece &piece = found->second;
    if (piece.state == State::Released || (!now && piece.state == State::Doomed)) fail(call, name + " was released");
    if (now && piece.state == State::Promised) fail(call, name + " is used before its allocation was carried out: nothing orders the two");
    if (bytes > found->first + piece.bytes - address) {
        fail(call, name + " and " + std::to_string(bytes) + " bytes end behind an allocation of " + std::to_string(piece.bytes));
    }
}

Usage usage() {
    static const std::size_t total = setting("BEAMLINE_STAND_IN_MEMORY", std::uint64_t(3456) << 20);
    return {total, memory().used, memory().reserved};
}

void keep_released_memory() { memory().keeps = true; }

void *allocate_pinned(std::size_t bytes) {
    Piece piece;
    const std::uint64_t address = take(bytes, piece);
    open_pages(piece);
    memory().pinned.emplace(address, piece);
    return reinterpret_cast<void *>(address);
}

void release_pinned(void *address) {
    auto &pinned = memory().pinned;
    auto found = pinned.find(reinterpret_cast<std::uint64_t>(address));
    if (found == pinned.end()) fail("cuMemFreeHost", "this address was never given out");
    const std::string user = user_of_pinned(address, found->second.bytes);
    if (!user.empty()) fail("cuMemFreeHost", "work that was asked for still uses this memory: " + user);
    close_pages("cuMemFreeHost", found->first, found->second);
    pinned.erase(found);
}

bool is_pinned(const std::string &call, const void *address, std::size_t bytes) {
    const auto first = reinterpret_cast<std::uint64_t>(address);
    auto *found = holder(memory().pinned, first);
    if (found == nullptr) {
        if (is_device(first)) fail(call, "the host address is none: it is device memory, or was released");
        return false;
    }
    if (bytes > found->first + found->second.bytes - first) fail(call, "the copy ends behind a piece of page-locked memory");
    return true;
}

} // namespace stand_in
