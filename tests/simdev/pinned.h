// Page-locked memory of the host: torch's own caching allocator over memory that is only remembered to be pinned.
#pragma once

#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>

#include "memory.h"

namespace simdev {

inline std::mutex pinned_mutex;
inline std::map<const char*, size_t> pinned;

inline bool is_pinned(const void* pointer) {
    const std::lock_guard<std::mutex> lock(pinned_mutex);
    auto at = pinned.upper_bound(static_cast<const char*>(pointer));
    if (at == pinned.begin()) return false;
    --at;
    return static_cast<const char*>(pointer) < at->first + at->second;
}

struct HostAllocatorImpl final : at::CachingHostAllocatorImpl<c10::Stream, FencePtr> {
  private:
    void allocate_host_memory(size_t size, void** pointer) override {
        begin_use();
        check_broken(current_device);
        check_capture("allocate pinned memory", true);
        const std::lock_guard<std::mutex> lock(pinned_mutex);
        const bool is_too_much = pinned_size + static_cast<int64_t>(size) > pinned_max;
        if (failing_pinned.strikes() || is_too_much || posix_memalign(pointer, 4096, size) != 0) {
            raise(error_out_of_memory, "out of memory");  // as cudaHostAlloc's
        }
        pinned[static_cast<const char*>(*pointer)] = size;
        pinned_size += static_cast<int64_t>(size);
        ++pinned_allocations;
    }
    void free_block(at::HostBlock<c10::Stream>* block) override {
        const std::lock_guard<std::mutex> lock(pinned_mutex);
        pinned.erase(static_cast<const char*>(block->ptr_));
        pinned_size -= static_cast<int64_t>(block->size_);
        std::free(block->ptr_);
    }
    void record_stream(std::optional<std::vector<FencePtr>>& events, c10::Stream stream) override {
        if (strict_free) check_broken(stream.device_index());
        events->push_back(fence_on(stream));
    }
    bool query_event(FencePtr& event) override { return event->query(); }
    c10::Stream get_current_stream() const override { return current_stream(current_device); }
    bool stream_is_capturing(c10::Stream) const override { return false; }
};
DECLARE_HOST_ALLOCATOR(HostAllocator, HostAllocatorImpl, delete_host, host_allocator)

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return device_count() > 0; }
    bool hasPrimaryContext(c10::DeviceIndex) const override { return user == getpid(); }
    c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(device_count()); }
    void setCurrentDevice(c10::DeviceIndex device) const override { current_device = index_of({device_type, device}); }
    c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_device); }
    c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
        const int old = current_device;
        setCurrentDevice(device);
        return static_cast<c10::DeviceIndex>(old);
    }
    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override { return exchangeDevice(device); }
    bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
    at::Allocator* getPinnedMemoryAllocator() const override { return &host_allocator; }
    at::Device getDeviceFromPtr(void* data) const override {
        TORCH_CHECK(arena().owns(data), "simdev: not device memory");
        return device_of(arena().device_of(data));
    }
};

}  // namespace simdev
