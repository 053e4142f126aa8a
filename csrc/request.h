// One queued unit of work and its life, as one atomic word.
//
//     queued ──> batched ──> running ──> done
//        │          │           │
//        │          └───────────┴──> cancelled   answered already, or the client went away; the result is dropped
//        ├──> cancelled
//        └──> expired                            the deadline passed; it never runs
//
// Whoever ends a request does one compare-exchange; only the winner's outcome counts. A request always travels
// through the completions exactly once, whatever its end, and only the loop thread frees it there; so a pointer
// in the ring or in a batch is never dangling.
#pragma once

#include <atomic>
#include <cstdint>

#include "clock.h"

namespace pyserve {

enum class State : uint8_t { free, queued, batched, running, done, cancelled, expired };

struct Request {
    // Written by the loop thread before the push; atomic because a consumer may look at a request that another
    // consumer has claimed meanwhile (it then throws away what it saw).
    std::atomic<int64_t> queued_at{0};        // ns
    std::atomic<int64_t> deadline{never_ns};  // ns; not started after this
    std::atomic<int64_t> input_size{0};       // bytes

    // Written by the worker that runs it; read by the loop to tell how long it has been running.
    std::atomic<int64_t> started_at{0};  // ns; 0 until then

    // Loop thread before the push, loop thread after the completion.
    int64_t arrived_at = 0;  // ns
    uint32_t index = 0;      // in the lane's pool
    uint32_t generation = 0;

    std::atomic<State> state{State::free};

    // True for the one caller that moves the request from `from` to `to`.
    bool try_move(State from, State to) noexcept {
        return state.compare_exchange_strong(from, to, std::memory_order_acq_rel, std::memory_order_acquire);
    }

    // Any thread. False if it has ended already. A running request continues; its result is dropped.
    bool try_cancel() noexcept {
        State seen = state.load(std::memory_order_acquire);
        while (seen == State::queued || seen == State::batched || seen == State::running) {
            if (state.compare_exchange_weak(seen, State::cancelled, std::memory_order_acq_rel,
                                            std::memory_order_acquire))
                return true;
        }
        return false;
    }
};

}  // namespace pyserve
