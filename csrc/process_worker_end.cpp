// The end of a worker process, of its own accord or not: what it had comes back, with what is known of each request's
// part in that.
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <string>
#include <utility>

#include "clock.h"
#include "process_worker.h"

namespace pyserve {

// Told to stop, and nothing left: the process may go.
void ProcessWorker::end_if_done() noexcept {
    if (state_ != ProcessState::ready || !is_stopping_ || !flights_.empty()) return;
    try {
        FrameHead head;
        head.type = FrameType::stop;
        append(out_, head);
        flush();
    } catch (const std::exception&) {
        // Without it, it sees the end of the connection.
    }
    end(ProcessState::stopped);
}

void ProcessWorker::die(std::string_view what, std::string_view why) noexcept {
    if (state_ != ProcessState::ready) return;
    died_in_rerun_ = has_rerun_;
    try {
        fail(std::string(what).append(why));
    } catch (const std::exception&) {
        // Without memory for the reason it dies all the same.
    }
    try {
        abandon();
    } catch (const std::exception&) {
        // What is left comes back when the worker is removed.
    }
    if (!is_stopping_) --shared_.ready_count;
    end(ProcessState::died);
}

void ProcessWorker::end(ProcessState state) noexcept {
    state_ = state;
    running_since_ = 0;
    end_rerun();
    shared_.poller->remove(socket_);
    shutdown(socket_, SHUT_RDWR);
    shared_.completions->signal();
}

// The end: whatever is still with the process comes back unanswered. If it throws, nothing is lost: see flights_.
void ProcessWorker::abandon() {
    WorkerNotes notes;
    if (pread(answer_memory_, &notes, sizeof notes, 0) != sizeof notes) notes.begun = UINT64_MAX;
    notes.taken = std::max(notes.taken, notes.begun);
    // Those that may have been the cause: in multiplexed mode all that are not over; else those of the batch it was at,
    // since the answers of those before it may just not have left.
    size_t suspects = 0;
    for (const Flight& flight : flights_) {
        if (flight.id > notes.taken) continue;
        if (is_multiplexed()) suspects += flight.open_count;
        if (!is_multiplexed() && flight.id == notes.taken) suspects = flight.requests.size();
    }
    while (!flights_.empty()) {
        const Flight& flight = flights_.front();
        const Code code = flight.id <= notes.begun   ? Code::worker_died
                          : flight.id <= notes.taken ? Code::not_begun
                                                     : Code::not_run;
        // One that was run by itself, after its batch had failed, has had its second run.
        const uint64_t alone = !is_multiplexed() && flight.id == notes.begun ? notes.alone : 0;
        for (Waiting& waiting : flights_.front().requests) {
            if (alone == 0 || waiting.is_over || ProcessPool::ticket_of(*waiting.request) != alone - 1) continue;
            std::vector<Request*> second{waiting.request};
            hand_back(second, code, flight, true);
            waiting.is_over = true;
        }
        std::vector<Request*> open;
        open.reserve(flight.requests.size());
        for (const Waiting& waiting : flight.requests) {
            if (!waiting.is_over) open.push_back(waiting.request);
        }
        hand_back(open, code, flight, suspects == 1 && (is_multiplexed() || flight.id == notes.taken));
        if (flight.holds_permit) shared_.batcher->leave();
        flights_.pop_front();
    }
    hand_back(take_.requests, Code::not_run, {});
    if (!take_.dropped.empty()) drop(take_.dropped);
}

void ProcessWorker::hand_back(std::vector<Request*>& requests, Code code, const Flight& flight, bool was_alone) {
    if (requests.empty()) return;
    auto result = std::make_unique<ProcessResult>();
    result->status.message = error_;
    result->status.code = code;
    result->was_alone = was_alone && code != Code::not_run;
    result->batch_size = static_cast<uint32_t>(flight.requests.size());
    result->started_at = flight.started_at;
    result->staged_at = flight.sent_at;
    result->finished_at = SteadyClock::now_ns();
    for (Request* request : requests) {
        if (request->try_move(State::running, State::done) || request->try_move(State::batched, State::done))
            shared_.stats.failed.fetch_add(1, std::memory_order_relaxed);
        else
            shared_.stats.cancelled.fetch_add(1, std::memory_order_relaxed);
    }
    result->requests = std::move(requests);
    requests.clear();
    shared_.complete(std::move(result));
}

}  // namespace pyserve
