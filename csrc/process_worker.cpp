#include "process_worker.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <utility>

#include "clock.h"
#include "memory_file.h"

namespace pyserve {
namespace {

constexpr double seconds_per_ns = 1e-9;
// Batches that take less than this together are sent ahead.
constexpr double ahead_time_ns = 1e6;
constexpr size_t ahead_batches_max = 16;
constexpr uint64_t measured_min = 8;  // batches, before their time is believed
constexpr double average_weight = 0.1;
constexpr int receives_max = 16;           // of 64 KiB, in one turn of the loop
constexpr uint64_t memory_kept = 1 << 20;  // bytes of a memory file that an idle worker keeps

}  // namespace

ProcessWorker::ProcessWorker(ProcessLaneShared& shared, uint32_t id, int socket, int request_memory, int answer_memory,
                             size_t in_flight_max)
    : shared_(shared), id_(id), in_flight_max_(in_flight_max), socket_(socket), request_memory_(request_memory),
      answer_memory_(answer_memory) {
    shared_.poller->add(socket_, *this);
    ++shared_.ready_count;
}

ProcessWorker::~ProcessWorker() {
    if (state_ == ProcessState::ready) die("it was removed");
    try {
        abandon();  // nothing, unless it died for want of memory
    } catch (const std::exception&) {
        // The requests stay with the loop's time limits.
    }
}

void ProcessWorker::stop() noexcept {
    if (state_ != ProcessState::ready || is_stopping_) return;
    is_stopping_ = true;
    --shared_.ready_count;
    end_if_done();
}

void ProcessWorker::on_ready(uint32_t events) noexcept {
    if (state_ != ProcessState::ready) return;
    try {
        if ((events & EPOLLOUT) != 0) flush();
        if ((events & ~uint32_t{EPOLLOUT}) != 0 && !receive()) {
            die(error_);
        } else {
            end_if_done();
        }
    } catch (const std::exception& error) {
        die("serving it failed: ", error.what());
    }
    shared_.feed();
    flush();
}

bool ProcessWorker::take(int64_t& wake_at) noexcept {
    if (!takes_batches() || has_rerun_) return false;
    if (is_multiplexed() ? in_flight_count_ >= in_flight_max_ : !flights_.empty()) return false;
    try {
        if (!had_rerun_ && take_rerun()) return true;
        int64_t ripe_at = never_ns;
        const size_t room = is_multiplexed() ? in_flight_max_ - in_flight_count_ : SIZE_MAX;
        const Next next = shared_.batcher->try_next(take_, ripe_at, false, room);
        wake_at = std::min(wake_at, ripe_at);
        if (next != Next::batch) {
            if (had_rerun_ && take_rerun()) return true;
            if (next == Next::closed && flights_.empty() && shared_.reruns.empty()) stop();
            return false;
        }
        had_rerun_ = false;
        if (is_multiplexed()) shared_.batcher->leave();  // how many may run is this worker's own affair
        send_batch(take_);
        return true;
    } catch (const std::exception& error) {
        die("sending to it failed: ", error.what());
        return false;
    }
}

// A group of the second runs, if it has nothing else. In multiplexed mode one after the other: a worker that has begun
// with others may not be empty again for long.
bool ProcessWorker::take_rerun() {
    if (!flights_.empty() || !shared_.reruns.may_take()) return false;
    if (!is_multiplexed() && !shared_.batcher->try_enter()) return false;
    try {
        if (!shared_.reruns.take(take_, SteadyClock::now_ns(), batch_bytes_max)) {
            if (!is_multiplexed()) shared_.batcher->leave();
            return false;
        }
    } catch (...) {
        if (!is_multiplexed()) shared_.batcher->leave();
        throw;
    }
    had_rerun_ = !is_multiplexed();
    send_batch(take_, true);
    return true;
}

void ProcessWorker::end_rerun() noexcept {
    if (std::exchange(has_rerun_, false)) shared_.reruns.ended();
}

bool ProcessWorker::take_ahead() noexcept {
    if (!takes_batches() || is_multiplexed() || flights_.empty() || flights_.size() >= ahead_max()) return false;
    if (has_rerun_ || shared_.reruns.may_take()) return false;  // a worker that never is empty would take none
    // What the others would take at once is left to them.
    const size_t others = shared_.ready_count - 1;
    if (shared_.batcher->queue_size() <= others * shared_.batcher->batch_size_max()) return false;
    try {
        int64_t unused;
        if (shared_.batcher->try_next(take_, unused) != Next::batch) return false;
        send_batch(take_);
        return true;
    } catch (const std::exception& error) {
        die("sending to it failed: ", error.what());
        return false;
    }
}

size_t ProcessWorker::ahead_max() const {
    if (measured_ < measured_min || flights_.empty() || flights_.back().uses_memory) return 1;
    const double fit = ahead_time_ns / std::max(batch_time_ns_, 1.0);
    return fit >= ahead_batches_max ? ahead_batches_max : std::max<size_t>(1, static_cast<size_t>(fit));
}

void ProcessWorker::send_batch(Take& take, bool is_rerun) {
    try {
        flights_.emplace_back();
    } catch (...) {
        if (!is_multiplexed()) shared_.batcher->leave();
        throw;
    }
    Flight& flight = flights_.back();
    flight.taken_at = flight.sent_at = SteadyClock::now_ns();
    flight.holds_permit = !is_multiplexed();
    flight.is_rerun = is_rerun;
    flight.release = take.release;
    flight.id = next_batch_++;
    flight.requests.reserve(take.requests.size());
    for (Request* request : take.requests) {
        if (request->try_move(State::batched, State::running))
            flight.requests.push_back({static_cast<ProcessRequest*>(request)});
        else
            take.dropped.push_back(request);  // the batcher has reserved as much as the ring holds
    }
    take.requests.clear();
    if (!take.dropped.empty()) drop(take.dropped);
    if (flight.requests.empty()) {
        if (flight.holds_permit) shared_.batcher->leave();
        flights_.pop_back();
        return;
    }
    if (is_rerun) {
        has_rerun_ = true;
        shared_.reruns.began();
    }
    flight.open_count = flight.requests.size();
    in_flight_count_ += flight.open_count;
    if (flights_.size() == 1 || is_multiplexed()) begin(flight);

    std::string heads, rest;
    for (const Waiting& waiting : flight.requests) write_item(*waiting.request, heads, rest, flight);
    FrameHead head;
    head.type = FrameType::batch;
    head.batch = flight.id;
    head.count = static_cast<uint32_t>(flight.requests.size());
    head.flags = static_cast<uint32_t>(shared_.intra_op_threads);
    head.size = heads.size() + rest.size();
    append(out_, head);
    out_ += heads;
    out_ += rest;
    flight.sent_at = SteadyClock::now_ns();
    // Several batches that go ahead leave in one write, unless there is much of it.
    if (flights_.size() == 1 || is_multiplexed() || out_.size() - out_sent_ > 65536) flush();
}

void ProcessWorker::write_item(const ProcessRequest& request, std::string& heads, std::string& rest, Flight& flight) {
    const std::string_view content = request.content();
    ItemHead item;
    item.ticket = ProcessPool::ticket_of(request);
    item.flags = request.flags;
    item.head_size = static_cast<uint32_t>(request.head_size);
    item.body_size = content.size();
    if (content.size() > body_inline_max && content.size() <= memory_size_max - memory_used_ &&
        write_at(request_memory_, content, memory_used_)) {
        item.offset = memory_used_;
        memory_used_ += content.size();
        memory_high_ = std::max(memory_high_, memory_used_);
        flight.uses_memory = true;
    }
    append(heads, item);
    rest += request.head();
    if (item.offset == in_frame) rest += content;
}

void ProcessWorker::flush() noexcept {
    if (state_ != ProcessState::ready || out_.empty()) return;
    while (out_sent_ < out_.size()) {
        const ssize_t sent =
            send(socket_, out_.data() + out_sent_, out_.size() - out_sent_, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno == EINTR) continue;
            if (errno == EAGAIN || errno == EWOULDBLOCK) return watch_writing(true);
            // It takes nothing any more, though it may be there still: the end, when what it sent has been read.
            shutdown(socket_, SHUT_RDWR);
            break;
        }
        out_sent_ += static_cast<size_t>(sent);
    }
    watch_writing(false);
    out_sent_ = 0;
    if (out_.capacity() > (1 << 20)) std::string().swap(out_);
    out_.clear();
}

void ProcessWorker::watch_writing(bool waits) noexcept {
    if (waits == waits_to_write_) return;
    waits_to_write_ = waits;
    shared_.poller->change(socket_, *this, waits ? EPOLLIN | EPOLLOUT : EPOLLIN);
}

// Takes what came. False when it is over. A process that sends without end does not keep the loop here.
bool ProcessWorker::receive() {
    for (int turn = 0; turn < receives_max; ++turn) {
        size_t room;
        char* to = in_.room(room);
        const ssize_t got = recv(socket_, to, room, MSG_DONTWAIT);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return true;
        if (got <= 0) return fail("its connection ended");
        in_.received(static_cast<size_t>(got));
        FrameHead head;
        std::string_view content;
        const char* problem = nullptr;
        while (in_.peek(head, content, problem)) {
            if (!on_frame(head, content)) return false;
            in_.take(head);
        }
        if (problem != nullptr) return fail(std::string("it sent ") + problem);
        if (static_cast<size_t>(got) < room) return true;
    }
    return true;
}

bool ProcessWorker::on_frame(const FrameHead& head, std::string_view content) {
    if (head.type != FrameType::answers) return fail("it sent a frame of a type that workers do not send");
    const auto flight =
        std::find_if(flights_.begin(), flights_.end(), [&](const Flight& f) { return f.id == head.batch; });
    if (flight == flights_.end()) return fail("it sent answers for a batch that it does not have");
    if (const char* problem = parse(head, content, parts_)) return fail(std::string("it sent ") + problem);
    if (!on_answers(*flight, parts_)) return false;
    if (flight->open_count > 0) return true;
    const bool was_front = flight == flights_.begin();
    Flight ended = std::move(*flight);
    flights_.erase(flight);
    if (was_front || is_multiplexed()) observe(ended);
    if (ended.is_rerun) end_rerun();
    if (ended.holds_permit) shared_.batcher->leave();
    shared_.stats.batches.fetch_add(1, std::memory_order_relaxed);
    ++batches_;
    trim(ended);
    if (was_front && !flights_.empty() && !is_multiplexed()) begin(flights_.front());
    if (flights_.empty()) running_since_ = 0;
    return true;
}

bool ProcessWorker::on_answers(Flight& flight, const std::vector<Part<AnswerHead>>& parts) {
    auto result = std::make_unique<ProcessResult>();
    result->started_at = flight.started_at != 0 ? flight.started_at : flight.sent_at;
    result->staged_at = flight.sent_at;
    result->finished_at = SteadyClock::now_ns();
    result->batch_size = static_cast<uint32_t>(flight.requests.size());
    result->release = flight.release;
    running_since_ = result->finished_at;
    try {
        collect(flight, parts, *result);
    } catch (...) {
        deliver(std::move(result));  // what is in it has left the flight
        throw;
    }
    deliver(std::move(result));
    return error_.empty();
}

void ProcessWorker::collect(Flight& flight, const std::vector<Part<AnswerHead>>& parts, ProcessResult& result) {
    const size_t count = std::min(parts.size(), flight.open_count);
    result.answers.reserve(count);
    result.requests.reserve(count);
    bool used_memory = false;
    for (const auto& part : parts) {
        Waiting* waiting = nullptr;
        for (size_t i = 0; i < flight.requests.size() && waiting == nullptr; ++i) {
            Waiting& candidate = flight.requests[(flight.next + i) % flight.requests.size()];
            if (!candidate.is_over && ProcessPool::ticket_of(*candidate.request) == part.head.ticket) {
                waiting = &candidate;
                flight.next = (flight.next + i + 1) % flight.requests.size();
            }
        }
        if (waiting == nullptr) {
            fail("it sent an answer to a request that it does not have");
            break;
        }
        AnswerPart answer{part.head.kind, part.head.status, std::string(part.text), {}};
        if (!read_body(part, answer.body, used_memory)) {
            fail("it sent a body that is not in its memory");
            break;
        }
        if (part.head.kind == AnswerKind::chunk) {
            on_chunk(*waiting, std::move(answer), part.head.ticket);
            flight.next = static_cast<size_t>(waiting - flight.requests.data());
            continue;
        }
        if (part.head.kind > AnswerKind::last) {
            fail("it sent an answer of an unknown kind");
            break;
        }
        result.answers.push_back(std::move(answer));
        result.requests.push_back(waiting->request);
        waiting->is_over = true;
        --flight.open_count;
        --in_flight_count_;
    }
    if (used_memory) {
        FrameHead copied;
        copied.type = FrameType::copied;
        append(out_, copied);
    }
}

void ProcessWorker::deliver(std::unique_ptr<ProcessResult> result) noexcept {
    if (result->requests.empty()) return;
    LaneStats& stats = shared_.stats;
    for (size_t i = 0; i < result->requests.size(); ++i) {
        Request* request = result->requests[i];
        stats.queue.observe(static_cast<double>(result->started_at - request->queued_at.load()) * seconds_per_ns);
        if (!request->try_move(State::running, State::done))
            stats.cancelled.fetch_add(1, std::memory_order_relaxed);
        else if (result->answers[i].kind == AnswerKind::error)
            stats.failed.fetch_add(1, std::memory_order_relaxed);
    }
    shared_.complete(std::move(result));
}

bool ProcessWorker::read_body(const Part<AnswerHead>& part, std::string& body, bool& used_memory) {
    if (part.head.offset == in_frame) {
        body.assign(part.body);
        return true;
    }
    used_memory = true;
    answer_high_ = std::max(answer_high_, part.head.offset + part.head.body_size);
    // As it is there: a worker that announces more than it wrote must not make us fill pages.
    const off_t end = lseek(answer_memory_, 0, SEEK_END);
    if (end < 0 || part.head.offset + part.head.body_size > static_cast<uint64_t>(end)) return false;
    body.resize(part.head.body_size);
    return read_at(answer_memory_, body.data(), body.size(), part.head.offset);
}

void ProcessWorker::on_chunk(Waiting& waiting, AnswerPart part, uint64_t ticket) {
    if (waiting.request->state.load(std::memory_order_acquire) != State::running) {
        write_cancel(waiting);
        return;
    }
    auto result = std::make_unique<ProcessResult>();
    result->is_chunk = true;
    result->chunk_ticket = ticket;
    result->answers.push_back(std::move(part));
    shared_.complete(std::move(result));
}

void ProcessWorker::write_cancel(Waiting& waiting) {
    if (std::exchange(waiting.cancel_sent, true)) return;
    FrameHead cancel;
    cancel.type = FrameType::cancel;
    cancel.size = sizeof(uint64_t);
    append(out_, cancel);
    append(out_, ProcessPool::ticket_of(*waiting.request));
}

size_t ProcessWorker::batch_size_of(uint64_t ticket) const noexcept {
    for (const Flight& flight : flights_) {
        for (const Waiting& waiting : flight.requests) {
            if (!waiting.is_over && ProcessPool::ticket_of(*waiting.request) == ticket) return flight.requests.size();
        }
    }
    return 0;
}

void ProcessWorker::tell_cancelled(uint64_t ticket) noexcept {
    if (state_ != ProcessState::ready) return;
    try {
        for (Flight& flight : flights_) {
            for (Waiting& waiting : flight.requests) {
                if (waiting.is_over || ProcessPool::ticket_of(*waiting.request) != ticket) continue;
                write_cancel(waiting);
                flush();
                return;
            }
        }
    } catch (const std::exception&) {
        // Without memory for it the process finishes in vain.
    }
}

// The process comes to it now.
void ProcessWorker::begin(Flight& flight) {
    flight.started_at = SteadyClock::now_ns();
    // In multiplexed mode a process that is stuck does not come to life by what it is sent.
    if (running_since_ == 0 || !is_multiplexed()) running_since_ = flight.started_at;
    for (const Waiting& waiting : flight.requests) {
        if (waiting.is_over) continue;
        waiting.request->started_at.store(flight.started_at, std::memory_order_relaxed);
    }
}

void ProcessWorker::observe(const Flight& flight) {
    const auto time = static_cast<double>(SteadyClock::now_ns() - flight.started_at);
    batch_time_ns_ = measured_ == 0 ? time : batch_time_ns_ + average_weight * (time - batch_time_ns_);
    // One slow batch says more than many fast ones: what is sent behind it waits for it.
    if (time > ahead_time_ns) batch_time_ns_ = std::max(batch_time_ns_, ahead_time_ns);
    ++measured_;
    LaneStats& stats = shared_.stats;
    stats.staging.observe(static_cast<double>(flight.sent_at - flight.taken_at) * seconds_per_ns);
    stats.inference.observe(time * seconds_per_ns);
    stats.batch_size.observe(static_cast<double>(flight.requests.size()));
}

// Gives back the memory that large bodies took.
void ProcessWorker::trim(const Flight& flight) {
    if (flight.uses_memory &&
        std::none_of(flights_.begin(), flights_.end(), [](const Flight& other) { return other.uses_memory; })) {
        punch(request_memory_, memory_high_, memory_kept);
        memory_used_ = memory_high_ = 0;
    }
    if (flights_.empty() && answer_high_ > 0) {
        punch(answer_memory_, answer_high_, memory_kept);
        answer_high_ = 0;
    }
}

void ProcessWorker::drop(std::vector<Request*>& requests) {
    auto result = std::make_unique<ProcessResult>();
    result->end_unbegun(requests, shared_.stats);
    shared_.complete(std::move(result));
}

}  // namespace pyserve
