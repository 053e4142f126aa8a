// The control of the tests of stalls: a ring that blocks.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "parking.h"

// A sequence number per slot. Correct, and blocking: a slot is free again only when its consumer says so.
class SequencedRing {
  public:
    explicit SequencedRing(size_t capacity) : slots_(capacity) {
        for (size_t i = 0; i < capacity; ++i) slots_[i].sequence = i;
    }
    bool try_push(uint64_t entry) {
        Slot& slot = slots_[tail_ % slots_.size()];
        if (slot.sequence.load(std::memory_order_acquire) != tail_) return false;
        slot.entry = entry;
        slot.sequence.store(++tail_, std::memory_order_release);
        return true;
    }
    size_t try_claim(uint64_t* out, size_t) {
        uint64_t head = head_.load();
        for (;;) {
            Slot& slot = slots_[head % slots_.size()];
            const uint64_t sequence = slot.sequence.load(std::memory_order_acquire);
            if (sequence <= head) return 0;
            Parking::at(pyserve::Point::ring_before_claim);
            if (sequence != head + 1 || !head_.compare_exchange_strong(head, head + 1)) {
                head = head_.load();
                continue;
            }
            Parking::at(pyserve::Point::ring_after_claim);
            *out = slot.entry;
            slot.sequence.store(head + slots_.size(), std::memory_order_release);
            return 1;
        }
    }

  private:
    struct Slot {
        std::atomic<uint64_t> sequence{0};
        uint64_t entry = 0;
    };
    std::vector<Slot> slots_;
    std::atomic<uint64_t> head_{0};
    uint64_t tail_ = 0;
};
