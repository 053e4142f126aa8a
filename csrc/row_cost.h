// What a row costs in batches of so many rows: whether a batch may be smaller than it could be, or larger ones are worth more.
//
// Many convolutions on a CPU take twice as long for twice the rows. Then nothing is lost when a worker leaves a part of what
// waits for the batch after, and it need not be idle until the clients that it has answered have sent again.
//
// Threads: any. What two workers note at once may be lost of one of them.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace pyserve {

class RowCost {
  public:
    // Larger batches are not told apart from unknown ones.
    static constexpr size_t rows_max = 64;

    // A batch of so many rows took `ns`. The first one of its size is left out: it is slower, as kernels are chosen in it.
    void note(size_t rows, int64_t ns) noexcept {
        if (rows == 0 || rows > rows_max) return;
        Size& size = sizes_[rows - 1];
        const uint32_t seen = size.seen.load(std::memory_order_relaxed);
        if (seen < weight_min) size.seen.store(seen + 1, std::memory_order_relaxed);
        if (seen == 0) return;
        const int64_t known = size.ns_per_row.load(std::memory_order_relaxed), next = ns / static_cast<int64_t>(rows);
        // The mean at first, then a running one; of a batch that was held up no more than the double.
        const int64_t step = known == 0 ? next : (std::min(next, 2 * known) - known) / seen;
        size.ns_per_row.store(std::max<int64_t>(1, known + step), std::memory_order_relaxed);
    }

    // Whether a row in batches of `few` costs about what it does in batches of `many`. What was not run is judged by what
    // was: by smaller batches for `few`, by larger ones for `many`; without these, no.
    bool is_even(size_t few, size_t many) const noexcept {
        int64_t in_few = 0, in_many = 0;
        for (size_t rows = std::min(few, rows_max); rows > 0 && in_few == 0; --rows) in_few = at(rows);
        for (size_t rows = many; rows > 0 && rows <= rows_max && in_many == 0; ++rows) in_many = at(rows);
        return in_few != 0 && in_many != 0 && in_few - in_many <= in_many / gain_share;
    }

  private:
    // Not being idle between two batches was worth 3 to 4 % of the answers where it was measured.
    static constexpr int64_t gain_share = 25;

    static constexpr uint32_t weight_min = 8;  // of the newest batch: an eighth
    static constexpr uint32_t seen_min = 5;    // before a size counts as known

    struct Size {
        std::atomic<uint32_t> seen{0};
        std::atomic<int64_t> ns_per_row{0};
    };

    // 0: not known.
    int64_t at(size_t rows) const noexcept {
        const Size& size = sizes_[rows - 1];
        return size.seen.load(std::memory_order_relaxed) < seen_min ? 0
                                                                    : size.ns_per_row.load(std::memory_order_relaxed);
    }

    std::array<Size, rows_max> sizes_;
};

}  // namespace pyserve
