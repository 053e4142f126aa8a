// A worker that does not come back is given up: nothing waits for it, nothing is taken from it, and whenever it comes
// back, also at that very moment, its batch is completed once, its permit given back once, and nothing is left of it.
#include "crew.h"

#include <poll.h>

#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "batcher.h"
#include "completion.h"
#include "harness.h"
#include "parking.h"
#include "runs.h"

using pyserve::Batcher;
using pyserve::BatchLimits;
using pyserve::CompletionNode;
using pyserve::Completions;
using pyserve::Crew;
using pyserve::LostCount;
using pyserve::Next;
using pyserve::Point;
using pyserve::Request;
using pyserve::Runs;
using pyserve::State;
using pyserve::SteadyClock;
using pyserve::Take;
using pyserve::WorkerState;

namespace {

struct Finished : CompletionNode {
    std::vector<Request*> requests;
};

// What a thread that was given up keeps alive.
struct Shared {
    explicit Shared(size_t capacity) : batcher(capacity) {}

    Batcher<SteadyClock, Parking> batcher;
    Completions<Parking> completions;
    std::atomic<uint32_t> stuck_for{0};  // the id of the worker whose next batch does not come to an end; 0 for none
    std::atomic<bool> is_stuck{false};
    std::atomic<bool> may_end{false};
    std::atomic<int> alive{0};
};

class Worker {
  public:
    Worker(std::shared_ptr<Shared> shared, uint32_t id, bool is_victim)
        : shared_(std::move(shared)), id_(id), is_victim_(is_victim) {
        ++shared_->alive;
    }
    ~Worker() { --shared_->alive; }

    void run() {
        if (is_victim_) Parking::become_victim();
        state_ = WorkerState::ready;
        Take take;
        while (shared_->batcher.next_batch(take, stop_) == Next::batch) {
            for (Request* request : take.requests) {
                if (!request->try_move(State::batched, State::running)) take.dropped.push_back(request);
            }
            if (shared_->stuck_for == id_) {
                shared_->is_stuck = true;
                shared_->is_stuck.notify_all();
                shared_->may_end.wait(false);
            }
            auto done = std::make_unique<Finished>();
            for (Request* request : take.requests) request->try_move(State::running, State::done);
            done->requests = take.requests;
            shared_->completions.push(done.release());
            shared_->batcher.leave();
        }
        state_ = WorkerState::stopped;
    }
    void stop() { stop_ = true; }
    bool is_stopping() const { return stop_; }
    WorkerState state() const { return state_; }
    uint32_t id() const { return id_; }

  private:
    const std::shared_ptr<Shared> shared_;
    const uint32_t id_;
    const bool is_victim_;
    std::atomic<bool> stop_{false};
    std::atomic<WorkerState> state_{WorkerState::starting};
};

// This thread is the loop.
class Stand {
  public:
    explicit Stand(uint32_t running_max)
        : shared_(std::make_shared<Shared>(64)), crew_(lost_), running_max_(running_max) {
        lend();
    }
    ~Stand() { join(); }

    void add_worker(bool is_victim = false) { crew_.add(std::make_shared<Worker>(shared_, ++last_id_, is_victim)); }

    size_t push() {
        Request& request = requests_.emplace_back();
        request.index = static_cast<uint32_t>(requests_.size() - 1);
        request.queued_at = SteadyClock::now_ns();
        request.state = State::queued;
        ended_.push_back(0);
        CHECK(shared_->batcher.try_push(&request));
        return request.index;
    }
    bool cancel(size_t index) { return requests_[index].try_cancel(); }

    void drain(int timeout_ms) {
        pollfd entry{shared_->completions.fd(), POLLIN, 0};
        if (poll(&entry, 1, timeout_ms) == 0) return;
        CompletionNode* node = shared_->completions.drain();
        while (node != nullptr) {
            const std::unique_ptr<Finished> done(static_cast<Finished*>(node));
            node = node->next;
            for (const Request* request : done->requests) {
                CHECK_EQ(++ended_[request->index], 1);
                if (request->state == State::done) ++answered_;
            }
        }
    }
    void drain_until_ended(size_t index) {
        while (ended_[index] == 0) drain(-1);
    }

    bool lose(uint32_t id) {
        if (!crew_.lose(id)) return false;
        lend();
        shared_->batcher.wake_all();
        return true;
    }
    void reap() {
        crew_.reap();
        lend();
    }
    void lend() {
        shared_->batcher.set_limits(
            {.batch_size_max = 1, .running_max = running_max_ + static_cast<uint32_t>(crew_.lost())});
    }
    void join() {
        crew_.stop();
        shared_->batcher.wake_all();
        crew_.join();
        drain(0);
    }

    // Waits, as the test's watchdog lets it.
    template <class Is>
    static void until(const Is& is) {
        while (!is()) std::this_thread::yield();
    }

    std::shared_ptr<Shared> shared_;
    LostCount lost_ = std::make_shared<std::atomic<int>>(0);
    Crew<Worker, Parking> crew_;
    const uint32_t running_max_;
    uint32_t last_id_ = 0;
    std::deque<Request> requests_;
    std::vector<int> ended_;
    size_t answered_ = 0;
};

// A worker in a batch that does not come to an end, alone and with the only permit.
size_t get_stuck(Stand& stand) {
    stand.shared_->stuck_for = 1;
    stand.add_worker();
    const size_t first = stand.push();
    stand.shared_->is_stuck.wait(false);
    return first;
}

}  // namespace

TEST(a_lost_worker_is_replaced_within_the_permits_and_comes_back_without_a_trace) {
    Stand stand(1);
    const size_t stuck = get_stuck(stand);
    CHECK(stand.cancel(stuck));  // its client was answered
    CHECK(stand.lose(1));
    CHECK(!stand.lose(1));
    CHECK_EQ(stand.crew_.lost(), size_t{1});
    CHECK_EQ(stand.lost_->load(), 1);
    CHECK_EQ(stand.crew_.shrink(1), size_t{1});  // it counts no more
    stand.add_worker();
    for (int i = 0; i < 100; ++i) stand.drain_until_ended(stand.push());
    Stand::until([&] { return stand.shared_->batcher.running() == 1; });  // the lost one keeps its permit
    CHECK_EQ(stand.ended_[stuck], 0);
    stand.shared_->may_end = true;
    stand.shared_->may_end.notify_all();
    stand.drain_until_ended(stuck);
    Stand::until([&] { return stand.lost_->load() == 0; });
    stand.reap();
    CHECK_EQ(stand.crew_.lost(), size_t{0});
    CHECK_EQ(stand.answered_, size_t{100});  // its late answer is nobody's
    Stand::until([&] { return stand.shared_->alive == 1; });
    stand.drain_until_ended(stand.push());
    Stand::until([&] { return stand.shared_->batcher.running() == 0; });
}

TEST(a_crew_that_ends_does_not_wait_for_a_lost_worker_and_what_that_needs_lives_on) {
    std::weak_ptr<Shared> shared;
    LostCount lost;
    std::deque<Request> requests;
    {
        Stand stand(1);
        shared = stand.shared_;
        lost = stand.lost_;
        CHECK(stand.cancel(get_stuck(stand)));
        CHECK(stand.lose(1));
        stand.join();
        requests.swap(stand.requests_);  // a request is not freed before it has come back
    }
    CHECK_EQ(lost->load(), 1);
    {
        const auto kept = shared.lock();
        CHECK(kept != nullptr);
        kept->may_end = true;
        kept->may_end.notify_all();
        Stand::until([&] { return kept->alive == 0; });
        CompletionNode* node = kept->completions.drain();
        CHECK(node != nullptr && node->next == nullptr);
        const std::unique_ptr<Finished> done(static_cast<Finished*>(node));
        CHECK_EQ(done->requests.size(), size_t{1});
        CHECK_EQ(kept->batcher.running(), 0u);
    }
    Stand::until([&] { return lost->load() == 0; });
    CHECK(shared.expired());
}

TEST(a_worker_that_ends_at_the_very_moment_of_its_loss_is_counted_once) {
    // The victim is parked where it is about to say that its thread ends: it is lost before it says so.
    Stand stand(1);
    Parking::arm(Point::crew_before_end, 1);
    stand.add_worker(/*is_victim=*/true);
    stand.drain_until_ended(stand.push());
    stand.crew_.shrink(0);
    stand.shared_->batcher.wake_all();
    Stand::until([] { return Parking::is_parked(); });
    CHECK(stand.lose(1));
    CHECK_EQ(stand.lost_->load(), 1);
    Parking::release();
    Stand::until([&] { return stand.lost_->load() == 0; });
    CHECK(!stand.lose(1));
    stand.reap();
    stand.crew_.for_each([](const Worker&, bool) { harness::fail(__FILE__, __LINE__, "it was not reaped"); });
}

TEST(losing_races_with_the_end_of_a_batch_in_every_order) {
    harness::for_each_seed(300, [](uint64_t seed) {
        harness::Random random(seed);
        Stand stand(2);
        stand.shared_->stuck_for = 1;
        stand.add_worker();
        stand.add_worker();
        for (int i = 0; i < 8; ++i) stand.push();
        while (!stand.shared_->is_stuck) {  // the other one may be quicker
            stand.drain(0);
            if (stand.shared_->batcher.queue_size() == 0) stand.push();
            std::this_thread::yield();
        }
        std::thread ending([&, spins = random.below(2000)] {
            for (size_t i = 0; i < spins; ++i) std::atomic_signal_fence(std::memory_order_seq_cst);
            stand.shared_->may_end = true;
            stand.shared_->may_end.notify_all();
        });
        for (size_t i = 0, spins = random.below(2000); i < spins; ++i) {
            std::atomic_signal_fence(std::memory_order_seq_cst);
        }
        if (stand.lose(1)) stand.add_worker();
        ending.join();
        for (int i = 0; i < 8; ++i) stand.drain_until_ended(stand.push());
        for (size_t i = 0; i < stand.ended_.size(); ++i) stand.drain_until_ended(i);
        CHECK_EQ(stand.answered_, stand.ended_.size());
        Stand::until([&] { return stand.shared_->batcher.running() == 0; });
        Stand::until([&] { return stand.lost_->load() == 0; });
        stand.reap();
        CHECK_EQ(stand.crew_.lost(), size_t{0});
    });
}

namespace {

thread_local std::atomic<bool> raises{false};  // what stands for torch's dispatch key

void begin_to_raise() noexcept { raises.store(true, std::memory_order_relaxed); }
void cease_to_raise() noexcept { raises.store(false, std::memory_order_relaxed); }

}  // namespace

TEST(an_interruption_ends_the_run_it_is_meant_for_and_no_other) {
    Runs::install(SIGRTMIN + 8, {begin_to_raise, cease_to_raise});
    Runs runs;
    std::atomic<bool> over{false}, is_endless{false};
    std::atomic<int64_t> ended_by_force{0};
    std::thread thread([&] {
        runs.bind();
        for (int64_t number = 1; !over; ++number) {
            runs.begin(number);
            CHECK(!raises || runs.is_interrupted());  // not of a run before it
            while (is_endless && !raises) {
            }
            if (runs.is_interrupted()) ended_by_force = number;
            runs.end();
            CHECK(!raises && !runs.is_interrupted());
        }
        runs.unbind();
    });
    Stand::until([&] { return runs.since() != 0; });
    int64_t hits = 0;
    for (int64_t i = 0; i < harness::scaled(20'000) || hits == 0; ++i) {  // whether one is met is chance
        if (runs.interrupt(runs.since())) ++hits;  // whatever it meets: most often a run that is about to end
        CHECK(!runs.interrupt(0));
    }
    is_endless = true;
    int64_t stuck = 0;
    while (stuck == 0) stuck = runs.since();
    while (ended_by_force < stuck) {
        runs.interrupt(runs.since());
        std::this_thread::yield();
    }
    over = true;
    is_endless = false;
    thread.join();
    CHECK_EQ(runs.thread(), 0);
    CHECK(!runs.interrupt(stuck));
}

TEST_MAIN
