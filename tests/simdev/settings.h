// What tests set, per device: delays, limits and faults; and what they count.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

namespace simdev {

constexpr auto device_type = c10::DeviceType::PrivateUse1;
constexpr int device_count_max = 8;
constexpr int64_t memory_max_default = int64_t{4} << 30;
constexpr unsigned char poison = 0xE5;  // as a float -1.4e23

// CUDA's numbers, which code may look at.
constexpr int error_out_of_memory = 2;
constexpr int error_assert = 710;
constexpr int error_capture_unsupported = 900;
constexpr int error_capture_invalidated = 901;

enum Kind { h2d, d2h, d2d, op, event, kind_count };
constexpr std::array<const char*, kind_count> kind_names{"h2d", "d2h", "d2d", "op", "event"};

inline Kind kind_of(const std::string& name) {
    for (int kind = 0; kind < kind_count; ++kind) {
        if (name == kind_names[static_cast<size_t>(kind)]) return static_cast<Kind>(kind);
    }
    TORCH_CHECK(false, "simdev: no kind of task is called ", name);
}

// Strikes at the n-th call from now, and at some after it.
class Countdown {
  public:
    void set(int64_t at, int64_t count = 1) {
        const std::lock_guard<std::mutex> lock(mutex_);
        at_ = at;
        count_ = count;
    }
    bool strikes() {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (at_ < 0) return false;
        if (at_ > 0) return --at_, false;
        if (--count_ <= 0) at_ = -1;
        return true;
    }

  private:
    std::mutex mutex_;
    int64_t at_ = -1;  // never
    int64_t count_ = 0;
};

// Where operators of a device wait while it hangs.
class Hang {
  public:
    // The release comes from another thread, and may be there before the operator is.
    void hold_if(Countdown& due) {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!due.strikes()) return;
        is_held_ = true;
        changed_.wait(lock, [this] { return !is_held_; });
    }
    void release(Countdown& due) {
        const std::lock_guard<std::mutex> lock(mutex_);
        due.set(-1);
        is_held_ = false;
        changed_.notify_all();
    }
    bool is_held() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return is_held_;
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool is_held_ = false;
};

struct DeviceState {
    std::atomic<int64_t> delay_us[kind_count]{};
    std::atomic<int64_t> memory_max{memory_max_default};
    Countdown failing_allocations;  // c10::OutOfMemoryError, as of the caching allocator
    Countdown failing_launches;     // AcceleratorError of code 2, as of the driver, cuBLAS or a module's load
    Countdown breaking_operator;
    Countdown hanging_operator;
    Hang hang;
    std::atomic<bool> is_broken{false};

    std::atomic<int64_t> launches{0}, waits{0}, allocations{0}, replays{0};
    std::atomic<int64_t> pageable_h2d{0}, pageable_d2h{0}, h2d_bytes{0}, d2h_bytes{0}, ran[kind_count]{};
    std::atomic<int> running[kind_count]{};
    std::atomic<int64_t> overlaps{0};  // copies that ran while an operator did, or the other way round
};
inline std::array<DeviceState, device_count_max> states;
inline DeviceState& state_of(int device) { return states.at(static_cast<size_t>(device)); }

inline std::atomic<bool> is_visible{true};    // whether torch sees any device
inline std::atomic<bool> strict_free{false};  // freeing memory raises on a broken device, as on CUDA
inline std::atomic<int64_t> pinned_max{int64_t{1} << 40};
inline std::atomic<int64_t> pinned_size{0}, pinned_allocations{0};
inline Countdown failing_pinned;

inline int device_count_set() {
    static const int count = [] {
        const char* text = std::getenv("SIMDEV_DEVICES");
        const int wanted = text == nullptr ? 2 : std::atoi(text);
        TORCH_CHECK(wanted >= 0 && wanted <= device_count_max, "SIMDEV_DEVICES=", text, " is not between 0 and ",
                    device_count_max);
        return wanted;
    }();
    return count;
}
inline int device_count() { return is_visible ? device_count_set() : 0; }

// A delay of each task by chance: of the seed, the stream (which one it is in the order of their first use), and how
// many tasks it had before. The same seed gives the same delays to the same work.
struct Chance {
    std::atomic<uint64_t> seed{0};
    std::atomic<int64_t> max_us{0};
    std::atomic<uint64_t> round{0};  // grows when it is set, so that all is counted from 0 again
    std::atomic<uint64_t> streams{0};

    void set(uint64_t new_seed, int64_t new_max_us) {
        seed = new_seed;
        max_us = new_max_us;
        streams = 0;
        ++round;
    }
    int64_t delay_us(uint64_t stream, uint64_t number) const {
        const int64_t most = max_us;
        if (most <= 0) return 0;
        uint64_t x = seed + 0x9E3779B97F4A7C15u * (number * 1024 + stream + 1);
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;  // splitmix64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
        x ^= x >> 31;
        return x % 4 != 0 ? 0 : static_cast<int64_t>((x >> 8) % static_cast<uint64_t>(most));  // most tasks at once
    }
};
inline Chance chance;

[[noreturn]] inline void raise(int code, const std::string& text) {
    throw c10::AcceleratorError({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, code, "simdev error: " + text);
}

inline void check_broken(int device) {
    if (!state_of(device).is_broken) return;
    raise(error_assert, "device-side assert triggered\nIt was raised by an earlier launch.");
}

// As a context of CUDA's does not survive a fork.
inline std::atomic<pid_t> user{0};
inline bool is_in_bad_fork() { return user != 0 && user != getpid(); }
inline void begin_use() {
    pid_t none = 0;
    if (user.compare_exchange_strong(none, getpid()) || none == getpid()) return;
    TORCH_CHECK(false, "Cannot re-initialize simdev in forked subprocess");
}

inline void reset_faults() {
    for (DeviceState& state : states) {
        for (auto& delay : state.delay_us) delay = 0;
        state.memory_max = memory_max_default;
        for (Countdown* each :
             {&state.failing_allocations, &state.failing_launches, &state.breaking_operator, &state.hanging_operator}) {
            each->set(-1);
        }
        state.hang.release(state.hanging_operator);
        state.is_broken = false;
    }
    strict_free = false;
    pinned_max = int64_t{1} << 40;
    failing_pinned.set(-1);
    chance.set(0, 0);
}

}  // namespace simdev
