// The event count: no lost wake-up, deadlines, and nothing to wait for once notified.
#include "waiter.h"

#include <thread>
#include <vector>

#include "clock.h"
#include "harness.h"

using pyserve::never_ns;
using pyserve::SteadyClock;
using pyserve::Waiter;

TEST(a_notify_between_prepare_and_wait_is_not_slept_through) {
    Waiter waiter;
    const uint32_t key = waiter.prepare();
    CHECK_EQ(waiter.sleepers(), 1u);
    waiter.notify();
    waiter.wait(key, never_ns);  // would never return
    CHECK_EQ(waiter.sleepers(), 0u);
}

TEST(a_wait_ends_at_its_deadline) {
    Waiter waiter;
    constexpr int64_t length_ns = 2'000'000;
    const int64_t deadline = SteadyClock::now_ns() + length_ns;
    while (SteadyClock::now_ns() < deadline) waiter.wait(waiter.prepare(), deadline);
    for (const int64_t past : {int64_t{0}, int64_t{1}, SteadyClock::now_ns()}) {
        waiter.wait(waiter.prepare(), past);
    }
    CHECK_EQ(waiter.sleepers(), 0u);
}

TEST(a_cancelled_wait_leaves_no_sleeper) {
    Waiter waiter;
    waiter.prepare();
    waiter.cancel();
    CHECK_EQ(waiter.sleepers(), 0u);
    waiter.notify();
}

TEST(two_threads_that_wake_each_other_never_lose_a_wake_up) {
    const int64_t rounds = harness::scaled(100'000);
    Waiter waiters[2];
    std::atomic<int64_t> turn{0};  // whose parity it is may go on
    const auto play = [&](int64_t self) {
        Waiter& own = waiters[self];
        for (int64_t next = self; next < rounds; next += 2) {
            while (turn.load(std::memory_order_acquire) != next) {
                const uint32_t key = own.prepare();
                if (turn.load(std::memory_order_acquire) == next)
                    own.cancel();
                else
                    own.wait(key, never_ns);
            }
            turn.store(next + 1, std::memory_order_release);
            waiters[1 - self].notify();
            harness::step();
        }
    };
    std::thread other([&] { play(1); });
    play(0);
    other.join();
    CHECK_EQ(turn.load(), rounds);
}

TEST(one_notify_wakes_all_sleepers) {
    const int64_t rounds = harness::scaled(20'000);
    Waiter go, done;
    std::atomic<int64_t> round{0}, arrived{0};
    constexpr int64_t sleepers = 3;
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < sleepers; ++i) {
        threads.emplace_back([&] {
            for (int64_t next = 1; next <= rounds; ++next) {
                while (round.load(std::memory_order_acquire) < next) {
                    const uint32_t key = go.prepare();
                    if (round.load(std::memory_order_acquire) >= next)
                        go.cancel();
                    else
                        go.wait(key, never_ns);
                }
                arrived.fetch_add(1, std::memory_order_acq_rel);
                done.notify();
            }
        });
    }
    for (int64_t next = 1; next <= rounds; ++next) {
        round.store(next, std::memory_order_release);
        go.notify();
        while (arrived.load(std::memory_order_acquire) < next * sleepers) {
            const uint32_t key = done.prepare();
            if (arrived.load(std::memory_order_acquire) >= next * sleepers)
                done.cancel();
            else
                done.wait(key, never_ns);
        }
        harness::step();
    }
    for (std::thread& thread : threads) thread.join();
    CHECK_EQ(go.sleepers() + done.sleepers(), 0u);
}

TEST_MAIN
