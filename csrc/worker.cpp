#include "worker.h"

#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <pthread.h>
#include <sys/prctl.h>

#include <cstddef>
#include <stdexcept>
#include <utility>

#include "affinity.h"
#include "clock.h"
#include "guarded.h"
#include "interrupt.h"
#include "shape_groups.h"

namespace pyserve {
namespace {

constexpr double seconds_per_ns = 1e-9;
constexpr unsigned long timer_slack_ns = 1'000;
// Batches that take less than this on a CPU are not worth being shared: more of them cost more than they gain.
constexpr int64_t shared_from_ns = 1'000'000;

}  // namespace

Worker::Worker(std::shared_ptr<LaneShared> shared, std::shared_ptr<TorchModel> model, uint32_t id)
    : keeps_(std::move(shared)), shared_(*keeps_), device_(model->device()), id_(id), loaded_(std::move(model)) {}

void Worker::run() noexcept {
    runs_.bind();
    pthread_setname_np(pthread_self(), ("worker-" + std::to_string(id_)).c_str());
    WorkerState end = WorkerState::stopped;
    const Status status = guarded([this] {
        const c10::InferenceMode inference;
        const c10::DeviceGuard device(loaded_->device());
        const auto near = shared_.cpus.find(loaded_->device().str());
        if (near != shared_.cpus.end()) keep_to(near->second);  // first: what it allocates is near its thread
        apply_settings();
        // It looks at the device in pauses that are shorter than what the kernel rounds them up to.
        if (staging_->is_async()) prctl(PR_SET_TIMERSLACK, timer_slack_ns);
        state_.store(WorkerState::warming, std::memory_order_release);
        take_model();
        const Status warm = judged(warm_up());
        if (warm.code == Code::device_lost) end_on_lost_device();
        if (warm.code == Code::interrupted) throw Interrupted();
        if (!warm.ok()) throw std::runtime_error(warm.message);
        if (loaded_->has_state()) take_model();  // as it was before the warm-up
        state_.store(WorkerState::ready, std::memory_order_release);
        shared_.completions->signal();
        serve();
    });
    if (!status.ok()) {
        error_ = status.message;
        end = WorkerState::failed;
    }
    // Here, as the thread that joins it is to call nothing of the device.
    if (has_lost_device()) {
        leak(std::move(runner_));
        leak(std::move(staging_));
    }
    guarded([this] { incoming_.reset(); });
    guarded([this] { runner_.reset(); });
    guarded([this] { staging_.reset(); });
    runs_.unbind();
    state_.store(end, std::memory_order_release);
    shared_.completions->signal();
}

// What was set from outside since the last batch.
void Worker::apply_settings() {
    const int threads = shared_.intra_op_threads.load(std::memory_order_relaxed);
    const int workers = shared_.workers.load(std::memory_order_relaxed);
    if (threads != threads_ || workers != workers_) {
        // torch gives a thread the process-wide count at its first look; let it look now, not after this setting.
        at::get_num_threads();
        at::set_num_threads(threads);            // OpenMP keeps this per thread
        loaded_->use_threads(threads, workers);  // where they are compiled in
        threads_ = threads;
        workers_ = workers;
    }
    const int64_t staging_size = shared_.staging_size.load(std::memory_order_relaxed);
    if (staging_size != staging_size_) {
        const Status status = guarded([&] {
            if (staging_)
                staging_->resize(staging_size);
            else
                staging_ = std::make_unique<Staging>(loaded_->device(), staging_size, shared_.stats,
                                                     loaded_->options().precision, loaded_->has_forks());
        });
        // A batch may be in hand already. It does without a larger slot: what does not fit is gathered elsewhere.
        if (!status.ok() && !staging_) throw std::runtime_error(status.message);
        staging_size_ = staging_size;
    }
}

void Worker::serve() {
    for (bool goes_on = true; goes_on;) {
        const Status status = guarded([&] { goes_on = staging_->is_async() ? step_on_device() : step(); });
        if (has_lost_device()) {
            end_on_lost_device();
            throw std::runtime_error("the device is lost");
        }
        if (status.ok()) continue;
        // Not for one request's sake, as those are guarded by themselves. Without any it would happen again at once.
        if (!holds_permit_ && in_flight_.empty() && take_.empty()) throw std::runtime_error(status.message);
        give_back(status);
    }
}

// Takes a batch and runs it. False when there is nothing more to do. REQUIRES: it runs on the host, else step_on_device.
bool Worker::step() {
    const Next next = next_batch();
    if (next == Next::larger) {
        warm_up_larger();
        return true;
    }
    if (next != Next::batch) return next != Next::closed;
    holds_permit_ = true;
    shared_.batcher.hold(held_ = take_.requests.size());
    apply_settings();
    begin();
    if (in_flight_.empty()) return true;
    finish_oldest();
    return true;
}

void Worker::finish_oldest() {
    finish(in_flight_.front());
    in_flight_.erase(in_flight_.begin());
    end_run();
}

// A batch has ended; the next one may run already.
void Worker::end_run() noexcept {
    runs_.end();
    if (!in_flight_.empty()) runs_.begin(in_flight_.front().started_at);
}

// A run that was interrupted may have changed a part of what its model keeps, and not the rest: later answers would be
// wrong, for ever. Its worker has the model as it was loaded then, as one that was given up and replaced.
void Worker::renew_model() {
    if (!is_half_changed_) return;
    take_model();
    is_half_changed_ = false;
}

void Worker::begin() {
    const int64_t now = SteadyClock::now_ns();
    if (in_flight_.empty()) runs_.begin(now);
    if (!take_.dropped.empty()) drop(take_.dropped);
    auto groups = group_by_shape(take_.requests);
    if (groups.empty()) {
        end_run();
        leave(holds_permit_);
        return;
    }
    size_t at = in_flight_.size();
    in_flight_.reserve(at + groups.size());
    take_.requests.clear();
    for (auto& group : groups) {
        Flight& flight = in_flight_.emplace_back();
        flight.requests = std::move(group);
        flight.started_at = now;
        flight.release = take_.release;
    }
    in_flight_.back().holds_permit = std::exchange(holds_permit_, false);
    // Every group but the last is finished here; the last one may stay in flight.
    for (;;) {
        launch(in_flight_[at]);
        if (at + 1 == in_flight_.size()) return;
        finish(in_flight_[at]);
        in_flight_.erase(in_flight_.begin() + static_cast<std::ptrdiff_t>(at));
        // Has waited for the one before, whose time is not its own.
        in_flight_[at].started_at = SteadyClock::now_ns();
        if (at == 0) end_run();
    }
}

void Worker::launch(Flight& flight) {
    size_t live = 0;
    for (Request* request : flight.requests) {
        request->started_at.store(flight.started_at, std::memory_order_relaxed);
        if (request->try_move(State::batched, State::running))
            flight.requests[live++] = request;
        else
            take_.dropped.push_back(request);  // the batcher has reserved as much as the ring holds
    }
    flight.requests.resize(live);
    if (!take_.dropped.empty()) drop(take_.dropped);
    flight.staged_at = flight.started_at;
    if (flight.requests.empty()) return;
    fly(flight);
}

// REQUIRES: its requests' state is running.
void Worker::fly(Flight& flight) {
    flight.status = forwarded([&] {
        renew_model();
        const Staging::ComputeScope scope(*staging_);
        std::vector<const Inputs*> items;
        items.reserve(flight.requests.size());
        for (const Request* request : flight.requests) items.push_back(&inputs_of(request));
        await_inputs(flight.requests);
        flight.staged = staging_->gather(items);
        flight.staged_at = SteadyClock::now_ns();
        if (staging_->is_async() && model_->has_state()) {
            // It may keep its input, and the slot is filled again.
            for (at::Tensor& input : flight.staged.inputs) input = input.clone();
        }
        flight.staged.output = runner_->run(flight.staged.inputs);
        check_rows(flight.staged.output, flight.requests.size());
        shrink_output(flight);
        staging_->fetch(flight.staged);
    });
    if (!staging_->is_async()) return;
    const int64_t now = SteadyClock::now_ns();
    pace_.launched(flight.requests.size(), now, now - flight.started_at);
}

void Worker::finish(Flight& flight) {
    if (!flight.requests.empty()) {
        if (flight.status.ok()) {
            flight.status = guarded([&] {
                staging_->wait(flight.staged);
                // On the device nothing can be ended, and now it has ended.
                if (staging_->is_async() && runs_.is_interrupted()) runs_.forgive();
                staging_->collect(flight.staged);
            });
            if (flight.status.ok() && staging_->is_async()) note_times(flight);
        }
        flight.status = judged(std::move(flight.status));
        const bool is_lost = flight.status.code == Code::device_lost;
        if (is_lost) leak(std::move(flight.staged));
        if (flight.status.ok() || flight.requests.size() == 1 || flight.status.code == Code::interrupted || is_lost) {
            complete(flight);
        } else {
            flight.staged = {};  // its slot is needed
            run_again(flight);
        }
    }
    leave(flight.holds_permit);
}

void Worker::leave(bool& holds_permit) noexcept {
    if (!std::exchange(holds_permit, false)) return;
    shared_.batcher.let_go(std::exchange(held_, 0));
    shared_.batcher.leave();
}

void Worker::complete(Flight& flight) {
    LaneStats& stats = shared_.stats;
    auto result = std::make_unique<BatchResult>();
    result->started_at = flight.started_at;
    result->finished_at = SteadyClock::now_ns();
    // Two batches are on a device at once: what each took there is not the time between its begin and its end.
    const int64_t on_device = flight.on_device_ns;
    result->staged_at =
        on_device == 0 ? flight.staged_at : std::max(flight.started_at, result->finished_at - on_device);
    result->status = std::move(flight.status);
    if (result->status.ok()) finish_output(flight, *result);
    const size_t count = flight.requests.size();
    result->batch_size = static_cast<uint32_t>(count);
    result->release = flight.release;
    for (Request* request : flight.requests) {
        stats.queue.observe(static_cast<double>(flight.started_at - request->queued_at.load()) * seconds_per_ns);
        if (!request->try_move(State::running, State::done)) {
            stats.cancelled.fetch_add(1, std::memory_order_relaxed);
        } else if (!result->status.ok()) {
            stats.failed.fetch_add(1, std::memory_order_relaxed);
        }
    }
    const int64_t staging_ns = flight.staged_at - flight.started_at + flight.upload_ns;
    stats.staging.observe(static_cast<double>(staging_ns) * seconds_per_ns);
    stats.inference.observe(static_cast<double>(on_device == 0 ? result->finished_at - flight.staged_at : on_device) *
                            seconds_per_ns);
    stats.batch_size.observe(static_cast<double>(count));
    if (staging_ && !staging_->is_async()) {
        const int64_t took_ns = result->finished_at - flight.staged_at;
        const bool is_long = took_ns >= shared_from_ns;
        shared_.batcher.share_among(is_long ? static_cast<uint32_t>(std::max(1, workers_)) : 0);
        if (result->status.ok()) shared_.batcher.note_cost(count, took_ns);
    }
    stats.batches.fetch_add(1, std::memory_order_relaxed);
    if (flight.staged.is_fallback) stats.staging_fallback.fetch_add(1, std::memory_order_relaxed);
    batches_.fetch_add(1, std::memory_order_relaxed);
    result->requests = std::move(flight.requests);
    // The request's inputs are let go before the loop frees them. Nothing on a device looks into those, and to let its
    // memory go may end the process when the device is lost: answers first.
    Staged staged = std::move(flight.staged);
    if (!staging_ || !staging_->is_async()) staged = {};
    push(std::move(result));
}

void Worker::drop(std::vector<Request*>& requests) {
    auto result = std::make_unique<BatchResult>();
    result->end_unbegun(requests, shared_.stats);
    push(std::move(result));
}

void Worker::push(std::unique_ptr<BatchResult> result) {
    result->pool = shared_.pool;
    shared_.completions->push(result.release());
}

}  // namespace pyserve
