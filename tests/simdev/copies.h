// Tensors made on the device, views of them, and copies.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>

#include "pinned.h"

namespace simdev {

// Where numbers lie, without holding the memory: what is freed or filled again too early gives wrong numbers.
struct Place {
    void* pointer;
    std::vector<int64_t> sizes, strides;
    at::ScalarType dtype;
    bool is_on_device, is_conj, is_neg;

    explicit Place(const at::Tensor& tensor)
        : pointer(tensor.is_privateuseone() ? shadow_of(tensor.data_ptr()) : tensor.data_ptr()),
          sizes(tensor.sizes().vec()), strides(tensor.strides().vec()), dtype(tensor.scalar_type()),
          is_on_device(tensor.is_privateuseone()), is_conj(tensor.is_conj()), is_neg(tensor.is_neg()) {}
    at::Tensor view() const {
        if (pointer == nullptr) return at::empty_strided(sizes, strides, at::TensorOptions().dtype(dtype));
        at::Tensor view = at::from_blob(pointer, sizes, strides, at::TensorOptions().dtype(dtype));
        if (is_conj) view = at::_conj(view);
        return is_neg ? at::_neg_view(view) : view;
    }
};

inline at::Tensor empty_memory_format(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype,
                                      std::optional<c10::Layout>, std::optional<c10::Device> device,
                                      std::optional<bool>, std::optional<c10::MemoryFormat> format) {
    const c10::DeviceGuard guard(device_of(index_of(device.value_or(c10::Device(device_type)))));
    return at::detail::empty_generic(size, &allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                     c10::dtype_or_default(dtype), format);
}

inline at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                                std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
    const c10::DeviceGuard guard(device_of(index_of(device.value_or(c10::Device(device_type)))));
    return at::detail::empty_strided_generic(
        size, stride, &allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

inline at::Tensor empty_on(int device, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                           at::ScalarType dtype) {
    return empty_strided(sizes, strides, dtype, {}, device_of(device), {});
}

inline at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                             std::optional<c10::SymInt> given) {
    std::optional<int64_t> offset;
    if (given) offset = given->expect_int();
    return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                             offset);
}
inline at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
    return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}
inline at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
    return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
inline void record_stream(at::Tensor& self, at::Stream stream) {
    allocator().recordStream(self.storage().data_ptr(), stream);
}

// On the current stream of the target's device, which the source's current stream waits for and is waited for by.
inline void copy_within(const at::Tensor& from, const at::Tensor& to, std::function<void()> copy) {
    const c10::Stream stream = current_stream(to.device().index());
    const c10::Stream other = current_stream(from.device().index());
    const bool is_between = stream.device_index() != other.device_index();
    if (is_between) submit(stream, {event, "wait", [fence = fence_on(other)] { fence->wait(); }});
    submit(stream, {d2d, "copy", std::move(copy)});
    if (is_between) submit(other, {event, "wait", [fence = fence_on(stream)] { fence->wait(); }});
}

inline at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
    const bool is_up = to.is_privateuseone();
    const int device = (is_up ? to : self).device().index();
    check_broken(device);
    if (to.numel() == 0) return to;
    const at::Tensor source = self.expand_as(to);
    const c10::Stream stream = current_stream(device);
    auto copy = [from = Place(source), target = Place(to)] { target.view().copy_(from.view()); };
    DeviceState& state = state_of(device);
    ++state.launches;
    if (self.is_privateuseone() && is_up) {
        copy_within(source, to, copy);
        return to;
    }
    const at::Tensor& host = is_up ? source : to;
    const Kind kind = is_up ? h2d : d2h;
    (is_up ? state.h2d_bytes : state.d2h_bytes) += static_cast<int64_t>(to.nbytes());
    if (non_blocking && is_pinned(host.data_ptr())) {
        // What the host reads before the copy is over is wrong.
        if (!is_up && to.is_non_overlapping_and_dense()) std::memset(to.data_ptr(), poison, to.nbytes());
        submit(stream, {kind, "copy", copy});
        host_allocator.record_event(host.data_ptr(), host.storage().data_ptr().get_context(), stream);
        return to;
    }
    ++(is_up ? state.pageable_h2d : state.pageable_d2h);
    check_capture("copy from or to pageable memory");
    check_not_capturing(stream, "copy from or to pageable memory");
    queue_of(stream).push({kind, "pageable copy", copy});
    drain(stream);
    return to;
}

inline at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
    if (!to.sizes().equals(self.sizes())) at::native::resize_(to, self.sizes());
    return copy_from(self, to, false);
}

}  // namespace simdev
