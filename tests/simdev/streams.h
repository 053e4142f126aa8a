// Streams are threads with a queue; copies, operators and events are their tasks.
#pragma once

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/Stream.h>
#include <pthread.h>

#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "settings.h"

extern "C" void omp_set_num_threads(int) __attribute__((weak));  // torch's own may have another name

namespace simdev {

constexpr int pool_streams = 32;  // as many as CUDA's pool has

inline int64_t now_ns() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

// Set once, by a task.
class Fence {
  public:
    void set() {
        const std::lock_guard<std::mutex> lock(mutex_);
        set_at_ns_ = now_ns();
        is_set_ = true;
        changed_.notify_all();
    }
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return is_set_; });
    }
    bool query() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return is_set_;
    }
    int64_t set_at_ns() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return set_at_ns_;
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool is_set_ = false;
    int64_t set_at_ns_ = 0;
};
using FencePtr = std::shared_ptr<Fence>;

struct Task {
    Kind kind;
    std::string name;
    std::function<void()> run;
    int64_t chance_us = 0;
};

// What ran when.
struct Span {
    int device;
    int64_t stream;
    Kind kind;
    std::string name;
    int64_t begin_ns, end_ns, delay_us;
};
inline std::mutex spans_mutex;
inline std::vector<Span> spans;
inline std::atomic<bool> is_tracing{false};

void start_fault_file();  // in faults.h

class Queue {
  public:
    Queue(int device, int64_t stream) : device_(device), stream_(stream) {
        std::thread([this] { main(); }).detach();  // for good
    }

    void push(Task task) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (const uint64_t round = chance.round; round != round_) {
            round_ = round;
            number_ = 0;
            rank_ = chance.streams++;
        }
        task.chance_us = chance.delay_us(rank_, number_++);
        tasks_.push_back(std::move(task));
        changed_.notify_one();
    }
    bool is_idle() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return tasks_.empty() && !is_busy_;
    }

  private:
    [[noreturn]] void main() {
        const c10::InferenceMode inference;
        // Not the name of the thread that was the first to use the stream.
        pthread_setname_np(pthread_self(), c10::str("simdev-", device_, "-", stream_).c_str());
        at::get_num_threads();  // sets it the first time
        if (omp_set_num_threads != nullptr) omp_set_num_threads(1);
        for (;;) {
            std::unique_lock<std::mutex> lock(mutex_);
            is_busy_ = false;
            changed_.wait(lock, [this] { return !tasks_.empty(); });
            Task task = std::move(tasks_.front());
            tasks_.pop_front();
            is_busy_ = true;
            lock.unlock();
            run(task);
        }
    }

    void run(Task& task) {
        DeviceState& state = state_of(device_);
        ++state.running[task.kind];
        const int64_t begin_ns = now_ns();
        const bool is_copy = task.kind == h2d || task.kind == d2h;
        if (is_copy ? state.running[op] > 0 : task.kind == op && state.running[h2d] + state.running[d2h] > 0) {
            ++state.overlaps;
        }
        const int64_t us = state.delay_us[task.kind] + task.chance_us;
        if (us > 0) std::this_thread::sleep_for(std::chrono::microseconds(us));
        if (task.kind == op) {
            state.hang.hold_if(state.hanging_operator);
            if (state.breaking_operator.strikes()) state.is_broken = true;
        }
        // A record lets its waiters continue: what it leaves behind is there before they look, and the stream has ended
        // all that it was given before.
        const bool is_record = task.kind == event && task.name == "record";
        if (is_record) {
            account(state, task, begin_ns, us);
            const std::lock_guard<std::mutex> lock(mutex_);
            is_busy_ = false;
        }
        try {
            if (task.kind == event || !state.is_broken) task.run();
        } catch (const std::exception& error) {
            TORCH_WARN("simdev: a kernel raised ", error.what());
            state.is_broken = true;
        }
        task.run = nullptr;
        if (!is_record) account(state, task, begin_ns, us);
    }

    void account(DeviceState& state, const Task& task, int64_t begin_ns, int64_t us) {
        --state.running[task.kind];
        ++state.ran[task.kind];
        if (!is_tracing) return;
        const std::lock_guard<std::mutex> lock(spans_mutex);
        spans.push_back({device_, stream_, task.kind, task.name, begin_ns, now_ns(), us});
    }

    const int device_;
    const int64_t stream_;
    std::mutex mutex_;
    uint64_t round_ = 0, rank_ = 0, number_ = 0;
    std::condition_variable changed_;
    std::deque<Task> tasks_;
    bool is_busy_ = false;
};

inline Queue& queue_of(const c10::Stream& stream) {
    static std::mutex mutex;
    static std::map<std::pair<int, int64_t>, Queue*> queues;
    const std::lock_guard<std::mutex> lock(mutex);
    Queue*& queue = queues[{stream.device_index(), stream.id()}];
    if (queue == nullptr) {
        begin_use();
        start_fault_file();
        queue = new Queue(stream.device_index(), stream.id());
    } else if (is_in_bad_fork()) {
        begin_use();  // raises
    }
    return *queue;
}

inline thread_local int current_device = 0;
inline thread_local int64_t current_streams[device_count_max] = {};

inline c10::Device device_of(int index) { return {device_type, static_cast<c10::DeviceIndex>(index)}; }
inline c10::Stream stream_of(int device, int64_t id) { return c10::Stream(c10::Stream::UNSAFE, device_of(device), id); }
inline int index_of(c10::Device device) {
    const int index = device.has_index() ? device.index() : current_device;
    TORCH_CHECK(index >= 0 && index < device_count_set(), "simdev error: invalid device ordinal ", index, " of ",
                device_count_set());
    return index;
}
inline c10::Stream current_stream(int device) { return stream_of(device, current_streams[device]); }

}  // namespace simdev
