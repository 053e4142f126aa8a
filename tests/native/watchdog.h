// Tells a test that stands still from one on a machine that is slow: by what the process does, not by the clock.
//
// A look is taken once a second. A test has stalled when, since its last step,
//   * all its threads were asleep at many looks in a row: there is nobody left to wake them. On a busy or suspended
//     machine threads are runnable or no look is taken, and a look of which nothing is known counts for nothing; or
//   * its threads have used more processor time than any test needs for a step: they go round and round. A machine
//     with other things to do gives less time, it does not make steps longer.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace harness {

inline std::atomic<uint64_t> steps{0};

// Says that a test got on: once per round, not per instruction. Loses some when threads meet, which is as good, and
// orders nothing between them: a read-modify-write would be a fence that the tested code does not have.
inline void step() { steps.store(steps.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed); }

struct StallLimits {
    std::chrono::microseconds look_interval = std::chrono::seconds(1);
    int asleep_looks_max = 60;
    int64_t work_max_ns = int64_t{600} * 1'000'000'000;  // processor time of all threads together
};

// The rule, without a clock or a thread.
class StallRule {
  public:
    explicit StallRule(const StallLimits& limits) : limits_(limits) {}

    // What is wrong, or nullptr. `worked_ns`: processor time of the process so far.
    const char* look(uint64_t steps_done, bool all_asleep, int64_t worked_ns) {
        if (!began_ || steps_done != steps_) {
            began_ = true;
            steps_ = steps_done;
            worked_ns_ = worked_ns;
            asleep_looks_ = 0;
            return nullptr;
        }
        asleep_looks_ = all_asleep ? asleep_looks_ + 1 : 0;
        if (asleep_looks_ >= limits_.asleep_looks_max) return "all threads sleep, and nobody is left to wake them";
        if (worked_ns - worked_ns_ > limits_.work_max_ns) return "threads go round and round without a step";
        return nullptr;
    }

  private:
    StallLimits limits_;
    bool began_ = false;
    uint64_t steps_ = 0;
    int64_t worked_ns_ = 0;
    int asleep_looks_ = 0;
};

// Sees whether threads sleep. The one that looks has a table of descriptors of its own, so that what it opens is in
// nobody's way: tests count descriptors, and make them run out. For the same reason nothing is allocated, and system
// calls are made by number: sanitizers watch the functions of the library.
class Sleepers {
  public:
    // REQUIRES: called by the thread that will look.
    Sleepers() : may_look_(unshare(CLONE_FILES) == 0) {}

    // Whether every thread of this process but the calling one sleeps. False when that cannot be seen.
    bool are_all() const {
        if (!may_look_) return false;
        const auto tasks = static_cast<int>(syscall(SYS_openat, AT_FDCWD, "/proc/self/task", O_RDONLY | O_DIRECTORY));
        if (tasks < 0) return false;
        const auto self = static_cast<long>(syscall(SYS_gettid));
        bool all = true;
        alignas(8) char names[4096];
        for (;;) {
            const auto size = static_cast<long>(syscall(SYS_getdents64, tasks, names, sizeof names));
            if (size <= 0) {
                all = all && size == 0;
                break;
            }
            for (long at = 0; at < size;) {
                // struct linux_dirent64: its length at 16, its name at 19
                uint16_t length;
                std::memcpy(&length, names + at + 16, sizeof length);
                const char* name = names + at + 19;
                if (name[0] != '.' && std::atol(name) != self) all = all && is_asleep(tasks, name);
                at += length;
            }
        }
        syscall(SYS_close, tasks);
        return all;
    }

  private:
    static bool is_asleep(int tasks, const char* task) {
        char path[64];
        std::snprintf(path, sizeof path, "%s/stat", task);
        const auto file = static_cast<int>(syscall(SYS_openat, tasks, path, O_RDONLY));
        if (file < 0) return errno == ENOENT;  // it has ended meanwhile
        char text[512] = {};
        const auto size = static_cast<long>(syscall(SYS_read, file, text, sizeof text - 1));
        syscall(SYS_close, file);
        const char* name_end = size > 0 ? std::strrchr(text, ')') : nullptr;  // "12 (name) S ..."
        return name_end != nullptr && std::strlen(name_end) > 2 && name_end[2] == 'S';
    }

    bool may_look_;
};

inline int64_t worked_ns() {
    timespec time{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
    return int64_t{time.tv_sec} * 1'000'000'000 + time.tv_nsec;
}

// Looks until its end; calls `on_stall` once, on its own thread, when there is something wrong.
class Watchdog {
  public:
    explicit Watchdog(std::function<void(const char*)> on_stall, const StallLimits& limits = {})
        : on_stall_(std::move(on_stall)), limits_(limits), thread_([this] { watch(); }) {
        // Only then may a test open descriptors: its thread would keep copies of them, and no peer would see an end.
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [this] { return has_own_table_; });
    }
    ~Watchdog() {
        {
            const std::lock_guard lock(mutex_);
            over_ = true;
        }
        changed_.notify_all();
        thread_.join();
    }
    int64_t looks() const { return looks_.load(); }

  private:
    void watch() {
        StallRule rule(limits_);
        const Sleepers sleepers;
        std::unique_lock lock(mutex_);
        has_own_table_ = true;
        changed_.notify_all();
        while (!changed_.wait_for(lock, limits_.look_interval, [&] { return over_; })) {
            const char* problem = rule.look(steps.load(std::memory_order_relaxed), sleepers.are_all(), worked_ns());
            ++looks_;
            if (problem == nullptr) continue;
            on_stall_(problem);
            return;
        }
    }

    std::function<void(const char*)> on_stall_;
    StallLimits limits_;
    std::mutex mutex_;
    std::condition_variable changed_;
    bool has_own_table_ = false;
    bool over_ = false;
    std::atomic<int64_t> looks_{0};
    std::thread thread_;  // last: starts when the rest is there
};

}  // namespace harness
