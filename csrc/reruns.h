// Requests of the python lane that are run a second time, because the worker that ran them with others has died: any of
// them may have been the cause.
//
// They are given to workers group by group, each group without other requests, and one group at a time: those that kill
// once more cost one worker after the other, while the lane's other workers serve.
//
// Threads: loop thread only.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "batcher.h"
#include "pool.h"
#include "request.h"

namespace pyserve {

// Flags of a ProcessRequest: it is such a request, and of which group. Neighbours of the same number are one group.
inline constexpr uint32_t rerun_flag = 1 << 15;
inline constexpr uint32_t rerun_group_shift = 16;

// `T` is a Request with `flags`.
template <class T>
class Reruns {
  public:
    // REQUIRES: request.state == queued by the time of the next call.
    void push(T* request) { waiting_.push_back(request); }

    bool empty() const noexcept { return waiting_.empty(); }
    size_t size() const noexcept { return waiting_.size(); }
    // Whether a worker that has nothing else may take a group now.
    bool may_take() const noexcept { return !waiting_.empty() && !is_running_; }
    // A group runs from `began` to `ended`.
    void began() noexcept { is_running_ = true; }
    void ended() noexcept { is_running_ = false; }

    // The next group: those of it that may still run, no more than `bytes_max` of input but for the first, and before
    // them what has ended meanwhile. False if there is nothing of either. When it throws, nothing was taken.
    bool take(Take& take, int64_t now, int64_t bytes_max) {
        take.clear();
        take.requests.reserve(waiting_.size());
        take.dropped.reserve(waiting_.size());
        int64_t room = bytes_max;
        while (!waiting_.empty()) {
            T* request = waiting_.front();
            if (!take.requests.empty()) {
                const auto* first = static_cast<const T*>(take.requests.front());
                room -= request->input_size.load(std::memory_order_relaxed);
                if (first->flags >> rerun_group_shift != request->flags >> rerun_group_shift || room < 0) break;
            } else {
                room = bytes_max - request->input_size.load(std::memory_order_relaxed);
            }
            waiting_.pop_front();
            const bool is_late = request->deadline.load(std::memory_order_relaxed) <= now;
            if (request->try_move(State::queued, is_late ? State::expired : State::batched) && !is_late)
                take.requests.push_back(request);
            else
                take.dropped.push_back(request);
        }
        take.release = Release::idle;
        return !take.empty();
    }

    // Takes out what was cancelled, keeping the order of the others.
    void purge(std::vector<Request*>& dropped) {
        dropped.reserve(dropped.size() + waiting_.size());
        size_t kept = 0;
        for (T* request : waiting_) {
            if (request->state.load(std::memory_order_acquire) == State::queued)
                waiting_[kept++] = request;
            else
                dropped.push_back(request);
        }
        waiting_.resize(kept);
    }

  private:
    std::deque<T*> waiting_;
    bool is_running_ = false;
};

}  // namespace pyserve
