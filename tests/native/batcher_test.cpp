// The batcher's rules one at a time, single-threaded, with a clock driven by hand.
#include "batcher.h"

#include <deque>
#include <initializer_list>
#include <vector>

#include "harness.h"
#include "parking.h"
#include "row_cost.h"

using pyserve::Batcher;
using pyserve::BatchLimits;
using pyserve::never_ns;
using pyserve::Next;
using pyserve::Release;
using pyserve::Request;
using pyserve::State;
using pyserve::Take;

namespace {

// A batcher and the requests pushed into it, numbered from 0.
struct Bench {
    explicit Bench(size_t capacity = 8, const BatchLimits& limits = {}) : batcher(capacity, UINT64_MAX - 2) {
        HandClock::time = 1000;
        batcher.set_limits(limits);
    }

    Request& push(int64_t deadline = never_ns, int64_t size = 1) {
        Request& request = requests.emplace_back();
        request.index = static_cast<uint32_t>(requests.size() - 1);
        request.queued_at = HandClock::now_ns();
        request.deadline = deadline;
        request.input_size = size;
        request.state = State::queued;
        CHECK(batcher.try_push(&request));
        return request;
    }
    void push_many(int count) {
        while (count-- > 0) push();
    }
    // As often as it takes to be believed.
    void note_cost(size_t rows, int64_t ns) {
        for (int i = 0; i < 5; ++i) batcher.note_cost(rows, ns);
    }

    Next look(bool full_only = false) { return batcher.try_next(take, wake_at, full_only); }

    static void check_list(const std::vector<Request*>& got, std::initializer_list<uint32_t> expected) {
        CHECK_EQ(got.size(), expected.size());
        size_t i = 0;
        for (const uint32_t index : expected) CHECK_EQ(got[i++]->index, index);
    }

    // Takes a batch that must hold exactly these, and gives its permit back.
    void check_takes(std::initializer_list<uint32_t> requests_expected,
                     std::initializer_list<uint32_t> dropped_expected = {}) {
        CHECK(look() == Next::batch);
        CHECK_EQ(wake_at, never_ns);
        check_list(take.requests, requests_expected);
        check_list(take.dropped, dropped_expected);
        for (const Request* request : take.requests) CHECK(request->state.load() == State::batched);
        batcher.leave();
    }
    void check_waits(int64_t until = never_ns) {
        CHECK(look() == Next::nothing);
        CHECK(take.empty());
        CHECK_EQ(wake_at, until);
        CHECK_EQ(batcher.running(), 0u);
    }

    Batcher<HandClock> batcher;
    std::deque<Request> requests;
    Take take;
    int64_t wake_at = 0;
};

}  // namespace

TEST(a_lone_request_leaves_at_once) {
    Bench bench(8, {.batch_size_max = 8, .batch_delay_max_ns = 1'000'000});
    bench.check_waits();
    bench.push();
    bench.check_takes({0});
    bench.check_waits();
}

TEST(a_batch_is_what_is_there_and_never_above_its_maximum) {
    Bench bench(8, {.batch_size_max = 4});
    bench.push_many(3);
    bench.check_takes({0, 1, 2});
    bench.push_many(6);
    bench.check_takes({3, 4, 5, 6});
    bench.check_takes({7, 8});
}

TEST(a_maximum_above_the_capacity_is_the_capacity) {
    Bench bench(4, {.batch_size_max = UINT32_MAX, .batch_size_min = UINT32_MAX, .batch_delay_max_ns = 100});
    CHECK_EQ(bench.batcher.batch_size_max(), 4u);
    bench.push_many(3);
    bench.check_waits(1100);
    bench.push();  // the ring is full: nothing more could come
    bench.check_takes({0, 1, 2, 3});
}

TEST(the_bytes_of_a_batch_are_capped_but_the_first_always_goes) {
    Bench bench(8, {.batch_size_max = 8, .batch_bytes_max = 10});
    for (const int64_t size : {4, 6, 1, 50, 10, 1}) bench.push(never_ns, size);
    bench.check_takes({0, 1});
    bench.check_takes({2});
    bench.check_takes({3});
    bench.check_takes({4});
    bench.check_takes({5});
    bench.batcher.set_limits({.batch_size_max = 8, .batch_bytes_max = INT64_MIN});
    bench.push_many(2);
    bench.check_takes({6});
    bench.check_takes({7});
}

TEST(a_minimum_waits_from_the_first_arrival_and_no_longer) {
    Bench bench(8, {.batch_size_max = 8, .batch_size_min = 3, .batch_delay_max_ns = 100});
    bench.push();
    bench.check_waits(1100);
    HandClock::time = 1060;
    bench.push();
    bench.check_waits(1100);  // counted from the first, not from the last
    HandClock::time = 1099;
    bench.check_waits(1100);
    HandClock::time = 1100;
    bench.check_takes({0, 1});
    bench.push_many(3);
    bench.check_takes({2, 3, 4});  // the minimum is there: nothing to wait for
}

TEST(a_minimum_above_the_maximum_is_the_maximum) {
    Bench bench(8, {.batch_size_max = 2, .batch_size_min = 5, .batch_delay_max_ns = 100});
    bench.push();
    bench.check_waits(1100);
    bench.push();
    bench.check_takes({0, 1});
}

TEST(a_window_without_end_does_not_overflow) {
    Bench bench(8, {.batch_size_max = 8, .batch_size_min = 2, .batch_delay_max_ns = INT64_MAX});
    bench.push();
    bench.check_waits(1000 + INT64_MAX / 2);
    bench.batcher.set_limits({.batch_size_max = 8, .batch_size_min = 2, .batch_delay_max_ns = -5});
    bench.check_takes({0});
}

TEST(an_expired_request_is_dropped_and_never_returned) {
    Bench bench(8, {.batch_size_max = 2});
    bench.push(1500);  // the first one too
    bench.push();
    bench.push(1500);
    bench.push(1501);
    bench.push();
    HandClock::time = 1500;  // a deadline is reached when the clock shows it
    bench.check_takes({1, 3}, {0, 2});
    CHECK(bench.requests[0].state.load() == State::expired);
    CHECK(bench.requests[2].state.load() == State::expired);
    bench.check_takes({4});
}

TEST(a_deadline_inside_the_window_ends_it) {
    Bench bench(8, {.batch_size_max = 8, .batch_size_min = 4, .batch_delay_max_ns = 100});
    bench.push(1080);
    bench.check_waits(1080);
    bench.push(1050);  // not only the first one's deadline counts
    bench.check_waits(1050);
    HandClock::time = 1050;
    bench.check_takes({0}, {1});
}

TEST(a_cancelled_request_is_dropped) {
    Bench bench(8, {.batch_size_max = 8});
    bench.push_many(3);
    CHECK(bench.requests[0].try_cancel());
    CHECK(bench.requests[2].try_cancel());
    CHECK(!bench.requests[2].try_cancel());  // once only
    bench.check_takes({1}, {0, 2});
    CHECK(bench.requests[1].try_cancel());  // batched, and dropped later by its worker
    bench.push();
    CHECK(bench.requests[3].try_cancel());
    bench.check_takes({}, {3});
}

TEST(dead_requests_do_not_use_up_places_of_a_batch) {
    Bench bench(8, {.batch_size_max = 2});
    bench.push_many(8);
    for (const size_t i : {size_t{0}, size_t{1}, size_t{3}, size_t{4}}) CHECK(bench.requests[i].try_cancel());
    bench.check_takes({2, 5}, {0, 1, 3, 4});
    bench.check_takes({6, 7});
}

TEST(no_more_batches_than_running_max_run_at_once) {
    Bench bench(8, {.batch_size_max = 1, .running_max = 2});
    bench.push_many(3);
    CHECK(bench.look() == Next::batch);
    CHECK(bench.look() == Next::batch);
    CHECK(bench.look() == Next::nothing);
    CHECK_EQ(bench.wake_at, never_ns);
    CHECK_EQ(bench.batcher.running(), 2u);
    CHECK_EQ(bench.batcher.queue_size(), size_t{1});
    bench.batcher.leave();
    CHECK(bench.look() == Next::batch);
    bench.check_list(bench.take.requests, {2});
}

TEST(full_only_takes_nothing_less_than_a_full_batch) {
    Bench bench(8, {.batch_size_max = 3});
    bench.push_many(2);
    CHECK(bench.look(true) == Next::nothing);
    bench.push();
    CHECK(bench.look(true) == Next::batch);
    bench.check_list(bench.take.requests, {0, 1, 2});
}

TEST(closing_ends_a_window_and_then_everything) {
    Bench bench(8, {.batch_size_max = 8, .batch_size_min = 8, .batch_delay_max_ns = 1'000'000, .running_max = 1});
    bench.push_many(2);
    bench.check_waits(1'001'000);
    bench.batcher.close();
    bench.batcher.close();
    CHECK(bench.look() == Next::batch);
    bench.check_list(bench.take.requests, {0, 1});
    CHECK(bench.look() == Next::closed);  // also while the gate is shut
    bench.batcher.leave();
    CHECK(bench.look() == Next::closed);
}

TEST(new_limits_apply_to_the_next_batch) {
    Bench bench(8, {.batch_size_max = 2});
    bench.push_many(8);
    bench.check_takes({0, 1});
    bench.batcher.set_limits({.batch_size_max = 3});
    bench.check_takes({2, 3, 4});
    bench.batcher.set_limits({.batch_size_max = 8, .batch_size_min = 8, .batch_delay_max_ns = 50});
    bench.check_waits(1050);
    // Each is at least 1.
    bench.batcher.set_limits({.batch_size_max = 0, .batch_size_min = 0, .running_max = 0});
    bench.check_takes({5});
    bench.check_takes({6});
}

TEST(a_ring_full_of_dead_requests_is_purged_in_order) {
    Bench bench(8, {.batch_size_max = 8});
    bench.push_many(8);
    for (const size_t i : {size_t{0}, size_t{3}, size_t{7}}) CHECK(bench.requests[i].try_cancel());
    Request extra;
    CHECK(!bench.batcher.try_push(&extra));
    std::vector<Request*> dropped;
    bench.batcher.purge(dropped);
    bench.check_list(dropped, {0, 3, 7});
    CHECK_EQ(bench.batcher.queue_size(), size_t{5});
    bench.push();
    bench.check_takes({1, 2, 4, 5, 6, 8});
}

TEST(a_batch_says_why_it_left) {
    Bench bench(8, {.batch_size_max = 4, .batch_size_min = 2, .batch_delay_max_ns = 100, .batch_bytes_max = 10});
    const auto check_why = [&](std::initializer_list<uint32_t> expected, Release why) {
        bench.check_takes(expected);
        CHECK_EQ(static_cast<int>(bench.take.release), static_cast<int>(why));
    };
    bench.push();
    bench.check_waits(1100);
    CHECK(bench.take.release == Release::none);
    bench.push();
    check_why({0, 1}, Release::min_batch);
    bench.push_many(5);
    check_why({2, 3, 4, 5}, Release::full);
    HandClock::time = 1100;
    check_why({6}, Release::delay);
    bench.push();
    bench.push(1150);
    CHECK(bench.requests[7].try_cancel());
    HandClock::time = 1150;
    CHECK(bench.look() == Next::batch);
    CHECK(bench.take.requests.empty() && bench.take.release == Release::none);  // it holds only dropped ones
    bench.batcher.leave();
    bench.batcher.set_limits(
        {.batch_size_max = 4, .batch_size_min = 3, .batch_delay_max_ns = 100, .batch_bytes_max = 10});
    bench.push();
    bench.push(1180);
    bench.check_waits(1180);
    HandClock::time = 1180;
    bench.check_takes({9}, {10});
    CHECK(bench.take.release == Release::deadline);
    bench.batcher.set_limits({.batch_size_max = 4, .batch_bytes_max = 10});
    bench.push(never_ns, 9);
    bench.push(never_ns, 9);
    check_why({11}, Release::bytes);
    check_why({12}, Release::idle);
    bench.push();
    bench.push();
    CHECK(bench.requests[13].try_cancel());
    bench.check_takes({14}, {13});
    CHECK(bench.take.release == Release::idle);
    bench.batcher.set_limits({.batch_size_max = 4, .batch_size_min = 4, .batch_delay_max_ns = 100});
    bench.push();
    bench.batcher.close();
    check_why({15}, Release::closing);
}

TEST(workers_that_share_take_their_part_of_what_is_queued_or_runs) {
    Bench bench(16, {.batch_size_max = 8});
    bench.batcher.share_among(2);
    bench.push_many(7);
    bench.check_takes({0, 1, 2, 3});
    bench.batcher.hold(4);
    bench.push();
    bench.check_takes({4, 5, 6, 7});  // 4 that wait and 4 that run: 4 each
    bench.batcher.hold(4);
    bench.push();
    bench.check_takes({8});
    bench.batcher.let_go(8);
    bench.push_many(3);
    bench.batcher.share_among(1);
    bench.check_takes({9, 10, 11});
}

TEST(a_part_is_left_for_the_batch_after_where_a_row_costs_as_much_in_smaller_ones) {
    Bench bench(32, {.batch_size_max = 8});
    bench.batcher.share_among(2);
    bench.note_cost(2, 2030);
    bench.note_cost(4, 4000);
    bench.push_many(8);
    bench.check_takes({0, 1, 2});
    bench.batcher.hold(3);
    bench.check_takes({3, 4, 5});  // 5 that wait and 3 that run
    bench.batcher.hold(3);
    bench.batcher.let_go(3);
    bench.check_takes({6, 7});  // the first one has ended: what was left is there at once
    bench.batcher.let_go(3);
    bench.batcher.share_among(1);
    bench.push_many(4);
    bench.check_takes({8, 9});
    bench.batcher.share_among(0);
    bench.check_takes({10, 11});
}

TEST(nothing_is_left_where_larger_batches_are_worth_more_or_it_is_not_known) {
    Bench bench(32, {.batch_size_max = 8});
    bench.batcher.share_among(2);
    bench.note_cost(2, 2200);  // a tenth more for each row
    bench.push_many(8);
    bench.check_takes({0, 1, 2, 3});
    bench.note_cost(4, 4000);
    bench.push_many(4);
    bench.check_takes({4, 5, 6, 7});
    bench.batcher.share_among(1);
    bench.check_takes({8, 9, 10, 11});
}

TEST(many_that_wait_make_full_batches_and_a_minimum_is_kept_where_a_part_is_left) {
    Bench bench(64, {.batch_size_max = 4});
    bench.batcher.share_among(2);
    for (const size_t rows : {1u, 2u, 3u, 4u}) bench.note_cost(rows, static_cast<int64_t>(rows) * 1000);
    bench.push_many(12);
    bench.check_takes({0, 1, 2, 3});
    bench.check_takes({4, 5, 6});
    bench.check_takes({7, 8});
    bench.batcher.set_limits({.batch_size_max = 8, .batch_size_min = 3, .batch_delay_max_ns = 100});
    bench.push_many(3);
    bench.check_takes({9, 10, 11});  // and as many as the minimum are left
    bench.check_takes({12, 13, 14});
    bench.push_many(5);
    bench.check_takes({15, 16, 17, 18, 19});  // two would be left, which would have to wait for a third
}

TEST(no_fewer_than_the_minimum_are_left_behind_a_part) {
    Bench bench(64, {.batch_size_max = 8, .batch_size_min = 3, .batch_delay_max_ns = 100});
    bench.batcher.share_among(2);
    bench.push_many(8);
    bench.check_takes({0, 1, 2, 3});
    bench.push_many(1);
    bench.check_takes({4, 5, 6, 7, 8});
}

TEST(now_and_then_a_part_is_taken_the_other_way_so_that_both_costs_stay_known) {
    for (const int64_t of_two : {2000, 3000}) {
        Bench bench(256, {.batch_size_max = 4});
        bench.batcher.share_among(1);
        bench.note_cost(2, of_two);
        bench.note_cost(4, 4000);
        int counts[5] = {};
        for (int i = 0; i < 320; ++i) {
            bench.push_many(4);
            CHECK(bench.look() == Next::batch);
            ++counts[bench.take.requests.size()];
            bench.batcher.leave();
            while (bench.batcher.queue_size() > 0) {
                bench.batcher.share_among(0);
                CHECK(bench.look() == Next::batch);
                bench.batcher.leave();
                bench.batcher.share_among(1);
            }
        }
        CHECK_EQ(counts[of_two == 2000 ? 4 : 2], 10);
        CHECK_EQ(counts[of_two == 2000 ? 2 : 4], 310);
    }
}

TEST(what_a_row_costs_is_judged_by_what_was_run_and_not_by_one_batch_that_was_held_up) {
    pyserve::RowCost cost;
    const auto note = [&cost](size_t rows, int64_t ns, int times) {
        while (times-- > 0) cost.note(rows, ns);
    };
    CHECK(!cost.is_even(1, 2));
    cost.note(2, 1'000'000);  // the first one is slow, and does not count
    note(2, 2000, 3);
    CHECK(!cost.is_even(2, 2));  // too few
    cost.note(2, 2000);
    CHECK(cost.is_even(2, 2));
    CHECK(!cost.is_even(1, 2));  // of one row nothing is known
    CHECK(!cost.is_even(2, 3));
    note(6, 6000, 5);
    CHECK(cost.is_even(3, 5));  // as in 2 and in 6
    CHECK(!cost.is_even(3, 7));
    cost.note(2, 1'000'000);
    note(2, 2000, 24);
    CHECK(cost.is_even(2, 6));
    note(6, 5700, 24);
    CHECK(!cost.is_even(2, 6));
    note(6, 60'000, 40);  // a model that has become slower
    note(2, 20'000, 40);
    CHECK(cost.is_even(2, 6));
    note(2, 21'000, 40);
    CHECK(!cost.is_even(2, 6));
    note(0, 1, 5);
    note(65, 1, 5);
    CHECK(!cost.is_even(64, 65));
}

TEST(a_part_is_never_less_than_the_minimum_nor_more_than_the_maximum) {
    Bench bench(32, {.batch_size_max = 6, .batch_size_min = 3, .batch_delay_max_ns = 100});
    bench.batcher.share_among(4);
    bench.push_many(2);
    bench.check_waits(1100);
    bench.push();
    bench.check_takes({0, 1, 2});
    bench.push_many(20);
    bench.batcher.share_among(2);
    bench.check_takes({3, 4, 5, 6, 7, 8});
    bench.batcher.set_limits({.batch_size_max = 6, .running_max = 1});  // nobody else may run
    bench.batcher.share_among(7);
    bench.check_takes({9, 10, 11, 12, 13, 14});
}

TEST(a_part_is_no_full_batch_and_no_measure_for_one_that_has_to_be_full) {
    Bench bench(16, {.batch_size_max = 8});
    bench.batcher.share_among(2);
    bench.push_many(8);
    CHECK(bench.look(true) == Next::batch);
    bench.check_list(bench.take.requests, {0, 1, 2, 3, 4, 5, 6, 7});
    CHECK(bench.take.release == Release::full);
    bench.batcher.leave();
    bench.push_many(8);
    CHECK(bench.look() == Next::batch);
    bench.check_list(bench.take.requests, {8, 9, 10, 11});
    CHECK(bench.take.release == Release::idle);
    bench.batcher.leave();
}

TEST(a_stopped_worker_takes_nothing) {
    Bench bench(8);
    bench.push();
    const std::atomic<bool> stop{true};
    CHECK(bench.batcher.next_batch(bench.take, stop) == Next::closed);
    CHECK_EQ(bench.batcher.queue_size(), size_t{1});
}

TEST(a_worker_that_has_run_smaller_batches_only_is_told_before_it_takes_a_larger_one) {
    Bench bench(8, {.batch_size_max = 2, .running_max = 1});
    const std::atomic<bool> stop{false};
    bench.push_many(4);
    const auto next = [&](size_t known) { return bench.batcher.next_batch(bench.take, stop, known); };
    CHECK(next(2) == Next::batch);
    bench.check_list(bench.take.requests, {0, 1});
    bench.batcher.leave();
    bench.batcher.set_limits({.batch_size_max = 4, .running_max = 1});
    CHECK(next(2) == Next::larger);
    CHECK_EQ(bench.batcher.running(), uint32_t{1});  // what it does instead counts as a batch
    CHECK_EQ(bench.batcher.queue_size(), size_t{2});
    bench.batcher.leave();
    CHECK(next(4) == Next::batch);
    bench.check_list(bench.take.requests, {2, 3});
    bench.batcher.leave();
    bench.batcher.set_limits({.batch_size_max = 1, .running_max = 1});
    bench.push();
    CHECK(next(4) == Next::batch);
    bench.batcher.leave();
}

TEST_MAIN
