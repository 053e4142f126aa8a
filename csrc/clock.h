// The clock of the data path: steady, nanoseconds. Passed in as a type, so that tests drive it by hand.
#pragma once

#include <chrono>
#include <cstdint>

namespace pyserve {

// Same time base as Python's time.monotonic_ns() on Linux (CLOCK_MONOTONIC).
struct SteadyClock {
    static int64_t now_ns() noexcept {
        return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
            .count();
    }
};

inline constexpr int64_t never_ns = INT64_MAX;

}  // namespace pyserve
