// Counters and histograms of the data path: written by workers, read by a scrape, no lock.
//
// A snapshot is not taken at one instant; each number in it is exact at some moment during the call and none of
// them ever goes back.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace pyserve {

// Upper bounds of the buckets; the last bucket, +Inf, is implied.
inline constexpr std::array<double, 16> duration_bounds_s = {0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025,
                                                             0.05,   0.1,     0.25,   0.5,   1.0,    2.5,   5.0,  10.0};
inline constexpr std::array<double, 10> batch_size_bounds = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512};

template <size_t N>
class Histogram {
  public:
    explicit Histogram(const std::array<double, N>& bounds) : bounds_(bounds) {}

    void observe(double value) noexcept {
        size_t i = 0;
        while (i < N && value > bounds_[i]) ++i;
        counts_[i].fetch_add(1, std::memory_order_relaxed);
        double sum = sum_.load(std::memory_order_relaxed);
        while (!sum_.compare_exchange_weak(sum, sum + value, std::memory_order_relaxed)) {
        }
    }

    const std::array<double, N>& bounds() const noexcept { return bounds_; }
    double sum() const noexcept { return sum_.load(std::memory_order_relaxed); }

    // Not cumulative; the last entry counts what is above the last bound.
    std::array<uint64_t, N + 1> counts() const noexcept {
        std::array<uint64_t, N + 1> out{};
        for (size_t i = 0; i <= N; ++i) out[i] = counts_[i].load(std::memory_order_relaxed);
        return out;
    }

  private:
    const std::array<double, N>& bounds_;
    std::array<std::atomic<uint64_t>, N + 1> counts_{};
    std::atomic<double> sum_{0};
};

using DurationHistogram = Histogram<duration_bounds_s.size()>;
using BatchSizeHistogram = Histogram<batch_size_bounds.size()>;

struct LaneStats {
    DurationHistogram queue{duration_bounds_s};      // queued_at .. started_at, per request
    DurationHistogram staging{duration_bounds_s};    // started_at .. staged_at, per batch
    DurationHistogram inference{duration_bounds_s};  // staged_at .. finished_at, per batch
    BatchSizeHistogram batch_size{batch_size_bounds};
    std::atomic<uint64_t> submitted{0};
    std::atomic<uint64_t> batches{0};
    std::atomic<uint64_t> failed{0};            // requests whose own run failed
    std::atomic<uint64_t> expired{0};           // dropped in the queue, deadline passed
    std::atomic<uint64_t> cancelled{0};         // dropped in the queue, or result dropped
    std::atomic<uint64_t> retried_singly{0};    // requests run alone because their batch failed
    std::atomic<uint64_t> lost{0};              // workers given up because their batch did not come to an end
    std::atomic<uint64_t> interrupted{0};       // runs of the model that were ended because they took too long
    std::atomic<uint64_t> staging_fallback{0};  // batches larger than the staging slot

    // Of accelerators; what a batch took there is by the device's own clock, or by the host's if it has none.
    DurationHistogram h2d{duration_bounds_s};
    DurationHistogram compute{duration_bounds_s};
    DurationHistogram d2h{duration_bounds_s};
    DurationHistogram gap{duration_bounds_s};  // between two batches, the second of which was waiting
    std::atomic<uint64_t> overlapped{0};       // batches that were launched while another one was on the device
    std::atomic<uint64_t> pageable_copies{0};  // copies from or to memory that is not page-locked
    std::atomic<uint64_t> pinned_refused{0};   // page-locked memory that could not be had
    std::atomic<uint64_t> slots_grown{0};      // slots that were made larger for a batch
    std::atomic<int64_t> pinned_bytes{0};      // page-locked memory of all slots now
    std::atomic<int64_t> slot_bytes{0};        // device memory of all slots now
};

}  // namespace pyserve
