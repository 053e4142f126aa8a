// A loaded network: TorchScript or an AOTInductor package behind one interface. The weights exist once; any number of
// worker threads run it at the same time, unless a call leaves traces in the model: then each worker has its own.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace pyserve {

struct ModelOptions {
    std::string path;         // a TorchScript file, a file with one inside it (offset, size), or a .pt2 package
    int64_t offset = 0;       // where the TorchScript file begins in `path`, bytes
    int64_t size = -1;        // its size, bytes; -1 means to the end
    bool is_package = false;  // .pt2 (AOTInductor)
    at::Device device = at::kCPU;
    at::ScalarType precision = at::kFloat;  // kFloat, kBFloat16 or kHalf: what weights of kFloat become
    bool channels_last = false;             // for 4-d weights and inputs
    bool optimizes = true;                  // may change the graph's layout; see ScriptModel::optimize
    int package_runners_max = 1;            // .pt2: how many batches may run at once
    int64_t rows_min = 1;                   // .pt2: smaller batches are filled up to this with copies of a row
};

class TorchModel : public std::enable_shared_from_this<TorchModel> {
  public:
    virtual ~TorchModel() = default;

    // Loads, converts, freezes. `example` is one batch of inputs; what a lower precision costs is measured on it and on
    // `others`, further batches.
    // Throws c10::Error or std::exception with the library's words when the file cannot be used.
    static std::shared_ptr<TorchModel> load(const ModelOptions& options, const std::vector<at::Tensor>& example,
                                            const std::vector<std::vector<at::Tensor>>& others = {});

    // Any thread; of a model with state one at a time. Inputs are on `device()`, batch first. A tensor, or a tuple,
    // list or dict of tensors comes back, none of which shares memory with the model.
    virtual c10::IValue run(const std::vector<at::Tensor>& inputs) = 0;

    // The same without the optimisations that are made here.
    virtual c10::IValue run_plain(const std::vector<at::Tensor>& inputs) { return run(inputs); }

    // From now on the optimisations are left out.
    virtual void forget_optimization() {}

    // What a worker runs: this, or a model as it was loaded if calls leave traces in it.
    std::shared_ptr<TorchModel> instance() { return has_state() ? load_again() : shared_from_this(); }

    // Whether a call may change what later calls answer.
    bool has_state() const { return !state_.empty(); }
    // What is known of it; "" without state.
    const std::string& state() const { return state_; }
    // For what only running has shown. REQUIRES: no worker has been started.
    void note_state(const std::string& text) { state_ = text; }

    // Nothing more is found out about it: lets go of its file, unless the model may have to be read again.
    virtual void settle() {}

    // A number that changes when a call wrote to a weight or a constant; 0 where the format does not show them.
    virtual uint64_t checksum() const { return 0; }

    // The specs of inputs and outputs that a package was exported with, as torch's pytree writes them.
    virtual std::vector<std::string> call_spec() const { return {}; }

    // How often a shape has to be run until it runs as fast as it will: the profiling executor measures first, then
    // compiles.
    static int warm_up_runs();

    const ModelOptions& options() const { return options_; }
    at::Device device() const { return options_.device; }

    // What inputs must be turned into before run().
    at::Tensor convert_input(const at::Tensor& input) const;

    // Bytes of parameters and buffers; 0 where the format does not say.
    int64_t weights_size() const { return weights_size_; }

    // Largest difference to fp32 on the inputs to measure with, relative to the largest number of each output; 0 for
    // fp32.
    double precision_error() const { return precision_error_; }

    // Whether the lower precision is torch's autocast, since the model does not run at it throughout.
    bool is_autocast() const { return is_autocast_; }

    // Whether convolutions run in oneDNN's own layout.
    bool is_optimized() const { return is_optimized_.load(std::memory_order_relaxed); }
    // Why they do not although they could; "" if they do or there are none.
    const std::string& optimization_note() const { return optimization_note_; }

  protected:
    explicit TorchModel(const ModelOptions& options) : options_(options) {}

    virtual std::shared_ptr<TorchModel> load_again() = 0;

    const ModelOptions options_;
    int64_t weights_size_ = 0;
    double precision_error_ = 0;
    bool is_autocast_ = false;
    std::atomic<bool> is_optimized_{false};
    std::string optimization_note_;
    std::string state_;
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
        // Of a named tuple the type has the names.
        if (auto type = value.type()->cast<c10::TupleType>(); type && type->schema()) {
            return c10::ivalue::Tuple::createNamed(std::move(out), type);
        }
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
