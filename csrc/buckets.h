// The sizes that batches run with on an accelerator: a batch of any other size is filled up to the next one, so that each
// size that ever runs has been warmed up.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace pyserve {

// 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, ... and `largest`, in this order: of a batch never more than half is filling, and
// from 8 rows on a third.
inline std::vector<size_t> buckets_up_to(size_t largest) {
    std::vector<size_t> sizes;
    for (size_t power = 1; power < largest; power *= 2) {
        sizes.push_back(power);
        if (power >= 8 && power + power / 2 < largest) sizes.push_back(power + power / 2);
        if (power > largest / 2) break;  // twice as much might be no number
    }
    sizes.push_back(std::max<size_t>(largest, 1));
    return sizes;
}

// Those of `wanted` that batches of up to `largest` rows need, in order: without larger ones than the first that holds
// `largest`, and with `largest` if none does.
inline std::vector<size_t> buckets_of(std::vector<size_t> wanted, size_t largest) {
    std::sort(wanted.begin(), wanted.end());
    wanted.erase(std::unique(wanted.begin(), wanted.end()), wanted.end());
    wanted.erase(wanted.begin(), std::lower_bound(wanted.begin(), wanted.end(), size_t{1}));
    wanted.erase(std::lower_bound(wanted.begin(), wanted.end(), largest), wanted.end());
    wanted.push_back(std::max<size_t>(largest, 1));
    return wanted;
}

// The smallest of `sizes`, which are in order, that holds `count` rows; `count` if there is none.
inline size_t bucket_for(const std::vector<size_t>& sizes, size_t count) {
    const auto found = std::lower_bound(sizes.begin(), sizes.end(), count);
    return found == sizes.end() ? count : *found;
}

// The largest of `sizes`, which are in order, below `size`; 0 if there is none.
inline size_t bucket_below(const std::vector<size_t>& sizes, size_t size) {
    const auto found = std::lower_bound(sizes.begin(), sizes.end(), size);
    return found == sizes.begin() ? 0 : *(found - 1);
}

}  // namespace pyserve
