// The batcher with real threads: nothing is lost or doubled, and nobody sleeps while there is work.
//
// Requests are recycled through a pool, as the lane does, so that consumers do look at requests that others
// have claimed, completed and queued again meanwhile. A lost wake-up shows as a hang, which the watchdog
// reports.
#include <poll.h>

#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "batcher.h"
#include "completion.h"
#include "harness.h"

using harness::Random;
using pyserve::Batcher;
using pyserve::BatchLimits;
using pyserve::CompletionNode;
using pyserve::Completions;
using pyserve::never_ns;
using pyserve::Next;
using pyserve::Request;
using pyserve::State;
using pyserve::SteadyClock;
using pyserve::Take;

namespace {

struct Finished : CompletionNode {
    std::vector<Request*> requests;
};

struct StoppableWorker {
    std::atomic<bool> stop{false};
    std::thread thread;
};

// The loop side of a lane, with requests that say nothing but who they are.
class Life {
  public:
    explicit Life(size_t capacity) : batcher_(capacity, UINT64_MAX - 9), pool_(4 * capacity) {
        for (Request& request : pool_) free_.push_back(&request);
    }

    void set_limits(const BatchLimits& limits) { batcher_.set_limits(limits); }

    void add_worker() {
        auto& worker = workers_.emplace_back(std::make_unique<StoppableWorker>());
        worker->thread = std::thread([this, &stop = worker->stop] { serve(stop); });
    }

    // Joins: what the worker has taken it finishes first.
    void stop_worker() {
        workers_.front()->stop.store(true, std::memory_order_release);
        batcher_.wake_all();
        workers_.front()->thread.join();
        workers_.pop_front();
    }

    void announce() { batcher_.announce(); }

    bool try_push(int64_t deadline, bool announces = true) {
        if (free_.empty() || batcher_.queue_size() >= batcher_.capacity()) return false;
        Request* request = free_.back();
        free_.pop_back();
        request->queued_at.store(SteadyClock::now_ns(), std::memory_order_relaxed);
        request->deadline.store(deadline, std::memory_order_relaxed);
        request->input_size.store(static_cast<int64_t>(pushed_ % 7), std::memory_order_relaxed);
        request->state.store(State::queued, std::memory_order_release);
        CHECK(announces ? batcher_.try_push(request) : batcher_.try_push_unannounced(request));
        ++pushed_;
        return true;
    }

    void cancel(size_t index) { pool_[index % pool_.size()].try_cancel(); }

    void purge() {
        auto done = std::make_unique<Finished>();
        batcher_.purge(done->requests);
        completions_.push(done.release());
    }

    void drain(int timeout_ms) {
        pollfd entry{completions_.fd(), POLLIN, 0};
        if (poll(&entry, 1, timeout_ms) == 0) return;
        CompletionNode* node = completions_.drain();
        while (node != nullptr) {
            const std::unique_ptr<Finished> done(static_cast<Finished*>(node));
            node = node->next;
            for (Request* request : done->requests) release(request);
        }
    }

    void close_and_join() {
        batcher_.close();
        while (ended_ < pushed_) {
            if (pushed_ % 3 == 0) purge();  // a client may go away during the drain too
            drain(-1);
        }
        for (const auto& worker : workers_) worker->thread.join();  // by themselves: close is enough
        CHECK_EQ(free_.size(), pool_.size());
        CHECK_EQ(batcher_.queue_size(), size_t{0});
        CHECK_EQ(batcher_.running(), 0u);
    }

    int64_t pushed() const { return pushed_; }
    int64_t ended() const { return ended_; }
    size_t workers() const { return workers_.size(); }
    size_t capacity() const { return batcher_.capacity(); }

  private:
    void serve(const std::atomic<bool>& stop) {
        Take take;
        for (;;) {
            const int64_t before = SteadyClock::now_ns();
            if (batcher_.next_batch(take, stop) != Next::batch) return;
            auto done = std::make_unique<Finished>();
            for (Request* request : take.requests) {
                CHECK(request->deadline.load(std::memory_order_relaxed) > before);
                if (request->try_move(State::batched, State::running)) {
                    request->try_move(State::running, State::done);
                }
                done->requests.push_back(request);
            }
            for (Request* request : take.dropped) {
                const State state = request->state.load(std::memory_order_acquire);
                CHECK(state == State::cancelled || state == State::expired);
                done->requests.push_back(request);
            }
            completions_.push(done.release());
            batcher_.leave();
        }
    }

    // A request that came twice would be found free here.
    void release(Request* request) {
        const State state = request->state.load(std::memory_order_acquire);
        CHECK(state == State::done || state == State::cancelled || state == State::expired);
        request->state.store(State::free, std::memory_order_release);
        free_.push_back(request);
        ++ended_;
    }

    Batcher<> batcher_;
    Completions<> completions_;
    std::vector<Request> pool_;
    std::vector<Request*> free_;
    std::deque<std::unique_ptr<StoppableWorker>> workers_;
    int64_t pushed_ = 0;
    int64_t ended_ = 0;
};

BatchLimits random_limits(Random& random) {
    BatchLimits limits;
    limits.batch_size_max = static_cast<uint32_t>(1 + random.below(8));
    if (random.chance(50)) {
        limits.batch_size_min = static_cast<uint32_t>(1 + random.below(8));
        // Either a window that ends soon, or one that only a change of the limits or the close can end.
        limits.batch_delay_max_ns = random.chance(50) ? random.between(0, 50'000) : INT64_MAX;
    }
    if (random.chance(30)) limits.batch_bytes_max = random.between(0, 20);
    if (random.chance(50)) limits.running_max = static_cast<uint32_t>(1 + random.below(3));
    return limits;
}

}  // namespace

TEST(one_request_at_a_time_never_waits_for_a_lost_wake_up) {
    for (const uint32_t running_max : {1u, 2u, UINT32_MAX}) {
        Life life(4);
        life.set_limits({.batch_size_max = 4, .running_max = running_max});
        for (int i = 0; i < 3; ++i) life.add_worker();
        for (int64_t i = 0; i < harness::scaled(30'000); ++i) {
            CHECK(life.try_push(never_ns));
            while (life.ended() < life.pushed()) life.drain(-1);
            harness::step();
        }
        life.close_and_join();
    }
}

TEST(one_announcement_wakes_for_all_that_was_pushed_before_it) {
    for (const uint32_t running_max : {1u, 2u, UINT32_MAX}) {
        Life life(16);
        life.set_limits({.batch_size_max = 4, .running_max = running_max});
        for (int i = 0; i < 3; ++i) life.add_worker();
        for (int64_t i = 0; i < harness::scaled(10'000); ++i) {
            for (int64_t count = 1 + i % 9; count > 0; --count) CHECK(life.try_push(never_ns, /*announces=*/false));
            life.announce();
            while (life.ended() < life.pushed()) life.drain(-1);
            harness::step();
        }
        life.close_and_join();
    }
}

TEST(a_change_of_limits_reaches_workers_that_wait_inside_a_window) {
    Life life(8);
    for (int i = 0; i < 2; ++i) life.add_worker();
    for (int64_t i = 0; i < harness::scaled(20'000); ++i) {
        life.set_limits({.batch_size_max = 8, .batch_size_min = 8, .batch_delay_max_ns = INT64_MAX});
        CHECK(life.try_push(never_ns));
        life.set_limits({.batch_size_max = 8});  // ends the window; nothing else comes
        while (life.ended() < life.pushed()) life.drain(-1);
        harness::step();
    }
    life.close_and_join();
}

TEST(every_request_ends_once_under_cancels_purges_changes_and_stops) {
    harness::for_each_seed(20, [](uint64_t seed) {
        Random random(seed);
        Life life(size_t{1} << random.below(7));
        life.set_limits(random_limits(random));
        for (size_t count = 1 + random.below(3); count > 0; --count) life.add_worker();
        for (int step = 0; step < 10'000; ++step) {
            const size_t dice = random.below(1000);
            if (dice < 600) {
                const int64_t deadline =
                    random.chance(80) ? never_ns : SteadyClock::now_ns() + random.between(-1000, 200'000);
                if (!life.try_push(deadline)) life.purge();
            } else if (dice < 800) {
                life.cancel(random.below(4 * life.capacity()));
            } else if (dice < 975) {
                life.drain(0);
            } else if (dice < 985) {
                life.purge();
            } else if (dice < 995) {
                life.set_limits(random_limits(random));
            } else if (life.workers() > 1 && random.chance(50)) {
                life.stop_worker();
            } else if (life.workers() < 4) {
                life.add_worker();
            }
        }
        life.close_and_join();
    });
}

TEST(a_purge_during_the_drain_sends_no_worker_home_early) {
    harness::for_each_seed(300, [](uint64_t seed) {
        Random random(seed);
        Life life(32);
        life.set_limits({.batch_size_max = 1});
        for (int i = 0; i < 32; ++i) CHECK(life.try_push(never_ns));
        for (int i = 0; i < 8; ++i) life.cancel(random.below(128));
        for (int i = 0; i < 2; ++i) life.add_worker();
        life.close_and_join();
    });
}

TEST_MAIN
