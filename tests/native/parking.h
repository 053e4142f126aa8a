// What the tests put in place of the probe and the clock.
#pragma once

#include <atomic>
#include <cstdint>

#include "probe.h"

// A clock that stands still until a test moves it.
struct HandClock {
    static inline std::atomic<int64_t> time{0};
    static int64_t now_ns() noexcept { return time.load(std::memory_order_relaxed); }
};

// Parks one thread, the victim, at its n-th visit of one point, until it is released.
class Parking {
  public:
    static void arm(pyserve::Point point, int visit) {
        point_ = point;
        visits_left_ = visit;
        parked_ = false;
        released_ = false;
    }

    // Called by the thread that shall be stalled.
    static void become_victim() { is_victim_ = true; }
    static bool is_parked() { return parked_.load(); }
    static void release() {
        released_ = true;
        released_.notify_all();
    }

    static void at(pyserve::Point point) noexcept {
        if (!is_victim_ || point != point_.load()) return;
        if (visits_left_.fetch_sub(1) != 1) return;
        parked_ = true;
        released_.wait(false);
        parked_ = false;
    }

  private:
    static inline std::atomic<pyserve::Point> point_{};
    static inline std::atomic<int> visits_left_{0};
    static inline std::atomic<bool> parked_{false};
    static inline std::atomic<bool> released_{false};
    static inline thread_local bool is_victim_ = false;
};
