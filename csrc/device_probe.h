// Whether a device still works, and which ones have been lost in this process.
//
// An error that a driver raises for one operation says little: it may be the fault of that operation alone, and torch's
// layers may have made another one of it, or none. What tells is whether the device does anything after it.
//
// Threads: any.
#pragma once

#include <c10/core/Device.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace pyserve {

enum class DeviceState : uint8_t {
    well,
    lost,    // it raises, whatever is asked of it
    silent,  // no answer in time; it may be busy
};

struct DeviceCheck {
    DeviceState state = DeviceState::well;
    std::string text;  // of what it raised
};

// How long a device may take to write one number. What is lost raises at once as a rule.
inline constexpr int64_t probe_limit_ns = 800'000'000;

// Allocates, fills and waits on `device`, in a thread of its own: a device that is lost may keep it for ever. A device
// has one such thread at a time; while an earlier one has not come back, the answer is `silent`.
DeviceCheck probe_device(c10::Device device, int64_t limit_ns = probe_limit_ns);

// The devices of this process that are lost. Nothing makes one work again but another process.
class DeviceLosses {
  public:
    static DeviceLosses& of_process();

    // False if it was known.
    bool note(c10::Device device, std::string reason);
    bool is_lost(c10::Device device) const noexcept {
        return !device.is_cpu() && (lost_.load(std::memory_order_acquire) & bit_of(device)) != 0;
    }
    // "" of one that is not lost.
    std::string reason(c10::Device device) const;
    // With the reason of each, in the order in which they were noted.
    std::vector<std::pair<std::string, std::string>> all() const;

  private:
    static uint64_t bit_of(c10::Device device) noexcept {
        return uint64_t{1} << (static_cast<unsigned>(device.has_index() ? device.index() : 0) % 64);
    }

    std::atomic<uint64_t> lost_{0};  // by index: a process has accelerators of one kind
    mutable std::mutex mutex_;
    std::vector<std::pair<std::string, std::string>> all_;
};

// Never to be freed. What belongs to a lost device raises when it is let go, and does so in destructors.
template <class T>
void leak(T&& value) {
    new std::remove_cvref_t<T>(std::forward<T>(value));
}

}  // namespace pyserve
