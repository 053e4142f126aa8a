// How long the stages of requests took that are done without Python. Standard library only; no Python.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pyserve {

// How long one stage took, as Python's telemetry.stage_times.
struct StageCounts {
    std::vector<uint64_t> counts;  // of each bound, and of what is above all
    double total_s = 0;

    void observe(const std::vector<double>& bounds, double seconds) {
        counts.resize(bounds.size() + 1);
        const auto bound = std::lower_bound(bounds.begin(), bounds.end(), seconds);
        ++counts[static_cast<size_t>(bound - bounds.begin())];
        total_s += seconds;
    }
};

}  // namespace pyserve
