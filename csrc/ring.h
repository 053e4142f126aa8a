// Bounded ring: one producer, many consumers, lock-free.
//
// Theory of operation. `head_` and `tail_` only ever grow; entry i lives in slot i & mask. The producer writes
// a slot and then moves the tail. A consumer reads the slots it wants first and then claims them by moving the
// head with one compare-exchange; if the head has moved meanwhile the exchange fails and what it read is
// thrown away. Nothing is written back to a slot by a consumer, so there is no state in which a consumer has
// begun and not finished: stalled before the exchange it holds nothing, stalled after it only its own entries.
// So no stalled consumer can stop the producer or another consumer, and the producer never waits for anyone.
// (Rings with a sequence number per slot do not have this property: a consumer that stalls between claim and
// release blocks the producer one lap later.)
//
// Why a slot read before the claim cannot be wrong after it: the producer overwrites entry h only after it has
// seen head > h (acquire). A consumer that reads the overwritten value (acquire, paired with the producer's
// release) therefore sees head > h too, and its exchange from h fails.
//
// Threads: try_push, one thread at a time; the rest, any thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <type_traits>

#include "probe.h"

namespace pyserve {

// std::hardware_destructive_interference_size warns in headers with gcc 12.
inline constexpr size_t cache_line_size = 64;

template <class T, class Probe = NoProbe>
class Ring {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "entries are copied through one atomic word");
    static_assert(std::atomic<T>::is_always_lock_free, "entries must fit a lock-free atomic");

  public:
    // `capacity` must be a power of two. `start` is where the counters begin; tests start them near overflow.
    explicit Ring(size_t capacity, uint64_t start = 0) : mask_(capacity - 1), head_(start), tail_(start) {
        if (capacity == 0 || (capacity & mask_) != 0) throw std::invalid_argument("capacity must be a power of two");
        slots_ = std::make_unique<std::atomic<T>[]>(capacity);
    }

    size_t capacity() const noexcept { return mask_ + 1; }

    // Wait-free. False when full.
    bool try_push(T entry) noexcept {
        const uint64_t tail = tail_.load(std::memory_order_relaxed);
        if (tail - head_.load(std::memory_order_acquire) > mask_) return false;
        slots_[tail & mask_].store(entry, std::memory_order_release);
        Probe::at(Point::ring_before_publish);
        tail_.store(tail + 1, std::memory_order_release);
        return true;
    }

    // Claims up to `max` entries from the front, in order, into `out`. Returns how many.
    //
    // `select(out, count)` sees what would be claimed and returns how many of them to take; it may run several
    // times, and what it sees is certain only if the claim succeeds. 0 leaves the ring as it is.
    template <class Select>
    size_t try_claim(T* out, size_t max, Select&& select) noexcept {
        uint64_t head = head_.load(std::memory_order_acquire);
        for (;;) {
            const uint64_t tail = tail_.load(std::memory_order_acquire);
            uint64_t count = tail - head;
            if (count == 0 || max == 0) return 0;
            if (count > max) count = max;
            // A stale head can be more than a lap behind. The claim will fail; stay inside the array meanwhile.
            if (count > capacity()) count = capacity();
            for (uint64_t i = 0; i < count; ++i) out[i] = slots_[(head + i) & mask_].load(std::memory_order_acquire);
            const size_t taken = select(out, static_cast<size_t>(count));
            if (taken == 0) {
                // Only believed if the head stood still while select looked.
                const uint64_t seen = head;
                head = head_.load(std::memory_order_acquire);
                if (head == seen) return 0;
                continue;
            }
            Probe::at(Point::ring_before_claim);
            if (head_.compare_exchange_weak(head, head + taken, std::memory_order_acq_rel, std::memory_order_acquire)) {
                Probe::at(Point::ring_after_claim);
                return taken;
            }
        }
    }

    size_t try_claim(T* out, size_t max) noexcept {
        return try_claim(out, max, [](const T*, size_t count) { return count; });
    }

    // A snapshot: an upper bound, and never above the capacity. 0 is exact: the ring was empty during the call.
    size_t size() const noexcept {
        const uint64_t head = head_.load(std::memory_order_acquire);
        const uint64_t tail = tail_.load(std::memory_order_acquire);
        // Between the two loads head may have moved on and the producer may have gone round.
        return static_cast<size_t>(std::min<uint64_t>(tail - head, capacity()));
    }

    // How many entries were ever pushed, modulo 2^64: unchanged means that nothing has come in since.
    uint64_t pushed() const noexcept { return tail_.load(std::memory_order_acquire); }

  private:
    const uint64_t mask_;
    std::unique_ptr<std::atomic<T>[]> slots_;
    alignas(cache_line_size) std::atomic<uint64_t> head_;  // moved by consumers
    alignas(cache_line_size) std::atomic<uint64_t> tail_;  // moved by the producer
};

}  // namespace pyserve
