// The sizes of inputs that a network was run with: kernels are made at the first run of each, in each stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace pyserve {

using Sizes = std::vector<std::vector<int64_t>>;  // of the inputs of one run

// The sizes of inputs that were run, in the order that they came. Any thread.
class SizesSeen {
  public:
    // Of sizes that are known, which is most runs, it takes neither a lock nor memory.
    void add(const std::vector<at::Tensor>& inputs) {
        const size_t known = count_.load(std::memory_order_acquire);
        if (known == count_max || has(inputs, known)) return;
        Sizes sizes;
        for (const at::Tensor& input : inputs) sizes.push_back(input.sizes().vec());
        const std::lock_guard lock(mutex_);
        const size_t now = count_.load(std::memory_order_relaxed);
        if (now == count_max || has(inputs, now)) return;
        sizes_[now] = std::move(sizes);
        count_.store(now + 1, std::memory_order_release);
    }

    std::vector<Sizes> all() const {
        return {sizes_.begin(), sizes_.begin() + static_cast<std::ptrdiff_t>(count_.load(std::memory_order_acquire))};
    }

  private:
    static constexpr size_t count_max = 32;

    bool has(const std::vector<at::Tensor>& inputs, size_t count) const {
        return std::any_of(sizes_.begin(), sizes_.begin() + static_cast<std::ptrdiff_t>(count), [&](const Sizes& each) {
            return std::equal(
                each.begin(), each.end(), inputs.begin(), inputs.end(),
                [](const std::vector<int64_t>& sizes, const at::Tensor& input) { return input.sizes() == sizes; });
        });
    }

    std::mutex mutex_;
    std::atomic<size_t> count_{0};
    std::array<Sizes, count_max> sizes_;  // those below the count do not change any more
};

}  // namespace pyserve
