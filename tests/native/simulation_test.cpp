// Simulation: the real ring, batcher and completions under a random but replayable life, with a virtual
// clock.
//
// One thread plays the loop and all workers. A plain deque mirrors the queue; every take is judged against
// it. Invariants: each accepted request ends exactly once and through the completions; none is taken after
// its deadline; first in, first out; limits hold; an idle worker never leaves a ripe batch behind an open
// gate; the counters add up; closing ends it all.
#include <deque>
#include <memory>
#include <vector>

#include "batcher.h"
#include "completion.h"
#include "harness.h"
#include "parking.h"

using harness::Random;
using pyserve::Batcher;
using pyserve::BatchLimits;
using pyserve::CompletionNode;
using pyserve::Completions;
using pyserve::never_ns;
using pyserve::Next;
using pyserve::Request;
using pyserve::State;
using pyserve::Take;

namespace {

struct Finished : CompletionNode {
    std::vector<Request*> requests;
};

struct SimWorker {
    Take take;
    bool is_busy = false;
    bool is_stopping = false;
    bool is_over = false;
};

// One eventfd for all seeds.
Completions<>& completions() {
    static Completions<> shared;
    return shared;
}

class Simulation {
  public:
    explicit Simulation(uint64_t seed)
        : random_(seed), capacity_(size_t{1} << random_.below(6)),
          batcher_(capacity_, random_.chance(50) ? UINT64_MAX - random_.below(20) : random_.next()) {
        HandClock::time = 1'000;
        change_limits();
        for (size_t count = 1 + random_.below(4); count > 0; --count) workers_.emplace_back();
    }

    void run() {
        const size_t steps = 40 + random_.below(120);
        for (size_t i = 0; i < steps; ++i) {
            step();
            settle();
        }
        close();
        check_the_end();
    }

  private:
    void step() {
        switch (random_.below(16)) {
            case 0:
            case 1:
            case 2:
            case 3:
            case 4: return push();
            case 5:
            case 6: return cancel();
            case 7:
            case 8:
            case 9: return finish();
            case 10:
            case 11: HandClock::time += random_.between(0, 60); return;
            case 12: return change_limits();
            case 13: return random_.chance(50) ? add_worker() : stop_worker();
            case 14: return purge();
            default: return drain();
        }
    }

    void push() {
        for (size_t count = 1 + random_.below(2 * capacity_); count > 0; --count) {
            auto owned = std::make_unique<Request>();
            Request* request = owned.get();
            request->index = static_cast<uint32_t>(requests_.size());
            request->queued_at = HandClock::now_ns();
            const int64_t soon = HandClock::now_ns() + random_.between(-5, 150);
            request->deadline = random_.chance(40) ? soon : never_ns;
            request->input_size = random_.between(0, 12);
            request->state = State::queued;
            const bool accepted = batcher_.try_push(request);
            CHECK_EQ(accepted, queue_.size() < capacity_);
            if (!accepted) return;
            queue_.push_back(request);
            requests_.push_back(std::move(owned));
            ended_.push_back(0);
        }
        CHECK(batcher_.queue_size() <= capacity_);
    }

    void cancel() {
        if (requests_.empty()) return;
        // Mostly one that may still be queued.
        const size_t recent = std::min<size_t>(requests_.size(), 2 * capacity_);
        Request& request = *requests_[requests_.size() - 1 - random_.below(recent)];
        const State before = request.state.load();
        const bool was_live = before == State::queued || before == State::batched || before == State::running;
        CHECK_EQ(request.try_cancel(), was_live);
        if (was_live) CHECK(request.state.load() == State::cancelled);
    }

    void finish() {
        SimWorker& worker = workers_[random_.below(workers_.size())];
        if (worker.is_busy) finish(worker);
    }

    void finish(SimWorker& worker) {
        auto done = std::make_unique<Finished>();
        for (Request* request : worker.take.requests) {
            if (request->try_move(State::batched, State::running)) {
                request->try_move(State::running, State::done);
            }
            done->requests.push_back(request);
        }
        for (Request* request : worker.take.dropped) done->requests.push_back(request);
        completions().push(done.release());
        worker.take.clear();
        worker.is_busy = false;
        --running_;
        batcher_.leave();
        CHECK_EQ(batcher_.running(), running_);
    }

    void change_limits() {
        limits_.batch_size_max = static_cast<uint32_t>(random_.below(10));
        limits_.batch_size_min = random_.chance(50) ? 1 : static_cast<uint32_t>(random_.below(10));
        limits_.batch_delay_max_ns = random_.chance(5) ? INT64_MAX : random_.between(0, 100);
        limits_.batch_bytes_max = random_.chance(50) ? INT64_MAX : random_.between(0, 40);
        limits_.running_max = random_.chance(50) ? UINT32_MAX : static_cast<uint32_t>(random_.below(4));
        batcher_.set_limits(limits_);
    }

    void add_worker() {
        if (workers_.size() < 8) workers_.emplace_back();
    }

    void stop_worker() { workers_[random_.below(workers_.size())].is_stopping = true; }

    void purge() {
        std::vector<Request*> dropped;
        batcher_.purge(dropped);
        auto done = std::make_unique<Finished>();
        for (Request* request : dropped) {
            CHECK(request->state.load() == State::cancelled);
            done->requests.push_back(request);
        }
        std::erase_if(queue_, [](const Request* request) { return request->state.load() == State::cancelled; });
        completions().push(done.release());
        CHECK_EQ(batcher_.queue_size(), queue_.size());
    }

    void drain() {
        CompletionNode* node = completions().drain();
        while (node != nullptr) {
            const std::unique_ptr<Finished> done(static_cast<Finished*>(node));
            node = node->next;
            for (const Request* request : done->requests) {
                CHECK_EQ(++ended_[request->index], 1);
                const State state = request->state.load();
                CHECK(state == State::done || state == State::cancelled || state == State::expired);
            }
        }
    }

    // Every idle worker looks, as it would after a wake-up, until none finds anything.
    void settle() {
        for (bool moved = true; moved;) {
            moved = false;
            for (SimWorker& worker : workers_) {
                if (worker.is_busy || worker.is_over) continue;
                if (worker.is_stopping)
                    worker.is_over = true;
                else
                    moved |= look(worker);
            }
        }
    }

    size_t size_max() const { return std::min<size_t>(std::max(1u, limits_.batch_size_max), capacity_); }
    size_t size_min() const { return std::min<size_t>(std::max(1u, limits_.batch_size_min), size_max()); }
    bool gate_is_open() const { return running_ < std::max(1u, limits_.running_max); }

    bool look(SimWorker& worker) { return (random_.chance(10) && look(worker, true)) || look(worker, false); }

    bool look(SimWorker& worker, bool full_only) {
        int64_t wake_at = 0;
        const bool has_full = queue_.size() >= size_max();
        const Next next = batcher_.try_next(worker.take, wake_at, full_only);
        CHECK_EQ(next == Next::closed, is_closed_ && queue_.empty());
        if (next == Next::batch) {
            CHECK(gate_is_open());
            CHECK(!full_only || has_full);
            ++running_;
            worker.is_busy = true;
            judge(worker.take);
            return true;
        }
        CHECK_EQ(batcher_.running(), running_);
        CHECK(worker.take.empty());
        if (next == Next::closed)
            worker.is_over = true;
        else if (full_only)
            CHECK(!has_full || !gate_is_open());
        else
            judge_idleness(wake_at);
        return false;
    }

    // What was taken is exactly the front of the queue, in order, within the limits, and sorted rightly.
    void judge(const Take& take) {
        CHECK(!take.empty());
        CHECK(take.requests.size() <= size_max());
        int64_t bytes = 0;
        size_t live = 0, dead = 0;
        while (live + dead < take.requests.size() + take.dropped.size()) {
            CHECK(!queue_.empty());
            Request* request = queue_.front();
            queue_.pop_front();
            const bool is_late = request->deadline.load() <= HandClock::now_ns();
            if (live < take.requests.size() && take.requests[live] == request) {
                ++live;
                bytes += request->input_size.load();
                CHECK(!is_late);
                CHECK(request->state.load() == State::batched);
            } else {
                CHECK(dead < take.dropped.size());
                CHECK(take.dropped[dead++] == request);
                const State state = request->state.load();
                CHECK(state == State::cancelled || (state == State::expired && is_late));
            }
        }
        CHECK(live <= 1 || bytes <= limits_.batch_bytes_max);
        CHECK_EQ(batcher_.queue_size(), queue_.size());
    }

    // Nothing was taken although a worker is idle: there must be a reason.
    void judge_idleness(int64_t wake_at) {
        if (queue_.empty() || !gate_is_open()) return CHECK_EQ(wake_at, never_ns);
        CHECK(!is_closed_);
        CHECK(queue_.size() < size_min());
        const int64_t delay = std::min(limits_.batch_delay_max_ns, INT64_MAX / 2);
        int64_t ends_at = queue_.front()->queued_at.load() + delay;
        for (const Request* request : queue_) ends_at = std::min(ends_at, request->deadline.load());
        CHECK(HandClock::now_ns() < ends_at);
        CHECK_EQ(wake_at, ends_at);
    }

    // After the close only workers act, and the loop that purges and drains.
    void close() {
        batcher_.close();
        is_closed_ = true;
        workers_.emplace_back();  // the others may all have been stopped
        for (bool busy = true; busy;) {
            settle();
            if (random_.chance(30)) purge();
            if (random_.chance(30)) cancel();
            busy = false;
            for (SimWorker& worker : workers_) {
                if (!worker.is_busy) continue;
                finish(worker);
                busy = true;
            }
        }
        settle();
        drain();
    }

    void check_the_end() {
        CHECK(queue_.empty());
        CHECK_EQ(batcher_.queue_size(), size_t{0});
        CHECK_EQ(batcher_.running(), 0u);
        for (const SimWorker& worker : workers_) CHECK(worker.is_over && !worker.is_busy);
        for (const int times : ended_) CHECK_EQ(times, 1);
        CHECK_EQ(ended_.size(), requests_.size());
    }

    Random random_;
    const size_t capacity_;
    Batcher<HandClock> batcher_;
    BatchLimits limits_;
    bool is_closed_ = false;
    uint32_t running_ = 0;
    std::vector<SimWorker> workers_;
    std::vector<std::unique_ptr<Request>> requests_;
    std::vector<int> ended_;      // how often each request came through the completions
    std::deque<Request*> queue_;  // what the ring must hold
};

}  // namespace

TEST(a_random_life_keeps_every_promise) {
    harness::for_each_seed(20'000, [](uint64_t seed) { Simulation(seed).run(); });
}

TEST_MAIN
