// What comes back through the completions: requests that came to an end together.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "completion.h"
#include "pool.h"
#include "release_reason.h"
#include "request.h"
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
};

}  // namespace pyserve
