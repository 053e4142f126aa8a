// Devices, streams and events as torch asks for them.
#pragma once

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include "capture.h"

namespace simdev {

struct Event {
    FencePtr fence;
    bool is_timing = false;
};

struct GuardImpl final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return device_type; }
    c10::Device exchangeDevice(c10::Device device) const override {
        const c10::Device old = getDevice();
        setDevice(device);
        return old;
    }
    c10::Device getDevice() const override { return device_of(current_device); }
    void setDevice(c10::Device device) const override { current_device = index_of(device); }
    void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = device.index(); }
    c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(device_count()); }

    c10::Stream getStream(c10::Device device) const override { return current_stream(index_of(device)); }
    c10::Stream getDefaultStream(c10::Device device) const override { return stream_of(index_of(device), 0); }
    c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
        static std::atomic<uint32_t> next[device_count_max]{};
        const int index = index_of(device);
        return stream_of(index, 1 + next[index]++ % pool_streams);
    }
    c10::Stream getNewStream(c10::Device device, int) const override { return getStreamFromGlobalPool(device, false); }
    c10::Stream exchangeStream(c10::Stream stream) const override {
        const c10::Stream old = current_stream(stream.device_index());
        current_streams[stream.device_index()] = stream.id();
        return old;
    }
    // Overrides one of the torch that has it; 2.11 does not.
    bool isStreamCapturing(const c10::Stream& stream) const { return recording_on(stream) != nullptr; }
    bool queryStream(const c10::Stream& stream) const override {
        check_broken(stream.device_index());
        check_not_capturing(stream, "query a stream");
        return queue_of(stream).is_idle();
    }
    void synchronizeStream(const c10::Stream& stream) const override {
        check_capture("synchronize a stream");
        drain(stream);
    }
    void synchronizeDevice(const c10::DeviceIndex given) const override {
        const int index = index_of({device_type, given});
        check_capture("synchronize a device");
        ++state_of(index).waits;
        std::vector<FencePtr> fences;
        // Another thread may begin to capture on one of them meanwhile. Fences that it recorded would never be set.
        for (int64_t id = 0; id <= pool_streams; ++id) fences.push_back(fence_beside_captures(stream_of(index, id)));
        for (const FencePtr& fence : fences) fence->wait();
        check_broken(index);
    }

    void destroyEvent(void* given, const c10::DeviceIndex) const noexcept override {
        delete static_cast<Event*>(given);
    }
    void record(void** given, const c10::Stream& stream, const c10::DeviceIndex,
                const c10::EventFlag flag) const override {
        check_broken(stream.device_index());
        if (*given == nullptr) *given = new Event{nullptr, flag == c10::EventFlag::BACKEND_DEFAULT};
        static_cast<Event*>(*given)->fence = fence_on(stream);
    }
    void block(void* given, const c10::Stream& stream) const override {
        check_broken(stream.device_index());
        if (given == nullptr) return;
        submit(stream, {event, "wait", [fence = static_cast<Event*>(given)->fence] { fence->wait(); }});
    }
    bool queryEvent(void* given) const override {
        check_capture("query an event");
        check_broken(current_device);
        return given == nullptr || static_cast<Event*>(given)->fence->query();
    }
    void synchronizeEvent(void* given) const override {
        check_capture("synchronize an event");
        ++state_of(current_device).waits;
        if (given != nullptr) static_cast<Event*>(given)->fence->wait();
        check_broken(current_device);
    }
    double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
        TORCH_CHECK(first != nullptr && second != nullptr, "simdev: both events must be recorded");
        auto* begin = static_cast<Event*>(first);
        auto* end = static_cast<Event*>(second);
        TORCH_CHECK(begin->is_timing && end->is_timing, "simdev: both events must be created with timing");
        TORCH_CHECK(begin->fence->query() && end->fence->query(), "simdev: both events must be over");
        return static_cast<double>(end->fence->set_at_ns() - begin->fence->set_at_ns()) / 1e6;
    }
    void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override;  // in memory.h
};

}  // namespace simdev
