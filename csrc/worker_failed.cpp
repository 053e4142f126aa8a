// What becomes of a batch that failed.
#include <ATen/DeviceAccelerator.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "clock.h"
#include "device_probe.h"
#include "guarded.h"
#include "worker.h"

namespace pyserve {
namespace {

constexpr double mebibyte = 1 << 20;

// Of a device's memory, for somebody who reads that it does not suffice; "" where that is not known.
std::string memory_text(c10::Device device) {
    std::string text;
    guarded([&] {
        const auto [free, total] = at::accelerator::getMemoryInfo(device.index());
        text = c10::str("; ", device, " has ", std::llround(static_cast<double>(free) / mebibyte), " MiB of ",
                        std::llround(static_cast<double>(total) / mebibyte), " MiB free");
    });
    return text;
}

}  // namespace

// What a failure means. After any of them on a device, the device itself is asked: torch's layers make other exceptions
// of a driver's, and compiled packages say nothing. `status` comes back, with another code where it was a lost device, or
// memory that ran out unnoticed.
Status Worker::judged(Status status) {
    const c10::Device device = loaded_->device();
    if (device.is_cpu() || (status.code != Code::model_error && status.code != Code::out_of_memory)) return status;
    DeviceLosses& losses = DeviceLosses::of_process();
    // All that a compiled package says of what it ran into.
    const bool is_hidden = status.message.find("API call failed") != std::string::npos;
    const bool was_out_of_memory = has_run_out_of_memory(device) && is_hidden;
    if (!losses.is_lost(device)) {
        if (status.code == Code::out_of_memory) return status;
        const DeviceCheck check = probe_device(device);
        // A device that takes long may be busy with others' batches.
        if (check.state == DeviceState::well || (check.state == DeviceState::silent && !status.is_of_device)) {
            if (was_out_of_memory) status.code = Code::out_of_memory;
            return status;
        }
        losses.note(device, check.text.empty() ? status.message : check.text);
        shared_.completions->signal();  // for the loop to look
    }
    status.code = Code::device_lost;
    return status;
}

// Whether the device's allocator has failed since the last time it was asked.
bool Worker::has_run_out_of_memory(c10::Device device) noexcept {
    int64_t count = memory_failures_;
    guarded([&] { count = at::accelerator::getDeviceStats(device.index()).num_ooms; });  // not all allocators count
    return std::exchange(memory_failures_, count) != count;
}

// A batch is a set of independent outcomes: when it fails, its requests are run again, so that only the one at fault
// fails: each alone, once; or in halves where a device's memory ran out, since then their number is at fault, which is
// remembered.
void Worker::run_again(Flight& flight) {
    const bool is_on_device = !loaded_->device().is_cpu();
    const auto is_full = [&](const Status& status) { return is_on_device && status.code == Code::out_of_memory; };
    size_t part = 1;
    size_t fitting = 0;  // the largest part that ran
    bool has_misfit = false;
    if (is_full(flight.status)) {
        part = (flight.requests.size() + 1) / 2;
        release_cache();
    }
    while (!flight.requests.empty()) {
        Flight some;
        const auto end = flight.requests.begin() + static_cast<std::ptrdiff_t>(std::min(part, flight.requests.size()));
        some.requests.assign(flight.requests.begin(), end);
        some.started_at = flight.started_at;
        some.release = flight.release;
        run_part(some);
        const size_t size = some.requests.size();
        if (some.status.code == Code::device_lost) {
            flight.status = std::move(some.status);
            leak(std::move(some.staged));
            complete(flight);
            return;
        }
        if (size > 1 && (some.status.code == Code::model_error || some.status.code == Code::out_of_memory)) {
            part = is_full(some.status) ? (size + 1) / 2 : 1;
            continue;
        }
        if (some.status.ok()) fitting = std::max(fitting, size);
        if (is_full(some.status)) {
            has_misfit = true;
            some.status.message += memory_text(loaded_->device());
        }
        const bool is_last = end == flight.requests.end();
        if (is_last && is_full(flight.status) && !has_misfit && fitting != 0) shared_.lower_ceiling(fitting);
        complete(some);
        flight.requests.erase(flight.requests.begin(), end);
    }
}

// Runs requests whose state is running already; launch would take them for cancelled.
void Worker::run_part(Flight& flight) {
    size_t wanted = 0;
    std::vector<const Inputs*> items;
    for (const Request* request : flight.requests) {
        wanted += request->state.load(std::memory_order_acquire) == State::running;
        items.push_back(&inputs_of(request));
    }
    if (flight.requests.size() == 1) shared_.stats.retried_singly.fetch_add(1, std::memory_order_relaxed);
    flight.staged_at = SteadyClock::now_ns();
    if (wanted == 0) {
        flight.status.code = Code::cancelled;  // nobody waits for them any more
        return;
    }
    flight.status = judged(forwarded([&] {
        renew_model();
        const Staging::ComputeScope scope(*staging_);
        await_inputs(flight.requests);
        flight.staged = staging_->gather(items);
        flight.staged.output = runner_->run(flight.staged.inputs);
        check_rows(flight.staged.output, flight.requests.size());
        shrink_output(flight);
        staging_->fetch(flight.staged);
        staging_->wait(flight.staged);
        staging_->collect(flight.staged);
    }));
}

// What torch keeps of the device's memory for later goes back, once for each batch that did not fit.
void Worker::release_cache() noexcept {
    guarded([&] { at::accelerator::emptyCache(); });
}

// Ends whatever the worker holds with one outcome, and waits for the memory that this takes.
void Worker::give_back(const Status& status) noexcept {
    const auto end = [&](Flight& flight) {
        if (!flight.requests.empty()) {
            for (Request* request : flight.requests) request->try_move(State::batched, State::running);
            flight.status = status;
            complete(flight);
        }
        leave(flight.holds_permit);
    };
    while (holds_permit_ || !in_flight_.empty() || !take_.empty()) {
        const Status given = guarded([&] {
            if (!take_.dropped.empty()) drop(take_.dropped);
            for (; !in_flight_.empty(); in_flight_.erase(in_flight_.begin())) end(in_flight_.front());
            Flight taken;
            taken.started_at = taken.staged_at = SteadyClock::now_ns();
            taken.requests = take_.requests;
            end(taken);
            take_.requests.clear();
            leave(holds_permit_);
        });
        if (!given.ok()) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    end_run();
}

// The device is lost: whoever waits is answered, and nothing of the device is touched any more.
void Worker::end_on_lost_device() {
    give_back({Code::device_lost, DeviceLosses::of_process().reason(loaded_->device())});
    leak(std::move(in_flight_));
    leak(std::move(staging_));
    leak(std::move(runner_));
    leak(std::move(model_));
}

}  // namespace pyserve
