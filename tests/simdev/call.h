// One call of an operator, as the CPU's kernel takes it.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <optional>
#include <sstream>

#include "copies.h"

namespace simdev {

inline std::string shape_of(const at::Tensor& tensor) {
    std::ostringstream out;
    out << tensor.sizes() << tensor.strides() << tensor.scalar_type() << tensor.device();
    return out.str();
}

struct Call {
    c10::OperatorHandle op;
    std::vector<c10::IValue> plain;          // arguments; tensors are in `places`
    std::vector<std::vector<Place>> places;  // per argument
    std::vector<at::Tensor> tensors;         // of the device, in order
    std::string key;                         // the operator, shapes and numbers
    bool depends_on_data = false;
    int device = -1;

    Call(const c10::OperatorHandle& asked, const c10::OperatorHandle& runs, c10::ArrayRef<c10::IValue> arguments)
        : op(runs) {
        std::ostringstream text;
        text << asked.operator_name();
        bool has_others = false;  // a tensor that is not on the device, and more than a number
        for (const c10::IValue& value : arguments) add(value, text, has_others);
        TORCH_CHECK(!has_others || tensors.empty() || asked.operator_name().name == "aten::index",
                    "Expected all tensors to be on the same device, but found at least two devices, simdev:", device,
                    " and cpu! (when checking arguments of ", asked.operator_name(), ")");
        if (device < 0) device = current_device;
        key = text.str();
    }

    // Lets the tensors go: what is queued holds addresses only.
    std::vector<at::Tensor> take_tensors() {
        for (c10::IValue& value : plain) {
            if (value.isTensor() && value.toTensor().defined() && value.toTensor().is_privateuseone()) {
                value = at::Tensor();
            } else if (value.isTensorList()) {
                value = std::vector<at::Tensor>();
            }
        }
        return std::move(tensors);
    }

    // `views` get the tensors of the device, as the kernel sees them, in the order of `tensors`.
    std::vector<c10::IValue> run(std::vector<at::Tensor>& views) const {
        std::vector<c10::IValue> stack;
        const auto view_of = [&](const Place& place) {
            at::Tensor view = place.view();
            if (place.is_on_device) views.push_back(view);
            return view;
        };
        for (size_t i = 0; i < plain.size(); ++i) {
            if (plain[i].isTensor()) {
                stack.emplace_back(places[i].empty() ? plain[i] : c10::IValue(view_of(places[i][0])));
            } else if (plain[i].isTensorList()) {
                std::vector<at::Tensor> list;
                for (const Place& place : places[i]) list.push_back(view_of(place));
                stack.emplace_back(std::move(list));
            } else if (plain[i].isOptionalTensorList()) {
                c10::List<std::optional<at::Tensor>> list;
                size_t next = 0;
                for (const auto& given : plain[i].toOptionalTensorVector()) {
                    const bool is_there = given.has_value() && given->defined();
                    list.push_back(is_there ? std::optional(view_of(places[i][next++])) : std::nullopt);
                }
                stack.emplace_back(std::move(list));
            } else {
                stack.push_back(plain[i]);
            }
        }
        op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack);
        return stack;
    }

  private:
    void add(const c10::IValue& value, std::ostringstream& text, bool& has_others) {
        places.emplace_back();
        plain.push_back(value);
        if (value.isTensor() && value.toTensor().defined()) {
            const at::Tensor& tensor = value.toTensor();
            text << shape_of(tensor);
            if (tensor.is_privateuseone())
                add(tensor);  // a number as a tensor keeps what tells it from one
            else if (tensor.dim() > 0)
                has_others = true;
        } else if (value.isTensorList()) {
            for (const at::Tensor& tensor : value.toTensorVector()) {
                text << shape_of(tensor);
                add(tensor);
                has_others = has_others || (!tensor.is_privateuseone() && tensor.dim() > 0);
            }
        } else if (value.isOptionalTensorList()) {
            for (const auto& tensor : value.toOptionalTensorVector()) {
                if (!tensor.has_value() || !tensor->defined()) continue;
                text << shape_of(*tensor);
                depends_on_data = depends_on_data || tensor->scalar_type() == at::kBool;
                add(*tensor);
            }
        } else if (value.isDevice() && value.toDevice().is_privateuseone()) {
            if (device < 0) device = index_of(value.toDevice());
            plain.back() = c10::Device(at::kCPU);
        } else {
            text << value;
        }
        text << ';';
    }
    void add(const at::Tensor& tensor) {
        places.back().emplace_back(tensor);
        if (!tensor.is_privateuseone()) return;
        TORCH_CHECK(device < 0 || tensors.empty() || tensor.device().index() == device,
                    "Expected all tensors to be on the same device, but found at least two devices, simdev:", device,
                    " and ", tensor.device(), "!");
        tensors.push_back(tensor);
        device = tensor.device().index();
    }
};

}  // namespace simdev
