// Graphs while they are captured: what would have been queued is recorded, and what may not be done meanwhile raises.
#pragma once

#include "streams.h"

namespace simdev {

enum class CaptureMode { global, thread_local_, relaxed };

struct Recording {
    std::vector<Task> tasks;
    int64_t pool = 0;  // of memory; replays need what was allocated
    CaptureMode mode = CaptureMode::global;
    std::thread::id thread;
    bool is_invalid = false;
};
inline std::mutex recordings_mutex;
inline std::map<std::pair<int, int64_t>, Recording*> recordings;  // by device and stream
inline std::atomic<int> recordings_count{0};

inline Recording* recording_on(const c10::Stream& stream) {
    if (recordings_count == 0) return nullptr;
    const std::lock_guard<std::mutex> lock(recordings_mutex);
    const auto at = recordings.find({stream.device_index(), stream.id()});
    return at == recordings.end() ? nullptr : at->second;
}

// Raises, and spoils the capture, where it forbids a call that waits, asks or allocates: in global mode one by any
// thread, else one by the thread that captures.
inline void check_capture(const char* call, bool spares_own_thread = false) {
    if (recordings_count == 0) return;
    const std::lock_guard<std::mutex> lock(recordings_mutex);
    for (auto& [place, recording] : recordings) {
        const bool is_own = recording->thread == std::this_thread::get_id();
        if (is_own ? spares_own_thread || recording->mode == CaptureMode::relaxed
                   : recording->mode != CaptureMode::global) {
            continue;
        }
        recording->is_invalid = true;
        raise(error_capture_unsupported,
              std::string("operation not permitted when stream is capturing (") + call + ")");
    }
}

inline void submit(const c10::Stream& stream, Task task) {
    if (Recording* recording = recording_on(stream)) {
        recording->tasks.push_back(std::move(task));
    } else {
        queue_of(stream).push(std::move(task));
    }
}

inline void check_not_capturing(const c10::Stream& stream, const char* call) {
    Recording* recording = recording_on(stream);
    if (recording == nullptr) return;
    recording->is_invalid = true;
    raise(error_capture_unsupported, std::string("operation not permitted when stream is capturing (") + call + ")");
}

inline FencePtr fence_on(const c10::Stream& stream) {
    auto fence = std::make_shared<Fence>();
    submit(stream, {event, "record", [fence] { fence->set(); }});
    return fence;
}

// Behind what was queued there; a recording has no part in it.
inline FencePtr fence_beside_captures(const c10::Stream& stream) {
    auto fence = std::make_shared<Fence>();
    queue_of(stream).push({event, "record", [fence] { fence->set(); }});
    return fence;
}

inline void drain(const c10::Stream& stream) {
    check_not_capturing(stream, "synchronize a stream");
    fence_on(stream)->wait();
    check_broken(stream.device_index());
}

}  // namespace simdev
