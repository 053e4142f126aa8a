// What the workers of a lane run before there are requests of that kind, and what came of it.
//
// A run is a number of rows of one item; item 0 is the lane's example, the others are of other shapes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "staging.h"

namespace pyserve {

// Constant once workers run.
struct WarmUpOptions {
    std::vector<Inputs> items;   // beside the example, on the host, each [1, ...]
    int64_t items_limit_ns = 0;  // no run of them begins later than this after a worker has begun to warm up
    int64_t sizes_limit_ns = 0;  // nor one of a size between; 0: none, nor any once larger batches are allowed
};

// Written by workers, read from the loop.
class WarmUpReport {
  public:
    using Run = std::pair<size_t, size_t>;  // item, rows

    void add(const Run& run) { note(run, {}, /*has_run=*/true); }
    // By this worker; another may have had the time, or the memory.
    void leave_out(const Run& run, const std::string& cause) { note(run, cause, /*has_run=*/false); }

    // Why each was left out; "" for those that were run.
    std::map<Run, std::string> runs() const {
        const std::lock_guard lock(mutex_);
        return causes_;
    }

  private:
    void note(const Run& run, const std::string& cause, bool has_run) {
        const std::lock_guard lock(mutex_);
        if (has_run)
            causes_[run].clear();
        else
            causes_.emplace(run, cause);
    }

    mutable std::mutex mutex_;
    std::map<Run, std::string> causes_;
};

struct WarmUpStep {
    WarmUpReport::Run run;
    int64_t limit_ns = 0;  // no later than this after the begin
};

}  // namespace pyserve
