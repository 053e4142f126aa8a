// Schedule explorer: the ring and the batcher under thread interleavings chosen by a seed.
//
// Real threads pass a token; only its holder runs. At every probe point, and around every operation of the
// event count, the holder hands it on, either to any thread that can run (a random walk) or by random
// priorities with a few changes (probabilistic concurrency testing, Burckhardt et al., ASPLOS 2010). The
// event count is a model of Waiter that sleeps in the scheduler and the clock is virtual; so a lost wake-up
// is not a hang but a state in which nobody can run, and a busy loop is a schedule that does not end.
#include <algorithm>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "batcher.h"
#include "harness.h"
#include "parking.h"

using harness::Random;
using pyserve::Batcher;
using pyserve::BatchLimits;
using pyserve::never_ns;
using pyserve::Next;
using pyserve::Point;
using pyserve::Request;
using pyserve::State;
using pyserve::Take;

namespace {

class Scheduler {
  public:
    explicit Scheduler(uint64_t seed) : random_(seed), is_walk_(random_.chance(50)) {
        for (int i = 0; i < 4; ++i) changes_.push_back(random_.below(400));
    }
    ~Scheduler() { current() = nullptr; }

    // The scheduler of this schedule; one at a time.
    static Scheduler*& current() {
        static Scheduler* scheduler = nullptr;
        return scheduler;
    }

    // Runs all bodies to their end, one at a time.
    void run(const std::vector<std::function<void()>>& bodies) {
        current() = this;
        for (size_t i = 0; i < bodies.size(); ++i) {
            actors_.push_back(std::make_unique<Actor>());
            actors_[i]->priority = 1000 + static_cast<int64_t>(random_.below(1000));
        }
        std::vector<std::thread> threads;
        for (size_t i = 0; i < bodies.size(); ++i) {
            threads.emplace_back([this, i, &body = bodies[i]] {
                self_ = i;
                {
                    std::unique_lock lock(mutex_);
                    await_token(lock);
                }
                body();
                std::unique_lock lock(mutex_);
                actors_[i]->state = Actor::finished;
                hand_on();
            });
        }
        {
            const std::lock_guard lock(mutex_);
            hand_on();
        }
        for (std::thread& thread : threads) thread.join();
    }

    void yield() {
        std::unique_lock lock(mutex_);
        // The longest honest schedules have a few thousand steps.
        if (++steps_ > 100'000) {
            harness::fail(__FILE__, __LINE__, "a thread goes round and round without sleeping");
        }
        if (std::erase(changes_, steps_) > 0) actors_[self_]->priority = -static_cast<int64_t>(steps_);
        hand_on();
        await_token(lock);
    }

    // Until wake(event) or the deadline. The caller has seen that its key is current; nobody ran since.
    void sleep_on(const void* event, int64_t deadline) {
        std::unique_lock lock(mutex_);
        if (deadline <= HandClock::now_ns()) return;
        Actor& self = *actors_[self_];
        self.state = Actor::asleep;
        self.event = event;
        self.deadline = deadline;
        hand_on();
        await_token(lock);
    }

    void wake(const void* event) {
        const std::lock_guard lock(mutex_);
        for (const auto& actor : actors_) {
            if (actor->state == Actor::asleep && actor->event == event) actor->state = Actor::ready;
        }
    }

    // Until no other thread can run without a change of the clock.
    void await_quiet() {
        std::unique_lock lock(mutex_);
        actors_[self_]->state = Actor::awaiting_quiet;
        hand_on();
        await_token(lock);
    }

    void set_time(int64_t time) {
        const std::lock_guard lock(mutex_);
        HandClock::time = time;
        wake_the_late();
    }

    // When the first sleeper wakes by itself.
    int64_t first_deadline() {
        const std::lock_guard lock(mutex_);
        int64_t first = never_ns;
        for (const auto& actor : actors_) {
            if (actor->state == Actor::asleep) first = std::min(first, actor->deadline);
        }
        return first;
    }

  private:
    struct Actor {
        enum { ready, asleep, awaiting_quiet, finished } state = ready;
        int64_t priority = 0;
        const void* event = nullptr;
        int64_t deadline = never_ns;
        std::condition_variable has_token;
    };

    void await_token(std::unique_lock<std::mutex>& lock) {
        actors_[self_]->has_token.wait(lock, [this] { return holder_ == self_; });
    }

    void wake_the_late() {
        for (const auto& actor : actors_) {
            const bool is_late = actor->deadline <= HandClock::now_ns();
            if (actor->state == Actor::asleep && is_late) actor->state = Actor::ready;
        }
    }

    // Gives the token to the next thread. REQUIRES: mutex_ is held.
    void hand_on() {
        std::vector<size_t> ready;
        bool is_over = true;
        for (size_t i = 0; i < actors_.size(); ++i) {
            if (actors_[i]->state == Actor::ready) ready.push_back(i);
            is_over &= actors_[i]->state == Actor::finished;
        }
        if (is_over) return;
        if (ready.empty()) ready.push_back(first_awaiting_quiet());
        size_t next = ready[random_.below(ready.size())];
        if (!is_walk_) {
            next = *std::max_element(ready.begin(), ready.end(), [this](size_t left, size_t right) {
                return actors_[left]->priority < actors_[right]->priority;
            });
        }
        holder_ = next;
        actors_[next]->has_token.notify_one();
    }

    size_t first_awaiting_quiet() {
        for (size_t i = 0; i < actors_.size(); ++i) {
            if (actors_[i]->state != Actor::awaiting_quiet) continue;
            actors_[i]->state = Actor::ready;
            return i;
        }
        harness::fail(__FILE__, __LINE__, "all threads sleep and nobody is left to wake them");
    }

    std::mutex mutex_;
    Random random_;
    const bool is_walk_;
    std::vector<uint64_t> changes_;  // steps at which the running thread falls behind all others
    std::vector<std::unique_ptr<Actor>> actors_;
    size_t holder_ = SIZE_MAX;
    uint64_t steps_ = 0;
    static inline thread_local size_t self_ = 0;
};

struct YieldingProbe {
    static void at(Point) noexcept { Scheduler::current()->yield(); }
};

// Waiter's algorithm, asleep in the scheduler.
class ModelWaiter {
  public:
    uint32_t prepare() noexcept {
        Scheduler::current()->yield();
        ++sleepers_;
        Scheduler::current()->yield();
        return epoch_;
    }
    void cancel() noexcept { --sleepers_; }
    void wait(uint32_t key, int64_t deadline) noexcept {
        Scheduler::current()->yield();
        if (epoch_ == key) Scheduler::current()->sleep_on(this, deadline);
        cancel();
    }
    void notify() noexcept {
        Scheduler::current()->yield();
        if (sleepers_ == 0) return;
        ++epoch_;
        Scheduler::current()->yield();
        Scheduler::current()->wake(this);
    }

  private:
    uint32_t epoch_ = 0;
    uint32_t sleepers_ = 0;
};

// One loop thread with a random script, and workers.
class Exploration {
  public:
    explicit Exploration(uint64_t seed)
        : random_(seed * 31 + 7), scheduler_(seed), batcher_(size_t{1} << random_.below(4), UINT64_MAX - 3) {
        HandClock::time = 1'000;
    }

    void run() {
        const size_t workers = 1 + random_.below(3);
        stops_ = std::vector<std::atomic<bool>>(workers);
        std::vector<std::function<void()>> bodies = {[this] { play_loop(); }};
        for (size_t i = 0; i < workers; ++i) bodies.emplace_back([this, i] { serve(stops_[i]); });
        scheduler_.run(bodies);
        for (size_t i = 0; i < ended_.size(); ++i) CHECK_EQ(ended_[i], 1);
        CHECK_EQ(batcher_.queue_size(), size_t{0});
        CHECK_EQ(batcher_.running(), 0u);
    }

  private:
    void play_loop() {
        batcher_.set_limits(limits_);
        for (size_t step = 0; step < 14; ++step) {
            switch (random_.below(10)) {
                case 0:
                case 1:
                case 2:
                case 3: push(); break;
                case 4: cancel(); break;
                case 5: purge(); break;
                case 6: change_limits(); break;
                case 7: scheduler_.set_time(HandClock::now_ns() + random_.between(1, 60)); break;
                case 8: stop_worker(); break;
                default: check_quiet(); break;
            }
        }
        check_quiet();
        if (random_.chance(50)) {
            // Without a minimum nothing may stay behind, although no clock moves and nothing else happens.
            limits_ = {.batch_size_max = limits_.batch_size_max};
            batcher_.set_limits(limits_);
            check_quiet();
            CHECK_EQ(batcher_.queue_size(), size_t{0});
        }
        if (random_.chance(50)) push();
        batcher_.close();
        if (random_.chance(50)) purge();
        scheduler_.await_quiet();
    }

    void push() {
        Request& request = requests_.emplace_back();
        request.index = static_cast<uint32_t>(requests_.size() - 1);
        request.queued_at = HandClock::now_ns();
        request.deadline = random_.chance(30) ? HandClock::now_ns() + random_.between(0, 80) : never_ns;
        request.state = State::queued;
        ended_.push_back(0);
        if (batcher_.try_push(&request)) return;
        ended_.pop_back();
        requests_.pop_back();
    }

    void cancel() {
        if (!requests_.empty()) requests_[random_.below(requests_.size())].try_cancel();
    }

    void purge() {
        std::vector<Request*> dropped;
        batcher_.purge(dropped);
        for (const Request* request : dropped) {
            CHECK(request->state.load() == State::cancelled);
            CHECK_EQ(++ended_[request->index], 1);
        }
    }

    void change_limits() {
        limits_.batch_size_max = static_cast<uint32_t>(1 + random_.below(4));
        limits_.batch_size_min = static_cast<uint32_t>(1 + random_.below(4));
        limits_.batch_delay_max_ns = random_.between(0, 100);
        limits_.running_max = static_cast<uint32_t>(1 + random_.below(3));
        batcher_.set_limits(limits_);
    }

    // One worker stays.
    void stop_worker() {
        if (stopped_ + 1 >= stops_.size()) return;
        stops_[stopped_++] = true;
        batcher_.wake_all();
    }

    // Every worker sleeps. What is queued then must be inside a window, and somebody must wake when it ends.
    void check_quiet() {
        scheduler_.await_quiet();
        CHECK_EQ(batcher_.running(), 0u);
        const size_t waiting = batcher_.queue_size();
        CHECK(waiting <= batcher_.capacity());
        if (waiting == 0) return;
        const size_t size_max = std::min<size_t>(limits_.batch_size_max, batcher_.capacity());
        CHECK(waiting < std::min<size_t>(limits_.batch_size_min, size_max));
        int64_t ends_at = never_ns;
        for (const Request& request : requests_) {
            if (ended_[request.index] != 0) continue;
            ends_at =
                std::min({ends_at, request.deadline.load(), request.queued_at.load() + limits_.batch_delay_max_ns});
        }
        CHECK(HandClock::now_ns() < ends_at);
        CHECK(scheduler_.first_deadline() <= ends_at);
    }

    void serve(const std::atomic<bool>& stop) {
        Take take;
        uint32_t newest = 0;  // plus one
        for (;;) {
            const int64_t before = HandClock::now_ns();
            if (batcher_.next_batch(take, stop) != Next::batch) return;
            CHECK(!take.empty());
            for (Request* request : take.requests) {
                CHECK(request->index >= newest);
                newest = request->index + 1;
                CHECK(request->deadline.load() > before);
                if (!request->try_move(State::batched, State::done)) {
                    CHECK(request->state.load() == State::cancelled);
                }
                CHECK_EQ(++ended_[request->index], 1);
            }
            for (const Request* request : take.dropped) CHECK_EQ(++ended_[request->index], 1);
            Scheduler::current()->yield();
            batcher_.leave();
        }
    }

    Random random_;
    Scheduler scheduler_;
    Batcher<HandClock, YieldingProbe, ModelWaiter> batcher_;
    BatchLimits limits_;
    std::vector<std::atomic<bool>> stops_;
    size_t stopped_ = 0;
    std::deque<Request> requests_;
    std::vector<int> ended_;
};

}  // namespace

TEST(every_schedule_keeps_every_promise) {
    harness::for_each_seed(4000, [](uint64_t seed) { Exploration(seed).run(); });
}

TEST_MAIN
