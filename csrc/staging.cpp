#include "staging.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "clock.h"
#include "torch_model.h"

namespace pyserve {
namespace {

constexpr int64_t alignment = 64;  // bytes: a cache line, and what vectorised kernels like
// Two batches are on the device; a third one may be made ready meanwhile.
constexpr size_t slots_max = 3;
constexpr int64_t chunk_size = int64_t{4} << 20;  // bytes: what is gathered goes up while the rest is gathered
constexpr double seconds_per_ms = 1e-3;
// Between two looks at the device: a part of what was waited already, so that a short batch is noticed soon and a long
// one does not keep a core busy.
constexpr int64_t pause_min_ns = 5'000;
constexpr int64_t pause_max_ns = 200'000;
constexpr int64_t pauses_per_wait = 16;

int64_t aligned(int64_t size) { return (size + alignment - 1) / alignment * alignment; }

c10::impl::VirtualGuardImpl guard_of(at::Device device) { return c10::impl::VirtualGuardImpl(device.type()); }

std::vector<int64_t> batch_shape(const at::Tensor& item, size_t count) {
    std::vector<int64_t> shape = item.sizes().vec();
    shape[0] = static_cast<int64_t>(count);
    return shape;
}

// Whether kernels can read every tensor where it is. One that looks into a request's body may lie at any address.
bool is_usable(const Inputs& inputs) {
    for (const at::Tensor& tensor : inputs) {
        if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() != 0) return false;
    }
    return true;
}

bool overlaps(const at::Tensor& left, const at::Tensor& right) {
    if (!left.has_storage() || !right.has_storage()) return false;
    const auto* a = static_cast<const char*>(left.storage().data());
    const auto* b = static_cast<const char*>(right.storage().data());
    return a != nullptr && b != nullptr && a < b + right.storage().nbytes() && b < a + left.storage().nbytes();
}

// What a batch of `items` takes, each input of the host at an aligned place.
int64_t size_of(const std::vector<const Inputs*>& items) {
    int64_t size = 0;
    for (const at::Tensor& input : *items.front()) {
        if (input.device().is_cpu())
            size += aligned(static_cast<int64_t>(input.nbytes()) * static_cast<int64_t>(items.size()));
    }
    return size;
}

// A tensor of `like`'s kind in memory of a slot.
at::Tensor placed(const at::Tensor& bytes, int64_t at, at::IntArrayRef shape, const at::TensorOptions& like) {
    return at::from_blob(
        static_cast<char*>(bytes.data_ptr()) + at, shape, [](void*) {},
        like.device(bytes.device()).pinned_memory(false), bytes.device());
}

void gather_input(char* to, const std::vector<const Inputs*>& items, size_t position) {
    for (const Inputs* inputs : items) {
        const at::Tensor item = (*inputs)[position].contiguous();
        std::memcpy(to, item.data_ptr(), item.nbytes());
        to += item.nbytes();
    }
}

// Whether an output comes back through a slot.
bool is_leaving(const at::Tensor& tensor) { return !tensor.device().is_cpu() && tensor.layout() == at::kStrided; }

// Whether the device's events can tell times; else the host's clock has to do.
bool has_clock(const c10::Stream& stream) {
    try {
        const c10::DeviceType type = stream.device_type();
        c10::Event begin(type, c10::EventFlag::BACKEND_DEFAULT), end(type, c10::EventFlag::BACKEND_DEFAULT);
        begin.record(stream);
        end.record(stream);
        end.synchronize();
        begin.elapsedTime(end);
        return true;
    } catch (const c10::AcceleratorError&) {
        throw;  // of a device that is broken
    } catch (const c10::Error&) {
        return false;
    }
}

}  // namespace

Staging::Staging(at::Device device, int64_t size, LaneStats& stats, at::ScalarType lowered,
                 bool computes_on_default_stream)
    : device_(device), stats_(stats), lowered_(lowered), size_(size) {
    if (device.is_cpu()) {
        host_ = at::empty({size}, at::kByte);
        return;
    }
    const auto guard = guard_of(device);
    up_ = guard.getStreamFromGlobalPool(device);
    back_ = guard.getStreamFromGlobalPool(device);
    has_clock_ = has_clock(*up_);
    const auto flag = has_clock_ ? c10::EventFlag::BACKEND_DEFAULT : c10::EventFlag::PYTORCH_DEFAULT;
    for (size_t i = 0; i < slots_max; ++i) slots_.push_back(std::make_unique<Slot>(device.type(), flag));
    compute_ = computes_on_default_stream ? guard.getDefaultStream(device) : guard.getStreamFromGlobalPool(device);
}

// What the device may still work with is left alone for good.
Staging::~Staging() {
    for (std::unique_ptr<Slot>& slot : slots_) {
        try {
            if (slot->is_dirty) settle(*slot);
            drop(*slot);
        } catch (...) {
            slot.release();
        }
    }
}

bool Staging::has_room() const {
    return !is_async() || std::any_of(slots_.begin(), slots_.end(), [](const auto& slot) { return !slot->is_taken; });
}

void Staging::resize(int64_t size) {
    if (size == size_) return;
    if (!is_async()) {
        host_ = at::empty({size}, at::kByte);
        size_ = size;
        return;
    }
    gives_back_ = gives_back_ || size < size_;
    size_ = size;
    out_size_ = 0;
    ++generation_;
    for (const std::unique_ptr<Slot>& slot : slots_) {
        if (!slot->is_taken && !slot->is_dirty) drop(*slot);
    }
    give_back_pinned();
}

Staged Staging::gather_on_host(const std::vector<const Inputs*>& items) {
    Staged staged;
    const size_t count = items.size();
    if (count == 1 && is_usable(*items.front())) {
        staged.inputs = *items.front();  // nothing to gather, nowhere to copy
        return staged;
    }
    int64_t used = 0;
    for (size_t position = 0; position < items.front()->size(); ++position) {
        const at::Tensor& first = (*items.front())[position];
        const int64_t size = static_cast<int64_t>(first.nbytes()) * static_cast<int64_t>(count);
        const bool fits = used + size <= host_.numel();
        const at::Tensor bytes = fits ? host_.narrow(0, used, size) : at::empty({size}, at::kByte);
        if (fits) used += aligned(size);
        staged.is_fallback = staged.is_fallback || !fits;
        auto* to = static_cast<char*>(bytes.data_ptr());
        gather_input(to, items, position);
        staged.inputs.push_back(at::from_blob(to, batch_shape(first, count), [bytes](void*) {}, first.options()));
    }
    return staged;
}

Staged Staging::gather(const std::vector<const Inputs*>& items) {
    if (!is_async()) return gather_on_host(items);
    Staged staged;
    staged.slot.reset(&take());
    Slot& slot = *staged.slot;
    if (slot.is_dirty) settle(slot);
    const int64_t size = size_of(items);
    staged.is_fallback = size > size_;
    make_room(slot, size);
    slot.is_dirty = true;  // until it was collected
    slot.upload_begin.record(*up_);
    int64_t used = 0;
    int64_t sent = 0;
    for (size_t position = 0; position < items.front()->size(); ++position) {
        const at::Tensor& first = (*items.front())[position];
        if (!first.device().is_cpu()) {
            staged.inputs.push_back(joined(items, position).to(device_));  // from another one's, perhaps
            continue;
        }
        auto* to = static_cast<char*>(slot.in.data_ptr()) + used;
        staged.inputs.push_back(placed(slot.on_device, used, batch_shape(first, items.size()), first.options()));
        const auto item_size = static_cast<int64_t>(first.nbytes());
        for (const Inputs* inputs : items) {
            const at::Tensor item = (*inputs)[position].contiguous();
            std::memcpy(to, item.data_ptr(), static_cast<size_t>(item_size));
            to += item_size;
            used += item_size;
            if (used - sent >= chunk_size) upload(slot, std::exchange(sent, used), used);
        }
        used = aligned(used);
    }
    if (used > sent) upload(slot, sent, used);
    slot.uploaded.record(*up_);
    slot.uploaded.block(*compute_);
    slot.compute_begin.record(*compute_);
    return staged;
}

// Of inputs that are on a device: on the stream that computes, which waits for what makes them.
at::Tensor Staging::joined(const std::vector<const Inputs*>& items, size_t position) const {
    const at::Tensor& first = (*items.front())[position];
    at::Tensor batch = at::empty(batch_shape(first, items.size()), first.options().device(device_));
    for (size_t i = 0; i < items.size(); ++i) {
        batch.narrow(0, static_cast<int64_t>(i), 1).copy_((*items[i])[position], /*non_blocking=*/true);
    }
    return batch;
}

void Staging::upload(Slot& slot, int64_t from, int64_t to) {
    const c10::StreamGuard guard(*up_);
    const int64_t size = std::min(to, slot.in.numel()) - from;
    slot.on_device.narrow(0, from, size).copy_(slot.in.narrow(0, from, size), /*non_blocking=*/slot.is_in_pinned);
    if (!slot.is_in_pinned) stats_.pageable_copies.fetch_add(1, std::memory_order_relaxed);
}

// In turn; one that the device has to be waited for only if there is no other.
Slot& Staging::take() {
    Slot* found = nullptr;
    for (size_t i = 0; i < slots_.size() && (found == nullptr || found->is_dirty); ++i) {
        Slot* slot = slots_[(next_slot_ + i) % slots_.size()].get();
        if (!slot->is_taken && (found == nullptr || !slot->is_dirty)) found = slot;
    }
    TORCH_INTERNAL_ASSERT(found != nullptr, "no slot is free");
    next_slot_ = (next_slot_ + 1) % slots_.size();
    found->is_taken = true;
    return *found;
}

// A batch ended half-way in this slot: waits until the device has done with all that it was given.
void Staging::settle(Slot& slot) {
    for (const auto& [event, stream] :
         {std::pair{&slot.uploaded, &*up_}, std::pair{&slot.computed, &*compute_}, std::pair{&slot.ready, &*back_}}) {
        event->record(*stream);
        wait_until([&, event = event] { return event->query(); });
    }
    slot.is_dirty = false;
}

// Memory for a batch of `size` bytes. Nothing of the slot is in use.
void Staging::make_room(Slot& slot, int64_t size) {
    const bool is_current = slot.in.defined() && slot.generation == generation_;
    if (is_current && slot.in.numel() >= size) return;
    const int64_t capacity = std::max(size_, size);
    if (is_current) stats_.slots_grown.fetch_add(1, std::memory_order_relaxed);
    drop(slot);
    {
        const c10::StreamGuard guard(*up_);
        slot.on_device = at::empty({capacity}, at::TensorOptions().dtype(at::kByte).device(device_));
    }
    stats_.slot_bytes.fetch_add(capacity, std::memory_order_relaxed);
    slot.in = host_bytes(capacity, slot.is_in_pinned);
    slot.generation = generation_;
    give_back_pinned();
}

void Staging::make_out_room(Slot& slot, int64_t size) {
    out_size_ = std::max(out_size_, size);
    if (size == 0 || (slot.out.defined() && slot.out.numel() >= size)) return;
    free_host_bytes(slot.out, slot.is_out_pinned);
    slot.out = host_bytes(out_size_, slot.is_out_pinned);
}

void Staging::equip() {
    int64_t largest = size_;
    for (const std::unique_ptr<Slot>& slot : slots_) {
        if (slot->in.defined() && slot->generation == generation_) largest = std::max(largest, slot->in.numel());
    }
    size_t left = slots_.size();
    std::erase_if(slots_, [&](const std::unique_ptr<Slot>& slot) {
        if (slot->is_taken || slot->is_dirty) return false;
        try {
            make_room(*slot, largest);
            make_out_room(*slot, out_size_);
        } catch (const c10::OutOfMemoryError&) {
            return left-- > 1;  // fewer batches at once
        }
        return false;
    });
}

void Staging::drop(Slot& slot) {
    if (slot.on_device.defined()) {
        stats_.slot_bytes.fetch_sub(slot.on_device.numel(), std::memory_order_relaxed);
        slot.on_device = at::Tensor();
    }
    free_host_bytes(slot.in, slot.is_in_pinned);
    free_host_bytes(slot.out, slot.is_out_pinned);
}

// After slots became smaller: torch keeps page-locked memory that it was given back. Once no slot has the old size.
void Staging::give_back_pinned() {
    if (!gives_back_) return;
    for (const std::unique_ptr<Slot>& slot : slots_) {
        if (slot->in.defined() && slot->generation != generation_) return;
    }
    gives_back_ = false;
    at::getHostAllocator(device_.type())->empty_cache();
}

// Page-locked, or plain where the host has no more of that.
at::Tensor Staging::host_bytes(int64_t size, bool& is_pinned) {
    is_pinned = false;
    try {
        at::HostAllocator* allocator = at::getHostAllocator(device_.type());
        auto owner = std::make_shared<at::DataPtr>(allocator->allocate(static_cast<size_t>(size)));
        at::Tensor bytes = at::from_blob(owner->get(), {size}, [owner](void*) {}, at::TensorOptions().dtype(at::kByte));
        is_pinned = true;
        stats_.pinned_bytes.fetch_add(size, std::memory_order_relaxed);
        return bytes;
    } catch (const c10::Error&) {
        // A device that is broken says so at the next call of it.
        stats_.pinned_refused.fetch_add(1, std::memory_order_relaxed);
        return at::empty({size}, at::kByte);
    }
}

void Staging::free_host_bytes(at::Tensor& bytes, bool is_pinned) {
    if (!bytes.defined()) return;
    if (is_pinned) stats_.pinned_bytes.fetch_sub(bytes.numel(), std::memory_order_relaxed);
    bytes = at::Tensor();
}

void Staging::fetch_on_host(Staged& staged) const {
    staged.output = map_tensors(staged.output, [&](const at::Tensor& tensor) {
        // A model may hand back its input or a view of it; the slot and the request's body are used again.
        for (const at::Tensor& input : staged.inputs) {
            if (overlaps(tensor, input)) return tensor.clone();
        }
        return tensor;
    });
}

void Staging::fetch(Staged& staged) {
    if (!is_async()) return fetch_on_host(staged);
    Slot& slot = *staged.slot;
    int64_t size = 0;
    map_tensors(staged.output, [&](const at::Tensor& tensor) {
        if (!is_leaving(tensor)) return tensor;
        // Here and not on the way, which only copies.
        staged.leaving.push_back(tensor.resolve_conj().resolve_neg().contiguous());
        size += aligned(static_cast<int64_t>(tensor.numel() * tensor.element_size()));
        return tensor;
    });
    slot.computed.record(*compute_);
    slot.computed.block(*back_);
    make_out_room(slot, size);
    const c10::StreamGuard guard(*back_);
    int64_t used = 0;
    for (const at::Tensor& tensor : staged.leaving) {
        const int64_t bytes = static_cast<int64_t>(tensor.nbytes());
        if (bytes == 0) {
            staged.fetched.push_back(at::empty(tensor.sizes(), tensor.options().device(at::kCPU)));
            continue;
        }
        staged.fetched.push_back(placed(slot.out, used, tensor.sizes(), tensor.options()));
        staged.fetched.back().copy_(tensor, /*non_blocking=*/slot.is_out_pinned);
        if (!slot.is_out_pinned) stats_.pageable_copies.fetch_add(1, std::memory_order_relaxed);
        used += aligned(bytes);
    }
    slot.ready.record(*back_);
}

bool Staging::wait_until(const std::function<bool()>& is_over, const std::function<bool()>& is_enough) const {
    const int64_t begin = SteadyClock::now_ns();
    while (!is_over()) {
        const int64_t waited = SteadyClock::now_ns() - begin;
        std::this_thread::sleep_for(
            std::chrono::nanoseconds(std::clamp(waited / pauses_per_wait, pause_min_ns, pause_max_ns)));
        if (is_enough && is_enough()) return is_over();
    }
    return true;
}

bool Staging::wait(const Staged& staged, const std::function<bool()>& is_enough) const {
    return !staged.slot || wait_until([&] { return is_ready(staged); }, is_enough);
}

void Staging::collect(Staged& staged) {
    if (!staged.slot) return;
    measure(staged);
    size_t next = 0;
    staged.output = map_tensors(staged.output, [&](const at::Tensor& tensor) {
        if (is_leaving(tensor)) return plain_copy(staged.fetched[next++]);
        return tensor.layout() == at::kStrided ? plain_copy(tensor) : tensor.cpu();
    });
    staged.leaving.clear();
    staged.fetched.clear();
    staged.inputs.clear();
    staged.slot->is_dirty = false;
    staged.slot.reset();
}

// Memory of its own, not page-locked. Numbers of a lower precision have come so far as they are.
at::Tensor Staging::plain_copy(const at::Tensor& tensor) const {
    if (lowered_ != at::kFloat && tensor.scalar_type() == lowered_) return tensor.to(at::kFloat);
    if (!tensor.is_contiguous() || tensor.is_conj() || tensor.is_neg()) return tensor.clone();
    at::Tensor copy = at::empty(tensor.sizes(), at::TensorOptions().dtype(tensor.dtype()));
    if (tensor.nbytes() > 0) std::memcpy(copy.data_ptr(), tensor.data_ptr(), tensor.nbytes());
    return copy;
}

void Staging::measure(Staged& staged) {
    if (!has_clock_) return;
    Slot& slot = *staged.slot;
    DeviceTimes& times = staged.times.emplace();
    times.upload = slot.upload_begin.elapsedTime(slot.uploaded) * seconds_per_ms;
    times.compute = slot.compute_begin.elapsedTime(slot.computed) * seconds_per_ms;
    times.fetch = slot.computed.elapsedTime(slot.ready) * seconds_per_ms;
    if (last_computed_) {
        times.gap = std::max(0.0, last_computed_->elapsedTime(slot.compute_begin) * seconds_per_ms);
        std::swap(*last_computed_, slot.computed);
    } else {
        last_computed_ = std::exchange(slot.computed, c10::Event(device_.type(), c10::EventFlag::BACKEND_DEFAULT));
    }
}

}  // namespace pyserve
