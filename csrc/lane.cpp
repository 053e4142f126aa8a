#include "lane.h"

#include <algorithm>
#include <utility>

#include "clock.h"

namespace pyserve {
namespace {

// Enough for ordinary models; larger batches fall back to plain memory, which is counted.
constexpr int64_t staging_size_max = int64_t{256} << 20;
constexpr int64_t staging_padding = 64;

int64_t size_of(const Inputs& inputs) {
    int64_t size = 0;
    for (const at::Tensor& input : inputs) size += static_cast<int64_t>(input.nbytes());
    return size;
}

}  // namespace

Lane::Lane(std::shared_ptr<Completions<>> completions, std::shared_ptr<TorchModel> model, Inputs example,
           size_t capacity)
    : completions_(std::move(completions)), batcher_(capacity) {
    shared_.model = std::move(model);
    shared_.example = std::move(example);
    shared_.batcher = &batcher_;
    shared_.completions = completions_.get();
}

Lane::~Lane() { join(); }

TensorRequest* Lane::try_submit(Inputs inputs, void* owner, int64_t arrived_at, int64_t deadline) {
    if (batcher_.queue_size() >= batcher_.capacity()) purge();
    if (batcher_.queue_size() >= batcher_.capacity()) return nullptr;
    TensorRequest* request = shared_.pool->allocate();
    request->inputs = std::move(inputs);
    request->owner = owner;
    request->arrived_at = arrived_at;
    request->deadline.store(deadline, std::memory_order_relaxed);
    request->input_size.store(size_of(request->inputs), std::memory_order_relaxed);
    request->queued_at.store(SteadyClock::now_ns(), std::memory_order_relaxed);
    request->started_at.store(0, std::memory_order_relaxed);
    request->state.store(State::queued, std::memory_order_release);
    shared_.stats.submitted.fetch_add(1, std::memory_order_relaxed);
    batcher_.try_push_unannounced(request);  // cannot fail: this thread is the only producer and has looked
    return request;
}

void Lane::set_limits(const BatchLimits& limits) {
    const auto batch = static_cast<int64_t>(std::max(1u, limits.batch_size_max));
    const int64_t item = size_of(shared_.example) + staging_padding * static_cast<int64_t>(shared_.example.size());
    // Multiplied only when it fits: both factors come from outside.
    const int64_t wanted = item > staging_size_max / batch ? staging_size_max : item * batch;
    shared_.staging_size.store(std::max<int64_t>(wanted, staging_padding));
    batcher_.set_limits(limits);
}

void Lane::set_intra_op_threads(int count) { shared_.intra_op_threads.store(std::max(1, count)); }

void Lane::set_workers(size_t count) {
    reap();
    // Before the pointers are taken: a worker may fail at any moment.
    std::erase_if(workers_, [](const auto& worker) { return worker->state() == WorkerState::failed; });
    std::vector<Worker*> live;
    for (const auto& worker : workers_) {
        if (!worker->is_stopping() && !worker->is_over()) live.push_back(worker.get());
    }
    for (; live.size() > count; live.pop_back()) live.back()->stop();
    for (size_t missing = count - live.size(); missing > 0; --missing) {
        workers_.push_back(std::make_unique<Worker>(shared_, next_worker_id_++));
    }
    batcher_.wake_all();
}

void Lane::reap() {
    std::erase_if(workers_, [](const auto& worker) { return worker->state() == WorkerState::stopped; });
}

void Lane::close() { batcher_.close(); }

void Lane::join() {
    for (const auto& worker : workers_) worker->stop();
    batcher_.wake_all();
    workers_.clear();
    shared_.pool->cancel_queued();
    purge();
}

void Lane::purge() {
    auto result = std::make_unique<BatchResult>();
    batcher_.purge(result->requests);
    if (result->requests.empty()) return;
    result->status.code = Code::cancelled;
    result->pool = shared_.pool;
    shared_.stats.cancelled.fetch_add(result->requests.size(), std::memory_order_relaxed);
    completions_->push(result.release());
}

size_t Lane::ready_count() const {
    return static_cast<size_t>(std::count_if(workers_.begin(), workers_.end(), [](const auto& worker) {
        return worker->state() == WorkerState::ready && !worker->is_stopping();
    }));
}

std::vector<WorkerRow> Lane::workers() const {
    std::vector<WorkerRow> rows;
    for (const auto& worker : workers_) {
        const WorkerState state = worker->state();
        rows.push_back({worker->id(), state, worker->is_stopping(), worker->running_since(), worker->batches(),
                        state == WorkerState::failed ? worker->error() : std::string()});
    }
    return rows;
}

}  // namespace pyserve
