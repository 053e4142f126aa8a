#include "lane.h"

#include <sys/resource.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
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
           size_t capacity, LostCount lost)
    : shared_(std::make_shared<LaneShared>(capacity)), models_{std::move(model)}, crew_(std::move(lost)) {
    shared_->example = std::move(example);
    shared_->completions = std::move(completions);
}

Lane::~Lane() { join(); }

TensorRequest* Lane::try_submit(Inputs inputs, void* owner, int64_t arrived_at, int64_t deadline, bool wants_output,
                                std::optional<c10::Event> made) {
    if (shared_->batcher.queue_size() >= shared_->batcher.capacity()) purge();
    if (shared_->batcher.queue_size() >= shared_->batcher.capacity()) return nullptr;
    TensorRequest* request = shared_->pool->allocate();
    request->inputs = std::move(inputs);
    request->owner = owner;
    request->wants_output = wants_output;
    request->made = std::move(made);
    request->arrived_at = arrived_at;
    request->deadline.store(deadline, std::memory_order_relaxed);
    request->input_size.store(size_of(request->inputs), std::memory_order_relaxed);
    request->queued_at.store(SteadyClock::now_ns(), std::memory_order_relaxed);
    request->started_at.store(0, std::memory_order_relaxed);
    request->state.store(State::queued, std::memory_order_release);
    shared_->stats.submitted.fetch_add(1, std::memory_order_relaxed);
    shared_->batcher.try_push_unannounced(request);  // cannot fail: this thread is the only producer and has looked
    return request;
}

void Lane::set_limits(const BatchLimits& limits) {
    const auto batch = static_cast<int64_t>(std::max(1u, limits.batch_size_max));
    const int64_t item = size_of(shared_->example) + staging_padding * static_cast<int64_t>(shared_->example.size());
    // Multiplied only when it fits: both factors come from outside.
    const int64_t wanted = item > staging_size_max / batch ? staging_size_max : item * batch;
    shared_->staging_size.store(std::max<int64_t>(wanted, staging_padding));
    limits_ = limits;
    lend_permits();
}

// A lost worker holds the permit of its batch until it comes back; the others must not lack it.
void Lane::lend_permits() {
    BatchLimits lent = limits_;
    lent_ = crew_.lost();
    const auto lost = static_cast<uint32_t>(lent_);
    lent.running_max += std::min(lost, std::numeric_limits<uint32_t>::max() - lent.running_max);
    shared_->batcher.set_limits(lent);
}

void Lane::set_intra_op_threads(int count) { shared_->intra_op_threads.store(std::max(1, count)); }

void Lane::set_workers(size_t count) {
    reap();
    crew_.forget_failed();
    shared_->workers.store(static_cast<int>(std::min<size_t>(count, std::numeric_limits<int>::max())));
    for (size_t missing = crew_.shrink(count); missing > 0; --missing) {
        auto worker = std::make_shared<Worker>(shared_, least_used(), next_worker_id_++);
        if (offered_) worker->offer(offered_, exchanges_);
        crew_.add(std::move(worker));
    }
    shared_->batcher.wake_all();
}

// With workers of its own on every device, so that two devices get the same share whatever was lost or failed before.
const std::shared_ptr<TorchModel>& Lane::least_used() const {
    const auto workers_of = [this](const std::shared_ptr<TorchModel>& model) {
        size_t count = 0;
        crew_.for_each([&](const Worker& worker, bool is_lost) {
            if (!is_lost && !worker.is_stopping() && worker.device() == model->device()) ++count;
        });
        return count;
    };
    return *std::min_element(models_.begin(), models_.end(),
                             [&](const auto& left, const auto& right) { return workers_of(left) < workers_of(right); });
}

void Lane::exchange_model(std::shared_ptr<TorchModel> model) {
    if (!model->device().is_cpu() || models_.empty() || !models_.front()->device().is_cpu()) {
        throw std::invalid_argument("a model is exchanged on a CPU only");
    }
    offered_ = std::move(model);
    ++exchanges_;
    crew_.for_each([&](Worker& worker, bool is_lost) {
        if (!is_lost && !is_over(worker.state())) worker.offer(offered_, exchanges_);
    });
    shared_->batcher.wake_all();
}

ExchangeState Lane::exchange_state() const {
    ExchangeState found;
    crew_.for_each([&](const Worker& worker, bool is_lost) {
        // Also of one that was lost, and perhaps by that run.
        if (worker.was_offered(exchanges_) && worker.is_considering(exchanges_)) {
            if (is_lost)
                found.refusal = "a run did not come to an end";
            else if (!worker.is_stopping() && !is_over(worker.state()))
                ++found.pending;
        }
        if (std::string refusal = worker.refusal(exchanges_); !refusal.empty()) found.refusal = std::move(refusal);
    });
    return found;
}

void Lane::reap() {
    crew_.reap();
    if (crew_.lost() != lent_) lend_permits();
}

int64_t Lane::running_since() const {
    int64_t oldest = 0;
    crew_.for_each([&](Worker& worker, bool is_lost) {
        const int64_t since = worker.running_since();
        if (!is_lost && since != 0 && (oldest == 0 || since < oldest)) oldest = since;
    });
    return oldest;
}

bool Lane::interrupt(uint32_t id, int64_t since) {
    Worker* worker = crew_.worker(id);
    return worker != nullptr && worker->interrupt(since);
}

bool Lane::lose(uint32_t id) {
    Worker* worker = crew_.worker(id);
    const int thread = worker == nullptr ? 0 : worker->thread();
    if (!crew_.lose(id)) return false;
    // What it does is of no use to anybody: the others' batches go first.
    if (thread != 0) setpriority(PRIO_PROCESS, static_cast<id_t>(thread), 19);
    shared_->stats.lost.fetch_add(1, std::memory_order_relaxed);
    lend_permits();
    shared_->batcher.wake_all();
    shared_->completions->signal();  // who waits for the workers waits for one less
    return true;
}

bool Lane::takes_from(at::Device device) const {
    const auto is_there = [device](const auto& model) { return model->device() == device; };
    return device.is_cpu() || std::any_of(models_.begin(), models_.end(), is_there);
}

std::string Lane::places() const {
    std::string text;
    for (const auto& model : models_) text += (text.empty() ? "" : " or ") + model->device().str();
    return text;
}

void Lane::close() { shared_->batcher.close(); }

void Lane::join() {
    crew_.stop();
    shared_->batcher.wake_all();
    crew_.join();
    shared_->pool->cancel_queued();
    purge();
    offered_.reset();
    models_.clear();  // an owner of the lane holds no weights
}

void Lane::purge() {
    auto result = std::make_unique<BatchResult>();
    shared_->batcher.purge(result->requests);
    if (result->requests.empty()) return;
    result->status.code = Code::cancelled;
    result->pool = shared_->pool;
    shared_->stats.cancelled.fetch_add(result->requests.size(), std::memory_order_relaxed);
    shared_->completions->push(result.release());
}

uint32_t Lane::running() const {
    const uint32_t running = shared_->batcher.running();
    return running - std::min(running, static_cast<uint32_t>(crew_.lost()));
}

size_t Lane::ready_count() const {
    size_t count = 0;
    crew_.for_each([&](const Worker& worker, bool) {
        if (worker.state() == WorkerState::ready && !worker.is_stopping()) ++count;
    });
    return count;
}

std::vector<WorkerRow> Lane::workers() const {
    std::vector<WorkerRow> rows;
    crew_.for_each([&](const Worker& worker, bool is_lost) {
        const WorkerState state = worker.state();
        rows.push_back({worker.id(), worker.device(), state, worker.is_stopping(), is_lost, worker.running_since(),
                        worker.batches(), state == WorkerState::failed ? worker.error() : std::string()});
    });
    return rows;
}

}  // namespace pyserve
