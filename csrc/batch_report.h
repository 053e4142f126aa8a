// What the workers of a lane found out about batches of their model on an accelerator, and how often they did what.
//
// Written by workers, read from the loop.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace pyserve {

// Why a batch on an accelerator was not the replay of a graph.
enum class Eager : uint8_t {
    off,   // the model has no graphs; the report's note says why
    kind,  // its inputs are of another shape or dtype than the example's
    size,  // it has more rows than the graphs that there are
    count,
};
inline constexpr std::array<const char*, static_cast<size_t>(Eager::count)> eager_names = {"off", "input_kind", "size"};

class BatchReport {
  public:
    std::atomic<uint64_t> replays{0};
    std::atomic<uint64_t> padded_rows{0};
    std::atomic<uint64_t> graph_size{0};  // bytes of the device that graphs took, as far as its allocator says
    std::array<std::atomic<uint64_t>, static_cast<size_t>(Eager::count)> eager{};

    void count(Eager reason) { eager[static_cast<size_t>(reason)].fetch_add(1, std::memory_order_relaxed); }

    // Whether one of the two still may be done, and what keeps it from being done: the first worker that finds a reason
    // speaks for all.
    bool pads() const { return pads_.load(std::memory_order_relaxed); }
    bool replays_graphs() const { return graphs_.load(std::memory_order_relaxed); }
    void forbid_padding(const std::string& reason) { forbid(pads_, padding_note_, reason); }
    void forbid_graphs(const std::string& reason) { forbid(graphs_, graph_note_, reason); }
    // Graphs stay, but not all that there could be.
    void note_graphs(const std::string& text) {
        const std::lock_guard lock(mutex_);
        if (graph_note_.empty()) graph_note_ = text;
    }
    std::string padding_note() const { return read(padding_note_); }
    std::string graph_note() const { return read(graph_note_); }

    // Sizes that have been warmed up by some worker, in order.
    void add_size(size_t size) {
        const std::lock_guard lock(mutex_);
        const auto place = std::lower_bound(sizes_.begin(), sizes_.end(), size);
        if (place == sizes_.end() || *place != size) sizes_.insert(place, size);
    }
    std::vector<size_t> sizes() const {
        const std::lock_guard lock(mutex_);
        return sizes_;
    }

  private:
    void forbid(std::atomic<bool>& flag, std::string& note, const std::string& reason) {
        const std::lock_guard lock(mutex_);
        if (flag.exchange(false, std::memory_order_relaxed)) note = reason;
    }
    std::string read(const std::string& note) const {
        const std::lock_guard lock(mutex_);
        return note;
    }

    std::atomic<bool> pads_{true};
    std::atomic<bool> graphs_{true};
    mutable std::mutex mutex_;
    std::string padding_note_;
    std::string graph_note_;
    std::vector<size_t> sizes_;
};

}  // namespace pyserve
