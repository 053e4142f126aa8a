// Event count: sleep until something may have changed, with a deadline, without a mutex and without lost wake-ups.
//
//     key = waiter.prepare();          // from here on every notify is seen
//     if (there is something to do) { waiter.cancel(); ... }
//     else waiter.wait(key, deadline);
//
// A notify between prepare and wait changes the epoch, so that wait returns at once. Built on a futex, because
// std::atomic::wait has no deadline and std::counting_semaphore of libstdc++ can lose wake-ups.
//
// notify wakes every sleeper. Waking just one would let work lie untouched if that one thread is then
// descheduled before it looks, while others sleep; there are few sleepers and they look once.
//
// Threads: any.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

#include "clock.h"

namespace pyserve {

class Waiter {
    static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "a futex is a plain 32-bit word");

  public:
    uint32_t prepare() noexcept {
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        return epoch_.load(std::memory_order_seq_cst);
    }

    void cancel() noexcept { sleepers_.fetch_sub(1, std::memory_order_seq_cst); }

    // Returns after a notify that followed prepare(), at `deadline_ns` (steady clock), or for no reason.
    void wait(uint32_t key, int64_t deadline_ns) noexcept {
        if (epoch_.load(std::memory_order_seq_cst) == key) futex_wait(key, deadline_ns);
        cancel();
    }

    void notify() noexcept {
        // A read-modify-write, not a load: either it comes after the one in prepare and sees the sleeper, or the
        // one in prepare comes after it, synchronizes with it, and the sleeper's second look sees the change.
        if (sleepers_.fetch_add(0, std::memory_order_acq_rel) == 0) return;
        epoch_.fetch_add(1, std::memory_order_seq_cst);
        syscall(SYS_futex, word(), FUTEX_WAKE | FUTEX_PRIVATE_FLAG, INT_MAX, nullptr, nullptr, 0);
    }

    uint32_t sleepers() const noexcept { return sleepers_.load(std::memory_order_relaxed); }

  private:
    uint32_t* word() noexcept { return reinterpret_cast<uint32_t*>(&epoch_); }

    void futex_wait(uint32_t key, int64_t deadline_ns) noexcept {
        timespec deadline{};
        timespec* until = nullptr;
        if (deadline_ns != never_ns) {
            deadline.tv_sec = deadline_ns / 1'000'000'000;
            deadline.tv_nsec = deadline_ns % 1'000'000'000;
            until = &deadline;
        }
        // FUTEX_WAIT_BITSET takes an absolute time of CLOCK_MONOTONIC, which is what SteadyClock reads.
        syscall(SYS_futex, word(), FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, key, until, nullptr, FUTEX_BITSET_MATCH_ANY);
    }

    alignas(64) std::atomic<uint32_t> epoch_{0};
    std::atomic<uint32_t> sleepers_{0};
};

}  // namespace pyserve
