// The workers of a lane: started, told to stop, joined, and given up when they do not come back.
//
//     at work ──> told to stop ──> over            joined by the next reap
//        └───────────┴──> lost ──> over            as above, however late that is
//                           └──> abandoned         the crew ended first; the thread keeps what it needs alive
//
// A worker whose batch does not come to an end is lost: it is told to stop, another one takes its place, and nobody waits
// for it. It still owns its batch and the run permit of it; whoever counts permits lends one more meanwhile, see lost().
// So nothing is taken from a thread that may be alive, and coming back late is nothing special: the batch is completed,
// the permit given back, and the worker sees that it was told to stop.
//
// `W` is a worker: run(), the thread's body; stop(); is_stopping(); state(); id(). Each is shared by the crew and its
// thread.
//
// Threads: one, the loop.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "probe.h"

namespace pyserve {

enum class WorkerState : uint8_t { starting, warming, ready, failed, stopped };

inline bool is_over(WorkerState state) noexcept {
    return state == WorkerState::failed || state == WorkerState::stopped;
}

// Threads of a process that were lost and have not come back, of all crews.
using LostCount = std::shared_ptr<std::atomic<int>>;

template <class W, class Probe = NoProbe>
class Crew {
  public:
    explicit Crew(LostCount lost_of_all = std::make_shared<std::atomic<int>>(0))
        : lost_of_all_(std::move(lost_of_all)) {}
    ~Crew() { join(); }
    Crew(const Crew&) = delete;
    Crew& operator=(const Crew&) = delete;

    void add(std::shared_ptr<W> worker) {
        auto fate = std::make_shared<Fate>(End::none);
        std::thread thread([worker, fate, count = lost_of_all_] {
            worker->run();
            Probe::at(Point::crew_before_end);
            if (fate->exchange(End::own, std::memory_order_acq_rel) == End::lost) {
                count->fetch_sub(1, std::memory_order_acq_rel);
            }
        });
        members_.push_back({std::move(worker), std::move(fate), std::move(thread)});
    }

    // Tells workers to stop until `count` are left that nobody has told; returns how many are missing.
    size_t shrink(size_t count) {
        std::vector<W*> live;
        for (const Member& member : members_) {
            if (!member.worker->is_stopping() && !is_over(member.worker->state())) live.push_back(member.worker.get());
        }
        for (; live.size() > count; live.pop_back()) live.back()->stop();
        return count - live.size();
    }

    // Gives a worker up. False if there is none of that id, or it has come to its end by itself.
    bool lose(uint32_t id) {
        const auto member = find(id);
        if (member == members_.end()) return false;
        Probe::at(Point::crew_before_loss);
        lost_of_all_->fetch_add(1, std::memory_order_acq_rel);  // first: its thread may count it off at once
        End seen = End::none;
        if (!member->fate->compare_exchange_strong(seen, End::lost, std::memory_order_acq_rel)) {
            lost_of_all_->fetch_sub(1, std::memory_order_acq_rel);
            return false;
        }
        member->worker->stop();
        return true;
    }

    // Joins those that stopped; those that failed stay until forget_failed.
    void reap() {
        remove([](const Member& member) { return member.worker->state() == WorkerState::stopped; });
    }
    void forget_failed() {
        remove([](const Member& member) { return member.worker->state() == WorkerState::failed; });
    }

    // Tells all to stop.
    void stop() {
        for (const Member& member : members_) member.worker->stop();
    }
    // Waits for all but the lost ones, which are abandoned. REQUIRES: whatever they sleep on was woken after stop().
    void join() {
        stop();
        for (Member& member : members_) {
            if (is_lost(member))
                member.thread.detach();
            else
                member.thread.join();
        }
        members_.clear();
    }

    // Workers that were given up and have not come back.
    size_t lost() const { return static_cast<size_t>(std::count_if(members_.begin(), members_.end(), is_lost)); }

    // Calls `visit(worker, is_lost)` for each.
    template <class Visit>
    void for_each(const Visit& visit) const {
        for (const Member& member : members_) visit(*member.worker, is_lost(member));
    }
    W* worker(uint32_t id) {
        const auto member = find(id);
        return member == members_.end() ? nullptr : member->worker.get();
    }

  private:
    enum class End : uint8_t { none, lost, own };
    using Fate = std::atomic<End>;

    struct Member {
        std::shared_ptr<W> worker;
        std::shared_ptr<Fate> fate;  // moves once, by the loop or by the thread's end
        std::thread thread;
    };

    static bool is_lost(const Member& member) { return member.fate->load(std::memory_order_acquire) == End::lost; }

    auto find(uint32_t id) {
        return std::find_if(members_.begin(), members_.end(),
                            [id](const Member& member) { return member.worker->id() == id; });
    }

    // A worker that is over has nothing left to do but to end its thread.
    template <class Is>
    void remove(const Is& is) {
        std::erase_if(members_, [&](Member& member) {
            if (!is(member)) return false;
            member.thread.join();
            return true;
        });
    }

    LostCount lost_of_all_;
    std::vector<Member> members_;
};

}  // namespace pyserve
