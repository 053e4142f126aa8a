// Operators run on the CPU's kernels. The first time that one is seen with such arguments the host waits, to see what
// comes out; from then on it is queued, as a launch is on a real device.
#pragma once

#include <torch/library.h>

#include <unordered_map>

#include "call.h"

namespace simdev {

// What an operator gives for arguments of certain shapes.
struct Out {
    int argument = -1;  // it is this tensor among the arguments; -1: new
    std::vector<int64_t> sizes, strides;
    at::ScalarType dtype = at::kFloat;
};
inline std::mutex known_mutex;
inline std::unordered_map<std::string, std::vector<Out>> known;

inline std::optional<std::vector<Out>> known_of(const Call& call) {
    if (call.depends_on_data) return std::nullopt;
    const std::lock_guard<std::mutex> lock(known_mutex);
    const auto at = known.find(call.key);
    if (at == known.end()) return std::nullopt;
    return at->second;
}

inline std::vector<at::Tensor> launch(const std::shared_ptr<Call>& call, const std::vector<Out>& outs,
                                      const c10::Stream& stream) {
    const std::vector<at::Tensor> tensors = call->take_tensors();
    std::vector<at::Tensor> results;
    std::vector<std::optional<Place>> targets;
    for (const Out& out : outs) {
        if (out.argument >= 0) {
            results.push_back(tensors[static_cast<size_t>(out.argument)]);
            targets.emplace_back();
        } else {
            results.push_back(empty_on(call->device, out.sizes, out.strides, out.dtype));
            targets.emplace_back(Place(results.back()));
        }
    }
    submit(stream, {op, call->op.operator_name().name, [call, targets] {
                        std::vector<at::Tensor> views;
                        const std::vector<c10::IValue> got = call->run(views);
                        for (size_t i = 0; i < targets.size(); ++i) {
                            if (targets[i]) targets[i]->view().copy_(got[i].toTensor());
                        }
                    }});
    return results;
}

// A first call: what came out, put on the device.
class FirstCall {
  public:
    FirstCall(const Call& call, const c10::Stream& stream) : call_(call), stream_(stream) {
        check_capture("an operator that waits");
        check_not_capturing(stream, "an operator that waits");
        std::string problem;
        queue_of(stream).push({op, call.op.operator_name().name, [&] {
                                   try {
                                       got_ = call.run(views_);
                                   } catch (const std::exception& error) {
                                       problem = error.what();  // of the arguments, as a launch says at once
                                   }
                               }});
        drain(stream);
        if (!problem.empty()) throw std::runtime_error(problem);
        is_learned_ = !call.depends_on_data;
        for (const c10::IValue& value : got_) results_.push_back(result_of(value));
    }

    std::vector<c10::IValue>& results() { return results_; }
    void learn() const {
        static const std::set<std::string> by_data{
            "aten::nonzero",  "aten::masked_select",     "aten::_unique2",    "aten::unique_dim",
            "aten::bincount", "aten::repeat_interleave", "aten::multinomial", "aten::unique_consecutive"};
        if (!is_learned_ || by_data.count(call_.op.operator_name().name) != 0) return;
        const std::lock_guard<std::mutex> lock(known_mutex);
        known.emplace(call_.key, outs_);
    }

  private:
    c10::IValue result_of(const c10::IValue& value) {
        if (value.isTensor()) {
            is_learned_ = is_learned_ && value.toTensor().defined();
            return value.toTensor().defined() ? on_device(value.toTensor()) : at::Tensor();
        }
        is_learned_ = false;
        if (!value.isTensorList()) return value;
        std::vector<at::Tensor> list;
        for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(on_device(tensor));
        return list;
    }

    at::Tensor on_device(const at::Tensor& tensor) {
        for (size_t i = 0; i < views_.size(); ++i) {
            if (tensor.unsafeGetTensorImpl() == views_[i].unsafeGetTensorImpl()) return argument(i, tensor);
        }
        for (size_t i = 0; i < views_.size(); ++i) {
            const auto* from = static_cast<const char*>(views_[i].storage().data());
            const auto* at = static_cast<const char*>(tensor.data_ptr());
            if (tensor.numel() == 0 || at < from || at >= from + views_[i].storage().nbytes()) continue;
            is_learned_ = false;  // a view of an argument
            return alias(call_.tensors[i], tensor, at - from);
        }
        outs_.push_back({-1, tensor.sizes().vec(), tensor.strides().vec(), tensor.scalar_type()});
        return copied(tensor);
    }

    // What `tensor` is of the kernel's memory, `size` bytes after its begin, of the memory of `whole`. May be of another
    // dtype.
    static at::Tensor alias(const at::Tensor& whole, const at::Tensor& tensor, std::ptrdiff_t size) {
        at::Tensor view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(whole.storage()),
                                                                   whole.key_set(), tensor.dtype());
        const int64_t begin = whole.storage_offset() * whole.element_size() + static_cast<int64_t>(size);
        view.unsafeGetTensorImpl()->set_storage_offset(begin / tensor.element_size());
        view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
        return view;
    }

    at::Tensor argument(size_t i, const at::Tensor& tensor) {
        outs_.push_back({static_cast<int>(i), {}, {}, at::kFloat});
        const at::Tensor& target = call_.tensors[i];
        if (!target.sizes().equals(tensor.sizes())) {  // an `out` that was made to fit
            is_learned_ = false;
            const at::Tensor fresh = copied(tensor);
            target.unsafeGetTensorImpl()->set_storage_keep_dtype(fresh.storage());
            target.unsafeGetTensorImpl()->set_sizes_and_strides(fresh.sizes(), fresh.strides());
        }
        return target;
    }

    at::Tensor copied(const at::Tensor& tensor) {
        at::Tensor result = empty_on(call_.device, tensor.sizes().vec(), tensor.strides().vec(), tensor.scalar_type());
        if (tensor.numel() > 0) {
            queue_of(stream_).push({d2d, "result", [to = Place(result), tensor] { to.view().copy_(tensor); }});
        }
        return result;
    }

    const Call& call_;
    const c10::Stream stream_;
    std::vector<c10::IValue> got_, results_;
    std::vector<at::Tensor> views_;
    std::vector<Out> outs_;
    bool is_learned_ = false;
};

inline void call_on_device(const c10::OperatorHandle& asked, const c10::OperatorHandle& runs,
                           torch::jit::Stack* stack) {
    const size_t count = asked.schema().arguments().size();
    const auto call = std::make_shared<Call>(asked, runs, torch::jit::last(*stack, count));
    DeviceState& state = state_of(call->device);
    check_broken(call->device);
    if (state.failing_launches.strikes()) raise(error_out_of_memory, "out of memory");
    ++state.launches;
    const c10::Stream stream = current_stream(call->device);
    if (const auto outs = known_of(*call)) {
        std::vector<at::Tensor> results = launch(call, *outs, stream);
        torch::jit::drop(*stack, count);
        for (at::Tensor& result : results) stack->emplace_back(std::move(result));
        return;
    }
    FirstCall first(*call, stream);
    first.learn();
    torch::jit::drop(*stack, count);
    for (c10::IValue& result : first.results()) stack->push_back(std::move(result));
}

inline void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) { call_on_device(op, op, stack); }

inline void convolution(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    static const auto plain = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
    call_on_device(op, plain, stack);
}

}  // namespace simdev
