// The ring alone: sequential properties, and one producer against several consumers.
#include "ring.h"

#include <deque>
#include <thread>
#include <vector>

#include "harness.h"

using harness::Random;
using harness::scaled;
using pyserve::Ring;

namespace {

constexpr uint64_t near_overflow = UINT64_MAX - 9;  // 2^64 - 10
constexpr uint64_t near_half = (uint64_t{1} << 32) - 10;

const std::vector<size_t> capacities = {1, 2, 4, 128};
const std::vector<uint64_t> starts = {0, near_half, near_overflow};

// One producer pushes 0, 1, 2, ... and `consumers` threads claim up to `claim_max` at a time.
void run_producer_against(size_t consumers, size_t capacity, uint64_t start, uint64_t count, size_t claim_max) {
    Ring<uint64_t> ring(capacity, start);
    std::vector<std::atomic<uint8_t>> seen(count);
    std::atomic<uint64_t> claimed{0};
    std::vector<std::thread> threads;
    for (size_t c = 0; c < consumers; ++c) {
        threads.emplace_back([&, c] {
            Random random(c + 1);
            std::vector<uint64_t> out(claim_max);
            uint64_t newest = 0;  // plus one
            while (claimed.load(std::memory_order_relaxed) < count) {
                const size_t got = ring.try_claim(out.data(), 1 + random.below(claim_max));
                CHECK(ring.size() <= capacity);
                if (got == 0) std::this_thread::yield();
                for (size_t i = 0; i < got; ++i) {
                    CHECK(out[i] >= newest);                      // claims of one consumer never go back
                    if (i > 0) CHECK_EQ(out[i], out[i - 1] + 1);  // one claim is one unbroken run
                    newest = out[i] + 1;
                    CHECK_EQ(int{seen[out[i]].fetch_add(1)}, 0);
                }
                claimed.fetch_add(got, std::memory_order_relaxed);
            }
        });
    }
    for (uint64_t i = 0; i < count;) {
        if (ring.try_push(i)) {
            ++i;
            harness::step();
        } else {
            std::this_thread::yield();
        }
    }
    for (std::thread& thread : threads) thread.join();
    CHECK_EQ(claimed.load(), count);
    for (const auto& times : seen) CHECK_EQ(int{times.load()}, 1);
    CHECK_EQ(ring.size(), size_t{0});
}

}  // namespace

TEST(capacity_must_be_a_power_of_two) {
    for (const size_t capacity : {size_t{0}, size_t{3}, size_t{100}}) {
        bool refused = false;
        try {
            const Ring<uint64_t> ring(capacity);
        } catch (const std::invalid_argument&) {
            refused = true;
        }
        CHECK(refused);
    }
}

TEST(a_full_ring_refuses_and_a_claim_makes_room) {
    for (const size_t capacity : capacities) {
        for (const uint64_t start : starts) {
            Ring<uint64_t> ring(capacity, start);
            for (size_t i = 0; i < capacity; ++i) CHECK(ring.try_push(i));
            CHECK(!ring.try_push(999));
            CHECK_EQ(ring.size(), capacity);
            uint64_t out = 0;
            CHECK_EQ(ring.try_claim(&out, 1), size_t{1});
            CHECK_EQ(out, uint64_t{0});
            CHECK(ring.try_push(999));
            CHECK(!ring.try_push(1000));
        }
    }
}

TEST(a_selection_takes_a_prefix_and_zero_leaves_the_ring_as_it_is) {
    Ring<uint64_t> ring(8, near_overflow);
    for (uint64_t i = 0; i < 8; ++i) CHECK(ring.try_push(i));
    uint64_t out[8];
    CHECK_EQ(ring.try_claim(out, 8, [](const uint64_t*, size_t) { return size_t{0}; }), size_t{0});
    CHECK_EQ(ring.size(), size_t{8});
    size_t offered = 0;
    const size_t got = ring.try_claim(out, 5, [&](const uint64_t* seen, size_t count) {
        offered = count;
        for (size_t i = 0; i < count; ++i) CHECK_EQ(seen[i], i);
        return size_t{3};
    });
    CHECK_EQ(offered, size_t{5});
    CHECK_EQ(got, size_t{3});
    CHECK_EQ(ring.try_claim(out, 8), size_t{5});
    CHECK_EQ(out[0], uint64_t{3});
    CHECK_EQ(ring.try_claim(out, 0), size_t{0});
}

TEST(a_look_overtaken_by_another_claim_is_thrown_away) {
    for (const bool takes : {true, false}) {
        Ring<uint64_t> ring(4, near_overflow);
        for (uint64_t i = 0; i < 4; ++i) CHECK(ring.try_push(i));
        uint64_t out[4];
        int looks = 0;
        const size_t got = ring.try_claim(out, 4, [&](const uint64_t* seen, size_t count) {
            if (++looks == 1) {
                uint64_t other = 0;
                CHECK_EQ(ring.try_claim(&other, 1), size_t{1});
                CHECK_EQ(other, uint64_t{0});
                CHECK(ring.try_push(4));  // into the slot that this look has read already
                return takes ? count : size_t{0};
            }
            CHECK_EQ(seen[0], uint64_t{1});
            return count;
        });
        CHECK_EQ(looks, 2);
        CHECK_EQ(got, size_t{4});
        for (uint64_t i = 0; i < 4; ++i) CHECK_EQ(out[i], i + 1);
    }
}

TEST(random_pushes_and_claims_agree_with_a_deque) {
    harness::for_each_seed(2000, [](uint64_t seed) {
        Random random(seed);
        const size_t capacity = random.pick(capacities);
        Ring<uint64_t> ring(capacity, random.pick(starts));
        std::deque<uint64_t> model;
        std::vector<uint64_t> out(capacity + 2);
        const uint64_t pushed_before = ring.pushed();
        uint64_t pushed = 0;
        for (int step = 0; step < 300; ++step) {
            if (random.chance(50)) {
                const bool accepted = ring.try_push(pushed);
                CHECK_EQ(accepted, model.size() < capacity);
                if (accepted) model.push_back(pushed++);
            } else {
                const size_t wanted = random.below(capacity + 3);
                const size_t got = ring.try_claim(out.data(), wanted);
                CHECK_EQ(got, std::min(wanted, model.size()));
                for (size_t i = 0; i < got; ++i) {
                    CHECK_EQ(out[i], model.front());
                    model.pop_front();
                }
            }
            CHECK_EQ(ring.size(), model.size());
            CHECK_EQ(ring.pushed() - pushed_before, pushed);
        }
    });
}

TEST(every_entry_reaches_exactly_one_of_many_consumers_in_order) {
    for (const size_t capacity : capacities) {
        for (const size_t consumers : {size_t{1}, size_t{3}}) {
            const auto count = static_cast<uint64_t>(scaled(100'000));
            run_producer_against(consumers, capacity, near_overflow, count, 1);
        }
    }
}

TEST(millions_of_entries_in_batches_of_random_size) {
    run_producer_against(2, 128, near_half, static_cast<uint64_t>(scaled(4'000'000)), 32);
    run_producer_against(4, 128, 0, static_cast<uint64_t>(scaled(2'000'000)), 8);
}

TEST(the_size_seen_by_a_bystander_is_never_above_the_capacity) {
    for (const size_t capacity : {size_t{1}, size_t{4}}) {
        Ring<uint64_t> ring(capacity);
        std::atomic<bool> over{false};
        std::thread bystander([&] {
            while (!over) CHECK(ring.size() <= capacity);
        });
        uint64_t out = 0;
        for (int64_t i = 0; i < scaled(3'000'000); ++i) {
            CHECK(ring.try_push(static_cast<uint64_t>(i)));
            CHECK_EQ(ring.try_claim(&out, 1), size_t{1});
            harness::step();
        }
        over = true;
        bystander.join();
    }
}

TEST_MAIN
