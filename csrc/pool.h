// The requests of a lane: allocated by the loop, lent to the ring and the workers, given back by the loop.
//
// The lane and every result share the pool, so that a result that is drained after its lane has gone still finds its
// requests.
//
// Threads: loop thread only.
#pragma once

#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "request.h"

namespace pyserve {

// What a result needs of the pool its requests came from.
class RequestOwner {
  public:
    virtual ~RequestOwner() = default;

    // Takes a completed request back. Returns its owner.
    virtual void* release(Request* request) = 0;

    static uint64_t ticket_of(const Request& request) {
        return static_cast<uint64_t>(request.generation) << 32 | request.index;
    }
};

// `T` is a Request with `void* owner` and `clear()`, which lets go of what it holds.
template <class T>
class Pool : public RequestOwner {
  public:
    T* allocate() {
        if (free_.empty()) {
            const auto index = static_cast<uint32_t>(requests_.size());
            // Room for all of them, so that a release needs no memory.
            if (free_.capacity() <= index) free_.reserve(2 * size_t{index} + 16);
            requests_.emplace_back().index = index;
            free_.push_back(index);
        }
        T* request = &requests_[free_.back()];
        free_.pop_back();
        return request;
    }

    // The request of a ticket, or nullptr if it has been freed.
    T* find(uint64_t ticket) {
        const auto index = static_cast<uint32_t>(ticket);
        if (index >= requests_.size()) return nullptr;
        T* request = &requests_[index];
        const bool is_same = ticket_of(*request) == ticket;
        return is_same && request->state.load(std::memory_order_acquire) != State::free ? request : nullptr;
    }

    void* release(Request* request) override {
        auto* mine = static_cast<T*>(request);
        mine->clear();
        ++mine->generation;
        mine->state.store(State::free, std::memory_order_release);
        free_.push_back(mine->index);
        return std::exchange(mine->owner, nullptr);
    }

    void cancel_queued() {
        for (T& request : requests_) request.try_move(State::queued, State::cancelled);
    }

  private:
    std::deque<T> requests_;  // grows, never shrinks: pointers stay valid
    std::vector<uint32_t> free_;
};

}  // namespace pyserve
