// The requests of a lane: allocated by the loop, lent to the ring and the workers, given back by the loop.
//
// The lane and every batch result share the pool, so that a result that is drained after its lane has gone still
// finds its requests.
//
// Threads: loop thread only.
#pragma once

#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include "request.h"
#include "staging.h"

namespace pyserve {

// A request of the native lane. `inputs` and `owner` belong to the loop thread; workers only read `inputs`.
struct TensorRequest : Request {
    Inputs inputs;
    void* owner = nullptr;  // a Python object, opaque here
};

class RequestPool {
  public:
    TensorRequest* allocate() {
        if (free_.empty()) {
            const auto index = static_cast<uint32_t>(requests_.size());
            requests_.emplace_back().index = index;
            free_.push_back(index);
        }
        TensorRequest* request = &requests_[free_.back()];
        free_.pop_back();
        return request;
    }

    static uint64_t ticket_of(const Request& request) {
        return static_cast<uint64_t>(request.generation) << 32 | request.index;
    }

    // The request of a ticket, or nullptr if it has been freed.
    TensorRequest* find(uint64_t ticket) {
        const auto index = static_cast<uint32_t>(ticket);
        if (index >= requests_.size()) return nullptr;
        TensorRequest* request = &requests_[index];
        const bool is_same = ticket_of(*request) == ticket;
        return is_same && request->state.load(std::memory_order_acquire) != State::free ? request : nullptr;
    }

    // Takes a completed request back. Returns its owner.
    void* release(Request* request) {
        auto* tensor_request = static_cast<TensorRequest*>(request);
        tensor_request->inputs.clear();
        ++tensor_request->generation;
        tensor_request->state.store(State::free, std::memory_order_release);
        free_.push_back(tensor_request->index);
        return std::exchange(tensor_request->owner, nullptr);
    }

    void cancel_queued() {
        for (TensorRequest& request : requests_) request.try_move(State::queued, State::cancelled);
    }

  private:
    std::deque<TensorRequest> requests_;  // grows, never shrinks: pointers stay valid
    std::vector<uint32_t> free_;
};

}  // namespace pyserve
