#include "process_lane.h"

#include <algorithm>
#include <utility>

#include "clock.h"

namespace pyserve {

ProcessLane::ProcessLane(std::shared_ptr<Completions<>> completions, size_t capacity)
    : completions_(std::move(completions)), batcher_(capacity) {
    shared_.batcher = &batcher_;
    shared_.completions = completions_.get();
}

ProcessLane::~ProcessLane() { join(); }

ProcessRequest* ProcessLane::try_submit(std::string_view head, std::string_view body, uint32_t flags, void* owner,
                                        int64_t arrived_at, int64_t deadline) {
    if (batcher_.queue_size() >= batcher_.capacity()) purge();
    if (batcher_.queue_size() >= batcher_.capacity()) return nullptr;
    ProcessRequest* request = shared_.pool->allocate();
    request->text.assign(head);
    request->head_size = head.size();
    if (body.size() <= body_inline_max) {
        request->text += body;
    } else {
        request->body = body.data();
        request->body_size = body.size();
    }
    request->flags = flags;
    request->owner = owner;
    request->arrived_at = arrived_at;
    request->deadline.store(deadline, std::memory_order_relaxed);
    request->input_size.store(static_cast<int64_t>(body.size()), std::memory_order_relaxed);
    request->queued_at.store(SteadyClock::now_ns(), std::memory_order_relaxed);
    request->started_at.store(0, std::memory_order_relaxed);
    request->state.store(State::queued, std::memory_order_release);
    shared_.stats.submitted.fetch_add(1, std::memory_order_relaxed);
    batcher_.try_push(request);  // cannot fail: this thread is the only producer and has looked
    if (multiplexed_count_ > 0) {
        for (const auto& worker : workers_) worker->wake();
    }
    return request;
}

uint32_t ProcessLane::add_worker(int socket, int request_memory, int answer_memory, size_t in_flight_max) {
    const uint32_t id = next_worker_id_++;
    workers_.push_back(
        std::make_unique<ProcessWorker>(shared_, id, socket, request_memory, answer_memory, in_flight_max));
    if (in_flight_max > 0) ++multiplexed_count_;
    return id;
}

void ProcessLane::stop_worker(uint32_t id) {
    for (const auto& worker : workers_) {
        if (worker->id() == id) worker->stop();
    }
}

void ProcessLane::remove_worker(uint32_t id) {
    const auto found = std::find_if(workers_.begin(), workers_.end(), [id](const auto& w) { return w->id() == id; });
    if (found == workers_.end()) return;
    if ((*found)->is_multiplexed()) --multiplexed_count_;
    workers_.erase(found);
}

void ProcessLane::close() {
    batcher_.close();
    for (const auto& worker : workers_) worker->wake();
}

void ProcessLane::join() {
    for (const auto& worker : workers_) worker->stop();
    workers_.clear();
    multiplexed_count_ = 0;
    shared_.pool->cancel_queued();
    purge();
}

void ProcessLane::purge() {
    auto result = std::make_unique<ProcessResult>();
    batcher_.purge(result->requests);
    if (result->requests.empty()) return;
    result->status.code = Code::cancelled;
    result->pool = shared_.pool;
    shared_.stats.cancelled.fetch_add(result->requests.size(), std::memory_order_relaxed);
    completions_->push(result.release());
}

size_t ProcessLane::ready_count() const {
    return static_cast<size_t>(std::count_if(workers_.begin(), workers_.end(), [](const auto& worker) {
        return worker->state() == ProcessState::ready && !worker->is_stopping();
    }));
}

std::vector<ProcessWorkerRow> ProcessLane::workers() const {
    std::vector<ProcessWorkerRow> rows;
    for (const auto& worker : workers_) {
        const ProcessState state = worker->state();
        rows.push_back({worker->id(), state, worker->is_stopping(), worker->running_since(), worker->batches(),
                        state == ProcessState::ready ? std::string() : worker->error()});
    }
    return rows;
}

}  // namespace pyserve
