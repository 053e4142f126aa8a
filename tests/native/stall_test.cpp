// A thread stalled anywhere harms no other: every point, several visits, ring, batcher and completions.
//
// The control is a ring with a sequence number per slot. It passes every other test, and a consumer stalled
// between its claim and its release stops the producer one lap later; the sweep must find that.
#include <poll.h>

#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "batcher.h"
#include "completion.h"
#include "harness.h"
#include "parking.h"
#include "ring.h"
#include "sequenced_ring.h"

using pyserve::Batcher;
using pyserve::BatchLimits;
using pyserve::CompletionNode;
using pyserve::Completions;
using pyserve::Next;
using pyserve::Point;
using pyserve::Request;
using pyserve::Ring;
using pyserve::State;
using pyserve::SteadyClock;
using pyserve::Take;

namespace {

using ParkingRing = Ring<uint64_t, Parking>;

constexpr int laps = 8;
constexpr int visits_max = 6;

// Whether, with one consumer parked there, `laps` times the capacity still passes through. No clock involved:
// this thread is the producer and the other consumer, and what it attempts must succeed.
template <class TestedRing>
bool survives_a_stalled_consumer(Point point, int visit, size_t capacity) {
    TestedRing ring(capacity);
    Parking::arm(point, visit);
    std::atomic<bool> over{false};
    std::vector<uint64_t> by_victim, by_others;
    std::thread victim([&] {
        Parking::become_victim();
        uint64_t out[2];
        while (!over) {
            const size_t got = ring.try_claim(out, 2);
            by_victim.insert(by_victim.end(), out, out + got);
            if (got == 0) std::this_thread::yield();
        }
    });
    uint64_t next = 0;
    while (!Parking::is_parked()) {
        if (ring.try_push(next))
            ++next;
        else
            std::this_thread::yield();
    }
    uint64_t out = 0;
    while (ring.try_claim(&out, 1) == 1) by_others.push_back(out);
    bool passed = true;
    for (size_t i = 0; i < laps * capacity && passed; ++i) {
        passed = ring.try_push(next);
        if (!passed) break;
        passed = ring.try_claim(&out, 1) == 1 && out == next++;
        if (passed) by_others.push_back(out);
    }
    over = true;
    Parking::release();
    victim.join();
    if (!passed) return false;
    // Released, it has what it had claimed, and nothing else.
    std::vector<int> times(next, 0);
    for (const uint64_t entry : by_victim) ++times[entry];
    for (const uint64_t entry : by_others) ++times[entry];
    for (const int count : times) CHECK_EQ(count, 1);
    return true;
}

struct Finished : CompletionNode {
    std::vector<Request*> requests;
};

// The whole path with real threads: this thread is the loop.
class Path {
  public:
    Path(size_t capacity, const BatchLimits& limits) : batcher_(capacity) { batcher_.set_limits(limits); }

    void add_worker(bool is_victim) {
        workers_.emplace_back([this, is_victim] {
            if (is_victim) Parking::become_victim();
            Take take;
            while (batcher_.next_batch(take, stop_) == Next::batch) {
                auto done = std::make_unique<Finished>();
                for (Request* request : take.requests) {
                    CHECK(request->try_move(State::batched, State::done));
                    done->requests.push_back(request);
                }
                CHECK(take.dropped.empty());
                completions_.push(done.release());
                batcher_.leave();
            }
        });
    }

    bool try_push() {
        Request& request = requests_.emplace_back();
        request.index = static_cast<uint32_t>(requests_.size() - 1);
        request.queued_at = SteadyClock::now_ns();
        request.state = State::queued;
        if (batcher_.try_push(&request)) {
            ended_.push_back(0);
            return true;
        }
        requests_.pop_back();
        return false;
    }

    // Sleeps until a completion is signalled, or a moment has passed, and takes what is there.
    void drain(int timeout_ms) {
        pollfd entry{completions_.fd(), POLLIN, 0};
        if (poll(&entry, 1, timeout_ms) == 0) return;
        CompletionNode* node = completions_.drain();
        while (node != nullptr) {
            const std::unique_ptr<Finished> done(static_cast<Finished*>(node));
            node = node->next;
            for (const Request* request : done->requests) CHECK_EQ(++ended_[request->index], 1);
            ended_count_ += done->requests.size();
        }
    }

    size_t pushed() const { return requests_.size(); }
    size_t ended_count() const { return ended_count_; }
    bool all_ended_from(size_t first) const {
        for (size_t i = first; i < ended_.size(); ++i) {
            if (ended_[i] == 0) return false;
        }
        return true;
    }

    void close_and_join() {
        batcher_.close();
        for (std::thread& worker : workers_) worker.join();
        drain(0);
        CHECK(all_ended_from(0));
        CHECK_EQ(batcher_.queue_size(), size_t{0});
        CHECK_EQ(batcher_.running(), 0u);
    }

  private:
    Batcher<SteadyClock, Parking> batcher_;
    Completions<Parking> completions_;
    std::atomic<bool> stop_{false};
    std::deque<Request> requests_;
    std::vector<int> ended_;
    size_t ended_count_ = 0;
    std::vector<std::thread> workers_;
};

void stall_one_worker(Point point, int visit, size_t capacity, const BatchLimits& limits) {
    Path path(capacity, limits);
    Parking::arm(point, visit);
    path.add_worker(true);
    // Alone, the victim comes by every point: it runs dry, sleeps, is woken, claims and completes.
    while (!Parking::is_parked()) {
        if (path.ended_count() == path.pushed()) path.try_push();
        path.drain(0);
        std::this_thread::yield();
    }
    path.add_worker(false);
    path.add_worker(false);
    // All of these must complete without the victim: they were pushed after it had stopped.
    const size_t first = path.pushed();
    while (path.pushed() < first + laps * capacity) {
        if (!path.try_push()) path.drain(-1);
    }
    while (!path.all_ended_from(first)) path.drain(-1);
    Parking::release();
    path.close_and_join();
}

}  // namespace

TEST(a_consumer_stalled_in_the_ring_stops_nobody) {
    for (const size_t capacity : {size_t{1}, size_t{2}, size_t{4}, size_t{128}}) {
        for (int visit = 1; visit <= visits_max; ++visit) {
            for (const Point point : {Point::ring_before_claim, Point::ring_after_claim}) {
                CHECK(survives_a_stalled_consumer<ParkingRing>(point, visit, capacity));
            }
        }
    }
}

TEST(the_control_with_sequence_numbers_is_stopped) {
    for (const size_t capacity : {size_t{2}, size_t{4}, size_t{128}}) {
        for (int visit = 1; visit <= visits_max; ++visit) {
            CHECK(survives_a_stalled_consumer<SequencedRing>(Point::ring_before_claim, visit, capacity));
            CHECK(!survives_a_stalled_consumer<SequencedRing>(Point::ring_after_claim, visit, capacity));
        }
    }
}

TEST(a_stalled_producer_stops_no_consumer) {
    for (int visit = 1; visit <= visits_max; ++visit) {
        ParkingRing ring(8);
        Parking::arm(Point::ring_before_publish, visit);
        std::thread victim([&] {
            Parking::become_victim();
            for (int i = 0; i < visits_max; ++i) CHECK(ring.try_push(static_cast<uint64_t>(i)));
        });
        while (!Parking::is_parked()) std::this_thread::yield();
        // All that was published can be had, by anyone; the unpublished one cannot.
        uint64_t out = 0, got = 0;
        while (ring.try_claim(&out, 1) == 1) CHECK_EQ(out, got++);
        CHECK_EQ(got, static_cast<uint64_t>(visit - 1));
        Parking::release();
        victim.join();
        while (ring.try_claim(&out, 1) == 1) CHECK_EQ(out, got++);
        CHECK_EQ(got, uint64_t{visits_max});
    }
}

TEST(a_worker_stalled_anywhere_stops_no_other_worker_and_hides_no_completion) {
    const std::vector<Point> points = {Point::ring_before_claim,      Point::ring_after_claim,
                                       Point::batcher_before_sleep,   Point::batcher_after_wake,
                                       Point::batcher_holding_permit, Point::completions_before_push,
                                       Point::completions_after_push};
    for (const Point point : points) {
        for (int visit = 1; visit <= visits_max; ++visit) {
            for (const size_t capacity : {size_t{1}, size_t{4}, size_t{128}}) {
                stall_one_worker(point, visit, capacity, {.batch_size_max = 3});
                // A permit in the hands of the stalled one is a batch that runs; one is left for the others.
                stall_one_worker(point, visit, capacity, {.batch_size_max = 3, .running_max = 2});
                stall_one_worker(point, visit, capacity,
                                 {.batch_size_max = 4, .batch_size_min = 2, .batch_delay_max_ns = 20'000});
            }
        }
    }
}

TEST_MAIN
