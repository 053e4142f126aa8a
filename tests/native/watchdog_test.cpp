// The watchdog of these tests: it reports what has stalled, and nothing that is only slow. No time decides here.
#include "watchdog.h"

#include <future>
#include <string>
#include <string_view>
#include <thread>

#include "harness.h"
#include "parking.h"
#include "ring.h"
#include "sequenced_ring.h"

using harness::StallLimits;
using harness::StallRule;
using harness::Watchdog;
using pyserve::Point;
using pyserve::Ring;

namespace {

constexpr int64_t work = 1'000'000;
// Looks that follow one another at once, so that many are soon taken.
constexpr StallLimits hasty = {
    .look_interval = std::chrono::microseconds(200), .asleep_looks_max = 20, .work_max_ns = INT64_MAX};

bool says(const char* problem, const char* part) {
    return problem != nullptr && std::string_view(problem).find(part) != std::string_view::npos;
}

}  // namespace

TEST(sleep_without_a_step_is_a_stall_after_so_many_looks_and_not_before) {
    StallRule rule({.asleep_looks_max = 3, .work_max_ns = work});
    CHECK(rule.look(7, true, 0) == nullptr);
    CHECK(rule.look(7, true, 0) == nullptr);
    CHECK(rule.look(7, true, 0) == nullptr);
    CHECK(says(rule.look(7, true, 0), "sleep"));
}

TEST(a_step_or_a_thread_that_could_run_begins_the_count_anew) {
    StallRule rule({.asleep_looks_max = 3, .work_max_ns = work});
    uint64_t steps = 0;
    for (int round = 0; round < 100; ++round) {
        CHECK(rule.look(++steps, true, 0) == nullptr);  // a step, slow as it may be
        CHECK(rule.look(steps, true, 0) == nullptr);
        CHECK(rule.look(steps, true, 0) == nullptr);
    }
    for (int round = 0; round < 100; ++round) {  // no step at all: something else has the processor
        CHECK(rule.look(steps, false, 0) == nullptr);
        CHECK(rule.look(steps, true, 0) == nullptr);
        CHECK(rule.look(steps, true, 0) == nullptr);
    }
}

TEST(work_without_a_step_is_a_stall_and_work_with_steps_is_none) {
    StallRule rule({.asleep_looks_max = 3, .work_max_ns = work});
    int64_t worked = 0;
    for (uint64_t step = 0; step < 100; ++step) CHECK(rule.look(step, false, worked += work) == nullptr);
    CHECK(rule.look(99, false, worked + work) == nullptr);
    CHECK(says(rule.look(99, false, worked + work + 1), "round and round"));
}

TEST(a_wait_that_nobody_ends_is_reported) {
    std::promise<std::string> reported;
    const Watchdog watchdog([&](const char* problem) { reported.set_value(problem); }, hasty);
    CHECK(says(reported.get_future().get().c_str(), "sleep"));  // it is this wait that is reported
}

TEST(a_thread_that_could_run_is_not_reported_however_long_it_takes) {
    std::atomic<bool> is_reported{false};
    const Watchdog watchdog([&](const char*) { is_reported = true; }, hasty);
    // No step, and no sleep either: what a thread looks like that is given no processor.
    while (watchdog.looks() < 10 * hasty.asleep_looks_max) std::this_thread::yield();
    CHECK(!is_reported);
}

TEST(a_loop_without_end_is_reported) {
    StallLimits limits = hasty;
    limits.work_max_ns = work;
    std::atomic<bool> is_reported{false};
    const Watchdog watchdog([&](const char* problem) { is_reported = says(problem, "round and round"); }, limits);
    while (!is_reported) std::this_thread::yield();
}

// The ring with sequence numbers stops its producer behind a consumer that stands still; ours does not.
TEST(a_producer_that_a_stalled_consumer_stops_is_reported) {
    StallLimits limits = hasty;
    limits.work_max_ns = work;
    SequencedRing ring(4);
    CHECK(ring.try_push(0));
    Parking::arm(Point::ring_after_claim, 1);
    std::thread victim([&] {
        Parking::become_victim();
        uint64_t out = 0;
        CHECK_EQ(ring.try_claim(&out, 1), size_t{1});
    });
    while (!Parking::is_parked()) std::this_thread::yield();
    std::atomic<bool> is_reported{false};
    uint64_t out = 0;
    uint64_t pushed = 0;
    {
        const Watchdog watchdog([&](const char*) { is_reported = true; }, limits);
        while (!is_reported) {
            if (ring.try_push(pushed)) {
                ++pushed;
                harness::step();
            } else {
                ring.try_claim(&out, 1);
                std::this_thread::yield();
            }
        }
    }
    CHECK(pushed < 4);
    Parking::release();
    victim.join();
}

TEST_MAIN
