#include "process_lane.h"

#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "clock.h"

namespace pyserve {

ProcessLane::ProcessLane(std::shared_ptr<Completions<>> completions, std::shared_ptr<Poller> poller, size_t capacity)
    : completions_(std::move(completions)), poller_(std::move(poller)), batcher_(capacity) {
    shared_.batcher = &batcher_;
    shared_.completions = completions_.get();
    shared_.poller = poller_.get();
    shared_.feed = [this] { feed(); };
    timer_ = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (timer_ < 0) throw std::system_error(errno, std::generic_category(), "a timer");
    try {
        poller_->add(timer_, *this);
    } catch (...) {
        ::close(timer_);
        throw;
    }
}

ProcessLane::~ProcessLane() {
    join();
    poller_->remove(timer_);
    ::close(timer_);
}

ProcessRequest* ProcessLane::try_submit(std::string_view head, std::string_view body, uint32_t flags, void* owner,
                                        int64_t arrived_at, int64_t deadline) {
    const bool is_rerun = (flags & rerun_flag) != 0;
    if (!is_rerun && batcher_.queue_size() >= batcher_.capacity()) {
        purge();
        if (batcher_.queue_size() >= batcher_.capacity()) return nullptr;
    }
    ProcessRequest* request = shared_.pool->allocate();
    const bool is_small = body.size() <= body_inline_max;
    try {
        request->text.reserve(head.size() + (is_small ? body.size() : 0));
        if (is_rerun) shared_.reruns.push(request);  // nobody looks at it before it is fed
    } catch (...) {
        shared_.pool->release(request);
        throw;
    }
    request->text.assign(head);
    request->head_size = head.size();
    if (is_small) {
        request->text += body;
    } else {
        request->body = body.data();
        request->body_size = body.size();
    }
    request->flags = flags;
    request->owner = owner;
    request->arrived_at = arrived_at;
    request->deadline.store(deadline, std::memory_order_relaxed);
    request->input_size.store(static_cast<int64_t>(head.size() + body.size()), std::memory_order_relaxed);
    request->queued_at.store(SteadyClock::now_ns(), std::memory_order_relaxed);
    request->started_at.store(0, std::memory_order_relaxed);
    request->state.store(State::queued, std::memory_order_release);
    shared_.stats.submitted.fetch_add(1, std::memory_order_relaxed);
    if (is_rerun)
        shared_.stats.retried_singly.fetch_add(1, std::memory_order_relaxed);
    else
        batcher_.try_push(request);  // cannot fail: this thread is the only producer and has looked
    // Not ahead: when the next answers come, all that has gathered goes in one write.
    feed(false);
    return request;
}

size_t ProcessLane::batch_size_of(uint64_t ticket) const noexcept {
    size_t size = 0;
    for (const auto& worker : workers_) size = std::max(size, worker->batch_size_of(ticket));
    return size;
}

bool ProcessLane::cancel(uint64_t ticket) {
    ProcessRequest* request = find(ticket);
    if (request == nullptr || !request->try_cancel()) return false;
    for (const auto& worker : workers_) worker->tell_cancelled(ticket);
    return true;
}

void ProcessLane::set_limits(const BatchLimits& limits) {
    BatchLimits fitting = limits;  // what one frame holds
    fitting.batch_size_max = std::min(limits.batch_size_max, items_max);
    fitting.batch_bytes_max = std::min(limits.batch_bytes_max, static_cast<int64_t>(batch_bytes_max));
    batcher_.set_limits(fitting);
    feed();
}

void ProcessLane::feed(bool ahead) noexcept {
    if (is_feeding_) return;  // a worker that ends while it is given something
    is_feeding_ = true;
    int64_t wake_at = never_ns;
    for (const auto& worker : workers_) {
        if (queue_size() == 0 && !is_closed_) break;
        while (worker->take(wake_at)) {
        }
    }
    for (const auto& worker : workers_) {
        if (!ahead || batcher_.queue_size() == 0) break;
        while (worker->take_ahead()) {
        }
        worker->flush();
    }
    set_timer(wake_at);
    is_feeding_ = false;
}

void ProcessLane::on_ready(uint32_t) noexcept {
    uint64_t count;
    [[maybe_unused]] const ssize_t got = read(timer_, &count, sizeof count);
    timer_at_ = never_ns;
    feed();
}

void ProcessLane::set_timer(int64_t at) noexcept {
    if (at == timer_at_) return;
    timer_at_ = at;
    itimerspec when{};  // all zero: disarmed
    if (at != never_ns) {
        at = std::max<int64_t>(at, 1);
        when.it_value = {static_cast<time_t>(at / 1'000'000'000), static_cast<long>(at % 1'000'000'000)};
    }
    timerfd_settime(timer_, TFD_TIMER_ABSTIME, &when, nullptr);
}

uint32_t ProcessLane::add_worker(int socket, int request_memory, int answer_memory, size_t in_flight_max) {
    const uint32_t id = next_worker_id_++;
    workers_.push_back(
        std::make_unique<ProcessWorker>(shared_, id, socket, request_memory, answer_memory, in_flight_max));
    feed();
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
    std::unique_ptr<ProcessWorker> removed = std::move(*found);
    workers_.erase(found);
    removed.reset();
    feed();  // others may run in its place
}

void ProcessLane::close() {
    batcher_.close();
    is_closed_ = true;
    feed();  // those that have nothing end
}

void ProcessLane::join() {
    for (const auto& worker : workers_) worker->stop();
    workers_.clear();
    shared_.pool->cancel_queued();
    purge();
}

void ProcessLane::purge() {
    auto result = std::make_unique<ProcessResult>();
    batcher_.purge(result->requests);
    shared_.reruns.purge(result->requests);
    if (result->requests.empty()) return;
    result->status.code = Code::cancelled;
    result->pool = shared_.pool;
    shared_.stats.cancelled.fetch_add(result->requests.size(), std::memory_order_relaxed);
    completions_->push(result.release());
}

std::vector<ProcessWorkerRow> ProcessLane::workers() const {
    std::vector<ProcessWorkerRow> rows;
    for (const auto& worker : workers_) {
        const ProcessState state = worker->state();
        rows.push_back({worker->id(), state, worker->is_stopping(), worker->running_since(), worker->batches(),
                        worker->died_in_rerun(), state == ProcessState::ready ? std::string() : worker->error()});
    }
    return rows;
}

}  // namespace pyserve
