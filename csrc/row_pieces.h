// In how many pieces a batch is run where several streams run batches at once, each with memory of its own for what it
// computes: in so many that all streams together hold about what one would for the largest batch. A stream keeps the
// memory of the largest run that it had.
//
// Each piece reads all weights again. So there are no more pieces than cost little, by what runs have taken so far; a
// network that does little with its weights for each row runs its batches whole. Once it does, it always does.
//
// Threads: any.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>

namespace pyserve {

class RowPieces {
  public:
    explicit RowPieces(int64_t weights_size) : piece_ns_(run_ns + weights_size / bytes_per_ns) {}

    // How many rows the pieces of a batch have, the last one perhaps fewer. `numbers` is how many there are in its inputs.
    int64_t rows_of(int64_t rows, int64_t numbers, int64_t streams) noexcept {
        raise(largest_, numbers);
        if (streams <= 1 || rows <= 1 || numbers <= 0 || is_whole_.load(std::memory_order_relaxed)) return rows;
        // The share of the largest batch that each stream may hold.
        const int64_t share = std::max<int64_t>(1, largest_.load(std::memory_order_relaxed) / streams);
        const int64_t pieces = std::min({(numbers + share - 1) / share, streams, affordable(numbers), rows});
        return (rows + pieces - 1) / pieces;
    }

    // A run of so many numbers took so long.
    void note(int64_t numbers, int64_t ns) noexcept {
        if (numbers <= 0 || ns <= 0) return;
        const double each = static_cast<double>(ns) / static_cast<double>(numbers);
        double known = fastest_.load(std::memory_order_relaxed);
        while (each < known && !fastest_.compare_exchange_weak(known, each, std::memory_order_relaxed)) {
        }
    }

    // Batches are not to be divided: their outputs have not a row for each of theirs.
    void keep_whole() noexcept { is_whole_.store(true, std::memory_order_relaxed); }

  private:
    static constexpr int64_t run_ns = 20'000;    // of a run in which nothing is computed
    static constexpr int64_t bytes_per_ns = 20;  // that a core reads, of memory that it reads in order
    static constexpr int64_t cost_share = 32;    // of the time of a batch, that further pieces may cost

    // By the fastest run, since others had the CPU meanwhile. As long as nothing is known, any number.
    int64_t affordable(int64_t numbers) const noexcept {
        const double ns = fastest_.load(std::memory_order_relaxed) * static_cast<double>(numbers);
        const double more = ns / (static_cast<double>(cost_share) * static_cast<double>(piece_ns_));
        return more < 1e9 ? 1 + static_cast<int64_t>(more) : std::numeric_limits<int64_t>::max();
    }

    static void raise(std::atomic<int64_t>& largest, int64_t value) noexcept {
        int64_t known = largest.load(std::memory_order_relaxed);
        while (value > known && !largest.compare_exchange_weak(known, value, std::memory_order_relaxed)) {
        }
    }

    const int64_t piece_ns_;  // what a further piece costs
    std::atomic<int64_t> largest_{0};
    std::atomic<double> fastest_{std::numeric_limits<double>::infinity()};  // ns of each number
    std::atomic<bool> is_whole_{false};
};

}  // namespace pyserve
