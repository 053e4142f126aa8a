// A loaded network: TorchScript or an AOTInductor package behind one interface. The weights exist once; any
// number of worker threads run it at the same time.
#pragma once

#include <ATen/core/ivalue.h>
#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace pyserve {

struct ModelOptions {
    std::string path;          // a TorchScript file, a file with one inside it (offset, size), or a .pt2 package
    int64_t offset = 0;        // where the TorchScript file begins in `path`, bytes
    int64_t size = -1;         // its size, bytes; -1 means to the end
    bool is_package = false;   // .pt2 (AOTInductor)
    at::Device device = at::kCPU;
    at::ScalarType precision = at::kFloat;  // kFloat, kBFloat16 or kHalf: what floating-point weights become
    bool channels_last = false;             // for 4-d weights and inputs
    int package_runners_max = 1;            // .pt2: how many batches may run at once
};

class TorchModel {
  public:
    virtual ~TorchModel() = default;

    // Loads, converts, freezes. `example` is one batch of inputs, used to measure what a lower precision costs.
    // Throws c10::Error or std::exception with the library's words when the file cannot be used.
    static std::shared_ptr<TorchModel> load(const ModelOptions& options, const std::vector<at::Tensor>& example);

    // Any thread. Inputs are on `device()`, batch first. A tensor, or a tuple, list or dict of tensors comes back.
    virtual c10::IValue run(const std::vector<at::Tensor>& inputs) = 0;

    // How often a shape has to be run until it runs as fast as it will: the profiling executor measures first, then
    // compiles.
    static int warm_up_runs();

    const ModelOptions& options() const { return options_; }
    at::Device device() const { return options_.device; }

    // What inputs must be turned into before run().
    at::Tensor convert_input(const at::Tensor& input) const;

    // Bytes of parameters and buffers; 0 where the format does not say.
    int64_t weights_size() const { return weights_size_; }

    // Largest absolute difference to fp32 on the example input; 0 for fp32.
    double precision_error() const { return precision_error_; }

    // Whether convolutions run in oneDNN's own layout.
    bool is_optimized() const { return is_optimized_; }

  protected:
    explicit TorchModel(const ModelOptions& options) : options_(options) {}

    const ModelOptions options_;
    int64_t weights_size_ = 0;
    double precision_error_ = 0;
    bool is_optimized_ = false;
};

// Applies `change` to each tensor in a tensor, tuple, list or dict; other values stay as they are.
template <class Change>
c10::IValue map_tensors(const c10::IValue& value, const Change& change) {
    if (value.isTensor()) return change(value.toTensor());
    if (value.isTensorList()) {
        c10::List<at::Tensor> out;
        for (auto&& tensor : value.toTensorList()) out.push_back(change(at::Tensor(tensor)));
        return out;
    }
    if (value.isTuple()) {
        std::vector<c10::IValue> out;
        for (const c10::IValue& element : value.toTupleRef().elements()) out.push_back(map_tensors(element, change));
        return c10::ivalue::Tuple::create(std::move(out));
    }
    if (value.isList()) {
        c10::List<c10::IValue> in = value.toList();
        c10::impl::GenericList out(in.elementType());
        for (auto&& element : in) out.push_back(map_tensors(c10::IValue(element), change));
        return out;
    }
    if (value.isGenericDict()) {
        const c10::impl::GenericDict in = value.toGenericDict();
        c10::impl::GenericDict out(in.keyType(), in.valueType());
        for (const auto& entry : in) out.insert(entry.key(), map_tensors(entry.value(), change));
        return out;
    }
    return value;
}

}  // namespace pyserve
