#include "device_probe.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <thread>

#include "guarded.h"
#include "tensors.h"

namespace pyserve {
namespace {

// One probe; kept alive by its thread, however late that is.
struct Probing {
    std::mutex mutex;
    std::condition_variable changed;
    bool is_over = false;
    DeviceCheck check;
};

// On a stream of its own, so that it waits for no batch.
DeviceCheck look(c10::Device device) {
    at::Tensor number;
    const Status status = guarded([&] {
        const c10::InferenceMode inference;
        const c10::DeviceGuard guard(device);
        const c10::impl::VirtualGuardImpl streams(device.type());
        const c10::Stream stream = streams.getStreamFromGlobalPool(device);
        const c10::Stream previous = streams.exchangeStream(stream);
        number = at::empty({1}, at::TensorOptions().dtype(at::kFloat).device(device));
        number.fill_(1);
        stream.synchronize();
        streams.exchangeStream(previous);
    });
    if (status.ok() || status.code == Code::out_of_memory) return {};
    if (number.defined()) leak(std::move(number));
    return {DeviceState::lost, status.message};
}

}  // namespace

DeviceCheck probe_device(c10::Device device, int64_t limit_ns) {
    static std::mutex mutex;
    static std::map<int, std::weak_ptr<Probing>> going_on;  // by the device's index
    auto probing = std::make_shared<Probing>();
    {
        const std::lock_guard lock(mutex);
        std::weak_ptr<Probing>& last = going_on[device.index()];
        if (const auto other = last.lock()) {
            probing = other;
        } else {
            last = probing;
            std::thread([device, probing] {
                pthread_setname_np(pthread_self(), "device-probe");
                DeviceCheck check = look(device);
                const std::lock_guard held(probing->mutex);
                probing->check = std::move(check);
                probing->is_over = true;
                probing->changed.notify_all();
            }).detach();
        }
    }
    std::unique_lock lock(probing->mutex);
    const bool is_over =
        probing->changed.wait_for(lock, std::chrono::nanoseconds(limit_ns), [&] { return probing->is_over; });
    return is_over ? probing->check : DeviceCheck{DeviceState::silent, {}};
}

DeviceLosses& DeviceLosses::of_process() {
    static auto* losses = new DeviceLosses;  // outlives the threads that ask it
    return *losses;
}

bool DeviceLosses::note(c10::Device device, std::string reason) {
    const std::lock_guard lock(mutex_);
    if (is_lost(device)) return false;
    all_.emplace_back(device.str(), std::move(reason));
    lost_.fetch_or(bit_of(device), std::memory_order_release);
    return true;
}

std::string DeviceLosses::reason(c10::Device device) const {
    const std::lock_guard lock(mutex_);
    for (const auto& [name, text] : all_) {
        if (name == device.str()) return text;
    }
    return {};
}

std::vector<std::pair<std::string, std::string>> DeviceLosses::all() const {
    const std::lock_guard lock(mutex_);
    return all_;
}

}  // namespace pyserve
