// Graphs behind torch's generic interface, where it has one: tasks to be queued again and again.
#pragma once

#include "capture.h"
#include "memory.h"

#if __has_include(<ATen/core/GraphImplInterface.h>)
#include <ATen/core/GraphImplInterface.h>
#define SIMDEV_HAS_GRAPHS

namespace simdev {

class Graph final : public at::GraphImplInterface {
  public:
    explicit Graph(const at::GraphImplArgs&) {}
    ~Graph() override { reset(); }

    void capture_begin(at::MempoolId_t pool, at::GraphCaptureMode mode) override {
        static std::atomic<int64_t> next{1};
        const c10::Stream stream = current_stream(current_device);
        check_broken(current_device);
        TORCH_CHECK(stream.id() != 0, "simdev error: operation not permitted on the default stream while capturing");
        recording_.pool = pool.first != 0 ? static_cast<int64_t>(pool.first) : next++;
        recording_.mode = mode == at::GraphCaptureMode::ThreadLocal ? CaptureMode::thread_local_
                          : mode == at::GraphCaptureMode::Relaxed   ? CaptureMode::relaxed
                                                                    : CaptureMode::global;
        recording_.thread = std::this_thread::get_id();
        recording_.is_invalid = false;
        allocator().hold_pool(recording_.pool);
        has_pool_ = true;
        const std::lock_guard<std::mutex> lock(recordings_mutex);
        const bool is_new = recordings.emplace(place_of(stream), &recording_).second;
        TORCH_CHECK(is_new, "simdev error: the stream is capturing already");
        stream_ = stream;
        ++recordings_count;
    }
    void capture_end() override {
        TORCH_CHECK(stream_.has_value(), "simdev error: no capture has begun");
        {
            const std::lock_guard<std::mutex> lock(recordings_mutex);
            recordings.erase(place_of(*stream_));
            --recordings_count;
        }
        stream_.reset();
        if (!recording_.is_invalid) return;
        reset();
        raise(error_capture_invalidated, "operation failed due to a previous error during capture");
    }
    void instantiate() override {}
    void replay() override {
        DeviceState& state = state_of(current_device);
        check_broken(current_device);
        ++state.launches;
        ++state.replays;
        for (const Task& task : recording_.tasks) queue_of(current_stream(current_device)).push(task);
    }
    void reset() override {
        if (stream_.has_value()) {
            const std::lock_guard<std::mutex> lock(recordings_mutex);
            recordings.erase(place_of(*stream_));
            --recordings_count;
            stream_.reset();
        }
        recording_.tasks.clear();
        if (std::exchange(has_pool_, false)) allocator().let_pool_go(recording_.pool);
    }
    at::MempoolId_t pool() const override { return {static_cast<c10::CaptureId_t>(recording_.pool), 0}; }
    void enable_debug_mode() override {}
    void debug_dump(const std::string&) override {}

  private:
    static std::pair<int, int64_t> place_of(const c10::Stream& stream) { return {stream.device_index(), stream.id()}; }

    Recording recording_;
    std::optional<c10::Stream> stream_;
    bool has_pool_ = false;
};

}  // namespace simdev

namespace at {
using SimdevGraph = simdev::Graph;
REGISTER_GRAPH_IMPL(SIMDEV, SimdevGraph)
}  // namespace at
#endif
