// What comes back through the completions: requests that came to an end together.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "clock.h"
#include "completion.h"
#include "pool.h"
#include "release_reason.h"
#include "request.h"
#include "stats.h"
#include "status.h"

namespace pyserve {

struct Result : CompletionNode {
    enum class Lane : uint8_t { native, process };

    explicit Result(Lane of) : lane(of) {}
    virtual ~Result() = default;

    const Lane lane;
    std::vector<Request*> requests;
    Status status;                       // one for all of them
    int64_t started_at = 0;              // ns: taken from the queue
    int64_t staged_at = 0;               // ns: gathered and on its way
    int64_t finished_at = 0;             // ns: outputs on the host
    uint32_t batch_size = 0;             // of the batch that they were part of
    Release release = Release::none;     // of that batch
    std::shared_ptr<RequestOwner> pool;  // that `requests` go back to

    // It is the end of requests that expired or were cancelled before a worker began them, and counts them.
    void end_unbegun(std::vector<Request*>& unbegun, LaneStats& stats) {
        status.code = Code::cancelled;  // each request's own state tells expired from cancelled
        started_at = staged_at = finished_at = SteadyClock::now_ns();
        for (const Request* request : unbegun) {
            const bool expired = request->state.load(std::memory_order_acquire) == State::expired;
            (expired ? stats.expired : stats.cancelled).fetch_add(1, std::memory_order_relaxed);
        }
        requests = std::move(unbegun);
        unbegun.clear();
    }
};

}  // namespace pyserve
