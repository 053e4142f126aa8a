// Histograms under concurrent writers.
#include "stats.h"

#include <numeric>
#include <thread>
#include <vector>

#include "harness.h"

using pyserve::batch_size_bounds;
using pyserve::BatchSizeHistogram;

TEST(a_value_falls_into_the_first_bucket_whose_bound_it_does_not_exceed) {
    BatchSizeHistogram histogram(batch_size_bounds);
    for (const double value : {0.0, 1.0, 1.5, 2.0, 512.0, 513.0}) histogram.observe(value);
    const auto counts = histogram.counts();
    CHECK_EQ(counts[0], uint64_t{2});
    CHECK_EQ(counts[1], uint64_t{2});
    CHECK_EQ(counts[batch_size_bounds.size() - 1], uint64_t{1});
    CHECK_EQ(counts[batch_size_bounds.size()], uint64_t{1});
    CHECK_EQ(histogram.sum(), 1029.5);
}

TEST(concurrent_observations_all_count) {
    constexpr int writers = 4;
    const int64_t count = harness::scaled(100'000);
    BatchSizeHistogram histogram(batch_size_bounds);
    std::atomic<bool> over{false};
    std::thread reader([&] {
        uint64_t last = 0;
        while (!over) {
            const auto counts = histogram.counts();
            const uint64_t total = std::accumulate(counts.begin(), counts.end(), uint64_t{0});
            CHECK(total >= last);  // never goes back
            last = total;
        }
    });
    std::vector<std::thread> threads;
    for (int w = 0; w < writers; ++w) {
        threads.emplace_back([&] {
            for (int64_t i = 0; i < count; ++i) {
                histogram.observe(static_cast<double>(i % 8 + 1));
                harness::step();
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    over = true;
    reader.join();
    const auto counts = histogram.counts();
    const uint64_t total = std::accumulate(counts.begin(), counts.end(), uint64_t{0});
    CHECK_EQ(total, static_cast<uint64_t>(count) * writers);
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(i % 8 + 1);
    CHECK_EQ(histogram.sum(), sum * writers);  // whole numbers: exact in any order
}

TEST_MAIN
