#include "worker.h"

#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <pthread.h>

#include <chrono>
#include <cstddef>
#include <exception>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>

#include "clock.h"
#include "interrupt.h"

namespace pyserve {
namespace {

constexpr double seconds_per_ns = 1e-9;

// Runs `body` and turns whatever it throws into a Status, by type.
template <class Body>
Status guarded(const Body& body) noexcept {
    try {
        try {
            body();
            return {};
        } catch (const c10::OutOfMemoryError& error) {
            return Status::out_of_memory(error.what_without_backtrace());
        } catch (const std::bad_alloc&) {
            return Status::out_of_memory("the host has no memory left");
        } catch (const c10::Error& error) {
            return Status::model_error(error.what_without_backtrace());
        } catch (const std::exception& error) {
            return Status::model_error(error.what());
        } catch (...) {
            return Status::model_error("an exception of an unknown type");
        }
    } catch (...) {
        return {Code::out_of_memory, {}};  // building the text above failed
    }
}

bool same_kind(const Inputs& left, const Inputs& right) {
    if (left.size() != right.size()) return false;
    for (size_t i = 0; i < left.size(); ++i) {
        if (left[i].scalar_type() != right[i].scalar_type() || left[i].sizes() != right[i].sizes()) return false;
    }
    return true;
}

const Inputs& inputs_of(const Request* request) { return static_cast<const TensorRequest*>(request)->inputs; }

// Splits requests into groups that fit one tensor, keeping the order inside a group.
std::vector<std::vector<Request*>> group_by_shape(const std::vector<Request*>& requests) {
    std::vector<std::vector<Request*>> groups;
    for (Request* request : requests) {
        bool placed = false;
        for (auto& group : groups) {
            if (!same_kind(inputs_of(group.front()), inputs_of(request))) continue;
            group.push_back(request);
            placed = true;
            break;
        }
        if (!placed) groups.push_back({request});
    }
    return groups;
}

// A batch output must have one row per request, or answers would go to the wrong clients.
void check_rows(const c10::IValue& output, size_t count) {
    map_tensors(output, [count](const at::Tensor& tensor) {
        TORCH_CHECK(tensor.dim() > 0 && static_cast<size_t>(tensor.size(0)) == count,
                    "the model returned a tensor of shape ", tensor.sizes(), " for a batch of ", count,
                    "; its first dimension must be the batch");
        return tensor;
    });
}

}  // namespace

Worker::Worker(std::shared_ptr<LaneShared> shared, uint32_t id)
    : keeps_(std::move(shared)), shared_(*keeps_), id_(id) {}

void Worker::run() noexcept {
    runs_.bind();
    pthread_setname_np(pthread_self(), ("worker-" + std::to_string(id_)).c_str());
    WorkerState end = WorkerState::stopped;
    const Status status = guarded([this] {
        const c10::InferenceMode inference;
        const c10::DeviceGuard device(shared_.model->device());
        apply_settings();
        state_.store(WorkerState::warming, std::memory_order_release);
        model_ = shared_.model->instance();
        const Status warm = warm_up();
        if (warm.code == Code::interrupted) throw Interrupted();
        if (!warm.ok()) throw std::runtime_error(warm.message);
        if (shared_.model->has_state()) model_ = shared_.model->instance();  // as it was before the warm-up
        state_.store(WorkerState::ready, std::memory_order_release);
        shared_.completions->signal();
        serve();
    });
    if (!status.ok()) {
        error_ = status.message;
        end = WorkerState::failed;
    }
    runs_.unbind();
    state_.store(end, std::memory_order_release);
    shared_.completions->signal();
}

// At batch size 1 and the maximum: TorchScript's executor specialises per shape and the first run of a shape
// compiles kernels, which would otherwise be paid by the first clients.
Status Worker::warm_up() {
    if (shared_.example.empty()) return {};
    const int runs = TorchModel::warm_up_runs();
    // A copy of its own: a model that changes its input in place would change every worker's example.
    Inputs example;
    for (const at::Tensor& input : shared_.example) example.push_back(input.clone());
    const size_t largest = shared_.batcher.batch_size_max();
    for (size_t size = 1; size <= largest; size = size == largest ? largest + 1 : largest) {
        const std::vector<const Inputs*> items(size, &example);
        for (int run = 0; run < runs && !is_stopping(); ++run) {
            runs_.begin(SteadyClock::now_ns());
            const Status status = forwarded([&] {
                const Staging::ComputeScope scope(*staging_);
                Staged staged = staging_->gather(items);
                staged.output = model_->run(staged.inputs);
                staging_->fetch(staged);
                Staging::wait(staged);
                check_rows(staged.output, size);
            });
            runs_.end();
            if (!status.ok()) return status;
        }
    }
    return {};
}

// Whether the settings in force are the ones wanted.
bool Worker::has_settings() const {
    return threads_ == shared_.intra_op_threads.load(std::memory_order_relaxed) &&
           staging_size_ == shared_.staging_size.load(std::memory_order_relaxed);
}

// What was set from outside since the last batch. REQUIRES: nothing is in flight.
void Worker::apply_settings() {
    const int threads = shared_.intra_op_threads.load(std::memory_order_relaxed);
    if (threads != threads_) {
        // torch gives a thread the process-wide count at its first look; let it look now, not after this setting.
        at::get_num_threads();
        at::set_num_threads(threads);  // OpenMP keeps this per thread
        threads_ = threads;
    }
    const int64_t staging_size = shared_.staging_size.load(std::memory_order_relaxed);
    if (staging_size != staging_size_) {
        const Status status =
            guarded([&] { staging_ = std::make_unique<Staging>(shared_.model->device(), staging_size); });
        // A batch may be in hand already. It does without a larger slot: what does not fit is gathered elsewhere.
        if (!status.ok() && !staging_) throw std::runtime_error(status.message);
        staging_size_ = staging_size;
    }
}

void Worker::serve() {
    for (bool goes_on = true; goes_on;) {
        const Status status = guarded([&] { goes_on = step(); });
        if (status.ok()) continue;
        // Not for one request's sake, as those are guarded by themselves. Without any it would happen again at once.
        if (!holds_permit_ && in_flight_.empty() && take_.empty()) throw std::runtime_error(status.message);
        give_back(status);
    }
}

// Takes a batch, or finishes one. False when there is nothing more to do.
bool Worker::step() {
    int64_t wake_at = never_ns;
    // With one batch on the device only a full one is worth taking early: a smaller one may still grow. None is
    // taken when there is something to be done between two batches.
    Next next = Next::nothing;
    if (in_flight_.empty()) {
        next = shared_.batcher.next_batch(take_, stop_);
    } else if (!is_stopping() && has_settings()) {
        next = shared_.batcher.try_next(take_, wake_at, /*full_only=*/true);
    }
    if (next == Next::batch) {
        holds_permit_ = true;
        if (in_flight_.empty()) apply_settings();
        begin();
        if (staging_->is_async() && in_flight_.size() < 2) return true;
    }
    if (in_flight_.empty()) return next != Next::closed;
    finish(in_flight_.front());
    in_flight_.erase(in_flight_.begin());
    end_run();
    return true;
}

// A batch has ended; the next one may run already.
void Worker::end_run() noexcept {
    runs_.end();
    if (!in_flight_.empty()) runs_.begin(in_flight_.front().started_at);
}

// As `guarded`, for what runs the model: it may be interrupted.
template <class Body>
Status Worker::forwarded(const Body& body) noexcept {
    Status status = guarded(body);
    if (!runs_.is_interrupted()) return status;
    runs_.forgive();
    is_half_changed_ = model_->has_state();
    shared_.stats.interrupted.fetch_add(1, std::memory_order_relaxed);
    return {Code::interrupted, {}};
}

// A run that was interrupted may have changed a part of what its model keeps, and not the rest: later answers would be
// wrong, for ever. Its worker has the model as it was loaded then, as one that was given up and replaced.
void Worker::renew_model() {
    if (!is_half_changed_) return;
    model_ = shared_.model->instance();
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
    flight.status = forwarded([&] {
        renew_model();
        const Staging::ComputeScope scope(*staging_);
        std::vector<const Inputs*> items;
        items.reserve(flight.requests.size());
        for (const Request* request : flight.requests) items.push_back(&inputs_of(request));
        flight.staged = staging_->gather(items);
        flight.staged_at = SteadyClock::now_ns();
        flight.staged.output = model_->run(flight.staged.inputs);
        check_rows(flight.staged.output, flight.requests.size());
        staging_->fetch(flight.staged);
    });
}

void Worker::finish(Flight& flight) {
    if (!flight.requests.empty()) {
        if (flight.status.ok()) flight.status = guarded([&] { Staging::wait(flight.staged); });
        if (flight.status.ok() || flight.requests.size() == 1 || flight.status.code == Code::interrupted) {
            complete(flight);
        } else {
            run_singly(flight);
        }
    }
    leave(flight.holds_permit);
}

// A batch is a set of independent outcomes: when it fails, each request is run alone, once, so that only the one
// at fault fails.
void Worker::run_singly(Flight& flight) {
    for (; !flight.requests.empty(); flight.requests.erase(flight.requests.begin())) {
        Flight single;
        single.requests = {flight.requests.front()};
        single.started_at = flight.started_at;
        single.release = flight.release;
        shared_.stats.retried_singly.fetch_add(1, std::memory_order_relaxed);
        single.staged_at = SteadyClock::now_ns();
        if (single.requests.front()->state.load(std::memory_order_acquire) != State::running) {
            single.status.code = Code::cancelled;  // nobody waits for it any more
            complete(single);
            continue;
        }
        // Its state is running already; launch would take it for cancelled.
        single.status = forwarded([&] {
            renew_model();
            const Staging::ComputeScope scope(*staging_);
            single.staged = staging_->gather({&inputs_of(single.requests.front())});
            single.staged.output = model_->run(single.staged.inputs);
            check_rows(single.staged.output, 1);
            staging_->fetch(single.staged);
            Staging::wait(single.staged);
        });
        complete(single);
    }
}

// Ends whatever the worker holds with one outcome, and waits for the memory that this takes.
void Worker::give_back(const Status& status) noexcept {
    const auto end = [&](Flight& flight) {
        if (!flight.requests.empty()) {
            guarded([&] { Staging::wait(flight.staged); });  // the device may still read what the loop will free
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

void Worker::leave(bool& holds_permit) noexcept {
    if (std::exchange(holds_permit, false)) shared_.batcher.leave();
}

void Worker::complete(Flight& flight) {
    LaneStats& stats = shared_.stats;
    auto result = std::make_unique<BatchResult>();
    result->started_at = flight.started_at;
    result->staged_at = flight.staged_at;
    result->finished_at = SteadyClock::now_ns();
    result->status = std::move(flight.status);
    if (result->status.ok()) result->output = std::move(flight.staged.output);
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
    stats.staging.observe(static_cast<double>(flight.staged_at - flight.started_at) * seconds_per_ns);
    stats.inference.observe(static_cast<double>(result->finished_at - flight.staged_at) * seconds_per_ns);
    stats.batch_size.observe(static_cast<double>(count));
    stats.batches.fetch_add(1, std::memory_order_relaxed);
    if (flight.staged.is_fallback) stats.staging_fallback.fetch_add(1, std::memory_order_relaxed);
    batches_.fetch_add(1, std::memory_order_relaxed);
    result->requests = std::move(flight.requests);
    flight.staged = {};  // lets go of the slot's memory and of the request's inputs before the loop frees them
    push(std::move(result));
}

void Worker::drop(std::vector<Request*>& requests) {
    auto result = std::make_unique<BatchResult>();
    result->status.code = Code::cancelled;  // each request's own state tells expired from cancelled
    result->started_at = result->staged_at = result->finished_at = SteadyClock::now_ns();
    for (const Request* request : requests) {
        const bool expired = request->state.load(std::memory_order_acquire) == State::expired;
        (expired ? shared_.stats.expired : shared_.stats.cancelled).fetch_add(1, std::memory_order_relaxed);
    }
    result->requests = std::move(requests);
    requests.clear();
    push(std::move(result));
}

void Worker::push(std::unique_ptr<BatchResult> result) {
    result->pool = shared_.pool;
    shared_.completions->push(result.release());
}

}  // namespace pyserve
