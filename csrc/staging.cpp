#include "staging.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstring>
#include <utility>

#include "torch_model.h"

namespace pyserve {
namespace {

constexpr int64_t alignment = 64;  // bytes: a cache line, and what vectorised kernels like

int64_t aligned(int64_t size) { return (size + alignment - 1) / alignment * alignment; }

c10::impl::VirtualGuardImpl guard_of(at::Device device) { return c10::impl::VirtualGuardImpl(device.type()); }

at::Tensor pinned_bytes(at::Device device, int64_t size) {
    at::HostAllocator* allocator = at::getHostAllocator(device.type());
    auto owner = std::make_shared<at::DataPtr>(allocator->allocate(static_cast<size_t>(size)));
    return at::from_blob(owner->get(), {size}, [owner](void*) {}, at::TensorOptions().dtype(at::kByte));
}

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

}  // namespace

Staging::Staging(at::Device device, int64_t slot_size) : device_(device) {
    if (device.is_cpu()) {
        slots_[0].bytes = at::empty({slot_size}, at::kByte);
        return;
    }
    const auto guard = guard_of(device);
    copy_stream_ = guard.getStreamFromGlobalPool(device);
    compute_stream_ = guard.getStreamFromGlobalPool(device);
    for (Slot& slot : slots_) slot.bytes = pinned_bytes(device, slot_size);
}

at::Tensor Staging::take_bytes(Slot& slot, int64_t& used, int64_t size, bool& is_fallback) const {
    if (used + size <= slot.bytes.numel()) {
        const at::Tensor bytes = slot.bytes.narrow(0, used, size);
        used += aligned(size);
        return bytes;
    }
    is_fallback = true;
    return at::empty({size}, at::kByte);
}

Staged Staging::gather(const std::vector<const Inputs*>& items) {
    Staged staged;
    const size_t count = items.size();
    if (count == 1 && device_.is_cpu() && is_usable(*items.front())) {
        staged.inputs = *items.front();  // nothing to gather, nowhere to copy
        return staged;
    }
    Slot& slot = slots_[is_async() ? next_slot_ : 0];
    next_slot_ = (next_slot_ + 1) % slots_.size();
    if (slot.copied) slot.copied->synchronize();
    int64_t used = 0;
    for (size_t position = 0; position < items.front()->size(); ++position) {
        const at::Tensor& first = (*items.front())[position];
        const auto item_size = static_cast<int64_t>(first.nbytes());
        const at::Tensor bytes = take_bytes(slot, used, item_size * static_cast<int64_t>(count), staged.is_fallback);
        auto* to = static_cast<char*>(bytes.data_ptr());
        for (size_t i = 0; i < count; ++i) {
            const at::Tensor item = (*items[i])[position].contiguous();
            std::memcpy(to + static_cast<int64_t>(i) * item_size, item.data_ptr(), static_cast<size_t>(item_size));
        }
        at::Tensor batch = at::from_blob(to, batch_shape(first, count), [bytes](void*) {}, first.options());
        staged.inputs.push_back(is_async() ? to_device(batch) : std::move(batch));
    }
    if (is_async()) {
        slot.copied.emplace(device_.type());
        slot.copied->record(*copy_stream_);
        slot.copied->block(*compute_stream_);
    }
    return staged;
}

at::Tensor Staging::to_device(const at::Tensor& host) {
    const auto guard = guard_of(device_);
    const c10::Stream previous = guard.exchangeStream(*copy_stream_);
    at::Tensor on_device = at::empty(host.sizes(), host.options().device(device_));
    on_device.copy_(host, /*non_blocking=*/true);
    guard.exchangeStream(previous);
    // It belongs to the copy stream; its memory must not be given out again while the compute stream reads it.
    on_device.record_stream(*compute_stream_);
    return on_device;
}

void Staging::fetch(Staged& staged) {
    if (!is_async()) {
        staged.output = map_tensors(staged.output, [&](const at::Tensor& tensor) {
            // A model may hand back its input or a view of it; the slot and the request's body are used again.
            for (const at::Tensor& input : staged.inputs) {
                if (overlaps(tensor, input)) return tensor.clone();
            }
            return tensor;
        });
        return;
    }
    staged.output = map_tensors(staged.output, [&](const at::Tensor& tensor) {
        if (tensor.device().is_cpu()) return tensor;
        at::Tensor host = at::empty(tensor.sizes(), tensor.options().device(at::kCPU).pinned_memory(true));
        host.copy_(tensor, /*non_blocking=*/true);
        return host;
    });
    staged.ready.emplace(device_.type());
    staged.ready->record(*compute_stream_);
}

void Staging::wait(Staged& staged) {
    if (staged.ready) staged.ready->synchronize();
}

Staging::ComputeScope::ComputeScope(const Staging& staging) {
    if (!staging.is_async()) return;
    previous_ = guard_of(staging.device_).exchangeStream(*staging.compute_stream_);
}

Staging::ComputeScope::~ComputeScope() {
    if (previous_) guard_of(previous_->device()).exchangeStream(*previous_);
}

}  // namespace pyserve
