// Whether the numbers of a batch are ordinary ones: finite, and far from where sums of products overflow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tensors.h"

namespace pyserve {

// What probes at load go up to, and what no picture, sound or measurement in sensible units comes near.
constexpr float ordinary_max = 1e6f;

// Whether no number, without its sign, is above `max`; one that is none, or an infinity, is.
inline bool is_below(const float* numbers, size_t count, float max) {
    // The bits of a float without its sign grow with its magnitude; infinities and what is no number come last. One
    // maximum over whole numbers needs no branch and is a vector instruction per eight of them.
    constexpr size_t block = 64;
    int32_t limit, largest = 0;
    std::memcpy(&limit, &max, sizeof limit);
    size_t at = 0;
    int32_t bits[block];
    for (; at + block <= count; at += block) {
        std::memcpy(bits, numbers + at, sizeof bits);
        int32_t lanes[16] = {};
        for (size_t i = 0; i < block; i += 16) {
            for (size_t lane = 0; lane < 16; ++lane) lanes[lane] = std::max(lanes[lane], bits[i + lane] & 0x7fffffff);
        }
        for (const int32_t lane : lanes) largest = std::max(largest, lane);
        if (largest > limit) return false;
    }
    for (; at < count; ++at) {
        int32_t last;
        std::memcpy(&last, numbers + at, sizeof last);
        largest = std::max(largest, last & 0x7fffffff);
    }
    return largest <= limit;
}

inline bool is_ordinary(const float* numbers, size_t count) { return is_below(numbers, count, ordinary_max); }

// Inputs on the host. Whole numbers are ordinary.
inline bool is_ordinary(const std::vector<at::Tensor>& inputs) {
    for (const at::Tensor& input : inputs) {
        if (!input.is_floating_point() || input.numel() == 0) continue;
        if (input.scalar_type() == at::kFloat && input.is_non_overlapping_and_dense()) {
            if (!is_ordinary(input.const_data_ptr<float>(), static_cast<size_t>(input.numel()))) return false;
        } else {
            const double largest = input.abs().max().item<double>();
            if (!(largest <= ordinary_max)) return false;
        }
    }
    return true;
}

}  // namespace pyserve
