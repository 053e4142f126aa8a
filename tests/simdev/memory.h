// Device memory, and an allocator that keeps what is freed.
//
// The memory is one file that is mapped twice: tensors hold addresses of a mapping without any rights, so that a host
// that touches them ends at once; kernels use the other mapping.
#pragma once

#include <c10/core/CachingDeviceAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <set>

#include "guard.h"

namespace simdev {

constexpr size_t arena_size = size_t{4} << 30;  // of one device; sparse
constexpr size_t block_size_unit = 512;

struct Arena {
    char* device;  // without rights
    char* shadow;  // what kernels use

    Arena() {
        constexpr size_t size = arena_size * device_count_max;
        const int fd = memfd_create("simdev", MFD_CLOEXEC);
        TORCH_CHECK(fd >= 0 && ftruncate(fd, size) == 0, "simdev: no memory file");
        void* none = mmap(nullptr, size, PROT_NONE, MAP_SHARED | MAP_NORESERVE, fd, 0);
        void* both = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
        TORCH_CHECK(none != MAP_FAILED && both != MAP_FAILED, "simdev: no address space");
        close(fd);
        device = static_cast<char*>(none);
        shadow = static_cast<char*>(both);
    }
    bool owns(const void* pointer) const {
        return pointer >= device && pointer < device + arena_size * device_count_max;
    }
    int device_of(const void* pointer) const {
        return static_cast<int>(static_cast<size_t>(static_cast<const char*>(pointer) - device) / arena_size);
    }
};
inline Arena& arena() {
    static auto* arena = new Arena;
    return *arena;
}
inline void* shadow_of(const void* pointer) {
    if (pointer == nullptr) return nullptr;
    TORCH_CHECK(arena().owns(pointer), "simdev: not device memory");
    return arena().shadow + (static_cast<const char*>(pointer) - arena().device);
}

// What the "driver" has left of one device: places that touch are one.
class Holes {
  public:
    Holes() { holes_[0] = arena_size; }

    int64_t take(size_t size) {  // where; -1: no room
        for (auto at = holes_.begin(); at != holes_.end(); ++at) {
            if (at->second < size) continue;
            const size_t begin = at->first, left = at->second - size;
            holes_.erase(at);
            if (left > 0) holes_[begin + size] = left;
            return static_cast<int64_t>(begin);
        }
        return -1;
    }
    void give(size_t begin, size_t size) {
        auto after = holes_.lower_bound(begin);
        if (after != holes_.end() && begin + size == after->first) {
            size += after->second;
            after = holes_.erase(after);
        }
        if (after != holes_.begin()) {
            const auto before = std::prev(after);
            if (before->first + before->second == begin) {
                before->second += size;
                return;
            }
        }
        holes_[begin] = size;
    }

  private:
    std::map<size_t, size_t> holes_;
};

// What is freed goes to the stream it was allocated on, and may be given out again there at once, since that stream's
// tasks are in order; for other streams it must have been recorded. Freed memory is filled with `poison`.
class Allocator final : public c10::DeviceAllocator {
  public:
    c10::DataPtr allocate(size_t size) override {
        const int device = current_device;
        begin_use();
        check_broken(device);
        ++state_of(device).allocations;
        if (state_of(device).failing_allocations.strikes()) {
            ++stats_[device].num_ooms;
            out_of_memory(size, device);
        }
        const size_t rounded = (std::max<size_t>(size, 1) + block_size_unit - 1) / block_size_unit * block_size_unit;
        Block* block = nullptr;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            block = take(rounded, device);
        }
        if (block == nullptr) {
            ++stats_[device].num_alloc_retries;
            emptyCache({0, 0});
            const std::lock_guard<std::mutex> lock(mutex_);
            block = take(rounded, device);
        }
        if (block == nullptr) {
            ++stats_[device].num_ooms;
            out_of_memory(size, device);
        }
        const std::lock_guard<std::mutex> lock(mutex_);
        change(stats_[device].allocation, 1);
        change(stats_[device].allocated_bytes, static_cast<int64_t>(block->size));
        change(stats_[device].requested_bytes, static_cast<int64_t>(size));
        block->requested = size;
        return {block->pointer, block, &Allocator::free, simdev::device_of(device)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
    void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "simdev: copy_data"); }
    bool initialized() override { return user == getpid(); }

    // Waits for the streams whose memory goes, as freeing does on a real device.
    void emptyCache(c10::MempoolId_t) override {
        check_capture("free memory", true);
        std::vector<Block*> gone;
        std::vector<FencePtr> fences;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            reclaim(true);
            for (auto& [place, blocks] : free_) {
                if (place.second < 0 && pools_.count(-place.second) != 0) continue;  // of a graph that is alive
                if (!blocks.empty() && place.second >= 0)
                    fences.push_back(fence_beside_captures(stream_of(place.first, place.second)));
                gone.insert(gone.end(), blocks.begin(), blocks.end());
                blocks.clear();
            }
        }
        for (const FencePtr& fence : fences) fence->wait();
        const std::lock_guard<std::mutex> lock(mutex_);
        for (Block* block : gone) {
            Stats& stats = stats_[block->device];
            change(stats.segment, -1);
            change(stats.reserved_bytes, -static_cast<int64_t>(block->size));
            ++stats.num_device_free;
            const auto offset = static_cast<size_t>(block->pointer - arena().device);
            holes_[block->device].give(offset - static_cast<size_t>(block->device) * arena_size, block->size);
            delete block;
        }
    }
    void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
        auto* block = static_cast<Block*>(data.get_context());
        if (block == nullptr || data.get_deleter() != &Allocator::free) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        if (stream.id() != block->stream) block->used_on.insert(stream.id());
    }

    using Stats = c10::CachingDeviceAllocator::DeviceStats;
    Stats getDeviceStats(c10::DeviceIndex device) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        return stats_.at(static_cast<size_t>(device));
    }
    void resetAccumulatedStats(c10::DeviceIndex device) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        Stats& stats = stats_.at(static_cast<size_t>(device));
        for (auto* each : arrays(stats)) (*each)[0].reset_accumulated();
        stats.num_alloc_retries = stats.num_ooms = stats.num_device_alloc = stats.num_device_free = 0;
    }
    void resetPeakStats(c10::DeviceIndex device) override {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (auto* each : arrays(stats_.at(static_cast<size_t>(device)))) (*each)[0].reset_peak();
    }
    std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex given) override {
        const int device = index_of({device_type, given});
        check_broken(device);
        const int64_t total = state_of(device).memory_max;
        const std::lock_guard<std::mutex> lock(mutex_);
        const int64_t left = std::max<int64_t>(0, total - stats_[device].reserved_bytes[0].current);
        return {static_cast<size_t>(left), static_cast<size_t>(total)};
    }

    void hold_pool(int64_t pool) {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++pools_[pool];
    }
    void let_pool_go(int64_t pool) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (--pools_[pool] == 0) pools_.erase(pool);
    }

  private:
    struct Block {
        char* pointer;
        size_t size, requested;
        int device;
        int64_t stream;  // negative: of the pool of graphs
        std::set<int64_t> used_on;
    };

    static void free(void* context);

    static std::array<c10::CachingAllocator::StatArray*, 5> arrays(Stats& stats) {
        return {&stats.allocation, &stats.segment, &stats.allocated_bytes, &stats.reserved_bytes,
                &stats.requested_bytes};
    }
    static void change(c10::CachingAllocator::StatArray& array, int64_t amount) {
        if (amount >= 0)
            array[0].increase(static_cast<size_t>(amount));
        else
            array[0].decrease(static_cast<size_t>(-amount));
    }

    // In the order of its own stream, after what was queued there: what reads it elsewhere, unrecorded, sees this.
    static void wipe(const Block* block) {
        const auto fill = [at = shadow_of(block->pointer), size = block->size] { std::memset(at, poison, size); };
        queue_of(stream_of(block->device, block->stream)).push({event, "free", fill});
    }

    [[noreturn]] static void out_of_memory(size_t size, int device) {
        throw c10::OutOfMemoryError(
            {__func__, __FILE__, static_cast<uint32_t>(__LINE__)},
            c10::str("simdev out of memory. Tried to allocate ", size, " bytes. Device ", device,
                     " has a total capacity of ", state_of(device).memory_max.load(), " bytes."));
    }

    Block* take(size_t size, int device) {
        reclaim(false);
        int64_t stream = current_streams[device];
        if (const Recording* recording = recording_on(current_stream(device))) stream = -recording->pool;
        auto& own = free_[{device, stream}];
        for (auto at = own.rbegin(); at != own.rend(); ++at) {  // the one freed last: reuse as early as can be
            if ((*at)->size != size) continue;
            Block* block = *at;
            own.erase(std::next(at).base());
            return block;
        }
        check_capture("allocate memory", true);
        Stats& stats = stats_[device];
        if (stats.reserved_bytes[0].current + static_cast<int64_t>(size) > state_of(device).memory_max) return nullptr;
        const int64_t begin = holes_[device].take(size);
        if (begin < 0) return nullptr;
        change(stats.segment, 1);
        change(stats.reserved_bytes, static_cast<int64_t>(size));
        ++stats.num_device_alloc;
        return new Block{arena().device + device * arena_size + begin, size, size, device, stream, {}};
    }

    // Other streams that used it may do so until their fence.
    void await_streams(Block* block) {
        std::vector<FencePtr> fences;
        for (const int64_t stream : block->used_on) {
            fences.push_back(fence_beside_captures(stream_of(block->device, stream)));
        }
        block->used_on.clear();
        pending_.emplace_back(block, std::move(fences));
    }

    // Takes back what other streams are done with.
    void reclaim(bool waits_for) {
        if (recordings_count == 0) {
            for (Block* block : std::exchange(deferred_, {})) await_streams(block);
        }
        for (auto at = pending_.begin(); at != pending_.end();) {
            bool is_over = true;
            for (const FencePtr& fence : at->second) {
                if (waits_for) fence->wait();
                is_over = is_over && fence->query();
            }
            if (!is_over) {
                ++at;
                continue;
            }
            wipe(at->first);
            free_[{at->first->device, at->first->stream}].push_back(at->first);
            at = pending_.erase(at);
        }
    }

    std::mutex mutex_;
    std::map<std::pair<int, int64_t>, std::vector<Block*>> free_;
    std::vector<std::pair<Block*, std::vector<FencePtr>>> pending_;
    std::vector<Block*> deferred_;  // freed while there was a capture, whose stream may have used them
    std::array<Holes, device_count_max> holes_;
    std::array<Stats, device_count_max> stats_;
    std::map<int64_t, int> pools_;  // graphs that use them
};
inline Allocator& allocator() {
    static auto* allocator = new Allocator;
    return *allocator;
}

inline void Allocator::free(void* context) {
    auto* block = static_cast<Block*>(context);
    Allocator& self = allocator();
    const std::lock_guard<std::mutex> lock(self.mutex_);
    Stats& stats = self.stats_[static_cast<size_t>(block->device)];
    change(stats.allocation, -1);
    change(stats.allocated_bytes, -static_cast<int64_t>(block->size));
    change(stats.requested_bytes, -static_cast<int64_t>(block->requested));
    if (block->stream < 0) {  // of a captured graph, whose replays need it
        self.free_[{block->device, block->stream}].push_back(block);
        return;
    }
    if (strict_free && !block->used_on.empty()) check_broken(block->device);
    if (block->used_on.empty()) {
        wipe(block);
        self.free_[{block->device, block->stream}].push_back(block);
    } else if (recordings_count != 0) {
        self.deferred_.push_back(block);  // as CUDA's allocator does
    } else {
        self.await_streams(block);
    }
}

inline void GuardImpl::recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const {
    allocator().recordStream(data, stream);
}

}  // namespace simdev
