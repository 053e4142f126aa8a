// What each of several processes holds of a sum that all of them share, such as bytes of request bodies.
//
//     memory = a page for each process, which that one writes and all others only read
//
// To take more a process writes what it would hold, and then adds up what the others hold: of two that take at the
// same time at least one sees the other. If it is too much it writes its former number again, so that the sum of what
// was granted never passes the limit; two that ask for the last of it at the same moment may both get nothing.
//
// What others wrote is taken for at most the limit. Nobody can write another one's page: who dies, or writes rubbish,
// leaves a wrong number in its own, and whoever looks after the processes sets it to 0.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace pyserve {

inline constexpr size_t ledger_page_size = 4096;
inline constexpr size_t ledger_count_max = 1024;
inline constexpr uint64_t ledger_size_max = uint64_t{1} << 48;

struct LedgerPage {
    std::atomic<uint64_t> held;
    std::atomic<int64_t> wants_until;  // ns, monotonic: it has found no room, and others are to make some
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<int64_t>::is_always_lock_free);
static_assert(sizeof(LedgerPage) <= ledger_page_size && std::is_standard_layout_v<LedgerPage>);

// One process's view. REQUIRES: `all` are `count` pages, of which `own` is one, mapped a second time to be written;
// one thread.
class LedgerView {
  public:
    LedgerView(const char* all, char* own, size_t count, size_t number, uint64_t size_max)
        : all_(all), own_(*reinterpret_cast<LedgerPage*>(own)), count_(count), number_(number), size_max_(size_max) {}

    // Holds `size` from now on, or as much as before if it is more and that is too much for all together.
    bool hold(uint64_t size) {
        own_.held.store(size, std::memory_order_seq_cst);
        if (size > held_ && (size > size_max_ || others() > size_max_ - size)) {
            own_.held.store(held_, std::memory_order_seq_cst);
            return false;
        }
        held_ = size;
        return true;
    }
    // Holds `size` from now on, however much that is.
    void charge(uint64_t size) {
        held_ = size;
        own_.held.store(size, std::memory_order_seq_cst);
    }
    void want(int64_t until) { own_.wants_until.store(until, std::memory_order_seq_cst); }

    // Of all others together.
    uint64_t others() const {
        uint64_t sum = 0;
        for (size_t i = 0; i < count_; ++i) {
            if (i != number_) sum += std::min(held_by(i), size_max_);
        }
        return sum;
    }
    // What nobody holds.
    uint64_t free() const {
        const uint64_t taken = held_ + others();
        return taken < size_max_ ? size_max_ - taken : 0;
    }
    // Others that find no room at `now`, ns.
    size_t wanting_count(int64_t now) const {
        return count_if([&](const LedgerPage& page) { return is_wanting(page, now); });
    }
    // Others that hold more than `floor`, or find no room at `now`.
    size_t busy_count(uint64_t floor, int64_t now) const {
        return count_if([&](const LedgerPage& page) {
            return is_wanting(page, now) || page.held.load(std::memory_order_relaxed) > floor;
        });
    }
    // As it stands there, whatever was written. REQUIRES: `number` is below the count.
    uint64_t held_by(size_t number) const { return page(number).held.load(std::memory_order_seq_cst); }

  private:
    // Nobody wants for longer than this: a number of a later time is rubbish.
    static constexpr int64_t wanting_max_ns = 60'000'000'000;

    static bool is_wanting(const LedgerPage& page, int64_t now) {
        const int64_t until = page.wants_until.load(std::memory_order_relaxed);
        return until > now && until - now <= wanting_max_ns;
    }
    const LedgerPage& page(size_t number) const {
        return *reinterpret_cast<const LedgerPage*>(all_ + number * ledger_page_size);
    }
    template <typename Is>
    size_t count_if(Is is) const {
        size_t found = 0;
        for (size_t i = 0; i < count_; ++i) found += i != number_ && is(page(i));
        return found;
    }

    const char* const all_;
    LedgerPage& own_;
    const size_t count_, number_;
    const uint64_t size_max_;
    uint64_t held_ = 0;
};

}  // namespace pyserve
