// A loaded network: TorchScript, an AOTInductor package or OpenVINO behind one interface. The weights exist once; any number of
// worker threads run it at the same time, unless a call leaves traces in the model: then each worker has its own.
#pragma once

#include <ATen/core/ivalue.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "input_rules.h"
#include "pixels.h"
#include "tensors.h"

namespace pyserve {

// What computes a network. A further one is a class and a row of the table in torch_model.cpp.
enum class Backend : uint8_t { torchscript, aotinductor, openvino };

// Throws std::invalid_argument for another word.
Backend backend_of(const std::string& name);
const char* name_of(Backend backend);

// A TorchScript file, or a file with one inside it.
struct ScriptFile {
    std::string path;
    int64_t offset = 0;  // where it begins, bytes
    int64_t size = -1;   // bytes; -1 means to the end
};

// The least and the largest whole number of an input.
struct ValueRange {
    int64_t min;
    int64_t max;
};

struct ModelOptions {
    std::string path;    // a TorchScript file, a .pt2 package, or OpenVINO's .xml with the .bin beside it
    int64_t offset = 0;  // where the TorchScript file begins in `path`, bytes
    int64_t size = -1;   // its size, bytes; -1 means to the end
    Backend backend = Backend::torchscript;
    std::string library;  // of OpenVINO
    // The same network as TorchScript, with a `path`: what the other backend was not shown to answer alike is answered
    // by it. See checked_model.h, also for what follows.
    ScriptFile plain;
    std::vector<InputRule> rules;                         // the inputs that were tried; none: those like the example
    std::vector<std::optional<ValueRange>> value_ranges;  // of each input
    int64_t rows_max = 0;                                 // the largest batch that the program takes; 0 for any
    at::Device device = at::kCPU;
    at::ScalarType precision = at::kFloat;  // kFloat, kBFloat16 or kHalf: what weights of kFloat become
    bool channels_last = false;             // for 4-d weights and inputs
    bool chooses_layout = false;  // channels_last on a device if that suits; of convolutions at less than fp32
    bool optimizes = true;        // may change the graph's layout; see ScriptModel::optimize
    int runners_max = 1;          // but for TorchScript: how many batches may run at once, a CPU for each thread
    int workers = 1;              // OpenVINO: how many will, at first
    int threads = 1;              // OpenVINO: threads of each, at first
    int64_t rows_min = 1;         // .pt2: smaller batches are filled up to this with copies of a row
    std::optional<Normalization> pixels;  // the first thing that is done to pictures that come as bytes
};

class TorchModel : public std::enable_shared_from_this<TorchModel> {
  public:
    virtual ~TorchModel() = default;

    // Loads, converts, freezes. `example` is one batch of inputs; what a lower precision costs is measured on it and on
    // `others`, further batches.
    // Throws c10::Error or std::exception with the library's words when the file cannot be used.
    // With `options.plain` the two are put together, see checked_model.h.
    static std::shared_ptr<TorchModel> load(const ModelOptions& options, const std::vector<at::Tensor>& example,
                                            const std::vector<std::vector<at::Tensor>>& others = {});

    // Any thread; of a model with state one at a time. Inputs are on `device()`, batch first. A tensor, or a tuple,
    // list or dict of tensors comes back, none of which shares memory with the model. On a device they may be of the
    // model's precision: see restored.
    virtual c10::IValue run(const std::vector<at::Tensor>& inputs) = 0;

    // What `run` gave, with what is of the model's lower precision as float. On a CPU it is that already.
    c10::IValue restored(const c10::IValue& output) const;

    // The same without the optimisations that are made here.
    virtual c10::IValue run_plain(const std::vector<at::Tensor>& inputs) { return run(inputs); }

    // Threads of one run, of which TorchScript and packages know by themselves, and of how many workers; 0 leaves these as
    // they are. From now on, as soon as that is made ready beside the runs; or when it returns.
    virtual void use_threads(int /*count*/, int /*workers*/) {}
    virtual void prepare_threads(int /*count*/, int /*workers*/) {}
    // Runs at once and threads of each, where they are compiled in; else 0.
    virtual std::pair<int, int> streams_and_threads() const { return {0, 0}; }

    // Runs that were left to the plain network, of a model that has one beside it.
    virtual int64_t plain_runs() const { return 0; }

    // From now on the optimisations are left out.
    virtual void forget_optimization() {}

    // What a worker runs: this, or a model as it was loaded if calls leave traces in it.
    std::shared_ptr<TorchModel> instance();

    // The same, with all that is known of it, on another device of the same kind. Throws as `load` does, and when its
    // file was overwritten meanwhile.
    std::shared_ptr<TorchModel> copy_on(at::Device device);

    // Whether a call may change what later calls answer.
    bool has_state() const { return !state_.empty(); }
    // What is known of it; "" without state.
    const std::string& state() const { return state_; }
    // For what only running has shown. REQUIRES: no worker has been started.
    void note_state(const std::string& text) { state_ = text; }

    // Nothing more is found out about it: lets go of its file, unless the model may have to be read again.
    virtual void settle() {}

    // Whether parts of a call run in threads of their own, which know no stream but the device's default one: there it
    // has to run itself, or they would not wait for what it has begun, nor it for them.
    bool has_forks() const { return has_forks_; }

    // A number that changes when a call wrote to a weight or a constant; 0 where the format does not show them.
    virtual uint64_t checksum() const { return 0; }

    // The specs of inputs and outputs that a package was exported with, as torch's pytree writes them.
    virtual std::vector<std::string> call_spec() const { return {}; }

    const ModelOptions& options() const { return options_; }
    at::Device device() const { return options_.device; }

    // Whether 4-d weights and inputs are.
    bool is_channels_last() const { return is_channels_last_; }

    // What inputs must be turned into before run().
    at::Tensor convert_input(const at::Tensor& input) const;

    // Whether `input` is pictures as bytes, which run() makes numbers of.
    bool takes_as_pixels(const at::Tensor& input) const { return pixels_ && Pixels::are(input); }

    // The numbers [n, 3, height, width] of `input` if it is that, else `input`.
    at::Tensor numbers_of(const at::Tensor& input) const {
        if (!takes_as_pixels(input)) return input;
        return pixels_->numbers(input,
                                is_channels_last_ ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
    }

    // Bytes of parameters and buffers; 0 where the format does not say.
    int64_t weights_size() const { return weights_size_; }

    // Largest difference to fp32 on the inputs to measure with, relative to the largest number of each output; 0 for
    // fp32.
    double precision_error() const { return precision_error_; }

    // What two ways to compute its answers may differ by, as comparison.h counts.
    double rounding() const;

    // Whether the lower precision is torch's autocast, since the model does not run at it throughout.
    bool is_autocast() const { return is_autocast_; }

    // Whether convolutions run in oneDNN's own layout.
    bool is_optimized() const { return is_optimized_.load(std::memory_order_relaxed); }
    // Why they do not although they could; "" if they do or there are none.
    const std::string& optimization_note() const { return optimization_note_; }

    // What became of devices that its code names; "" if nothing did.
    const std::string& device_note() const { return device_note_; }

  protected:
    explicit TorchModel(const ModelOptions& options) : options_(options), is_channels_last_(options.channels_last) {
        if (options.pixels) pixels_.emplace(*options.pixels, options.device);
    }

    virtual std::shared_ptr<TorchModel> load_again(at::Device device) = 0;

    const ModelOptions options_;
    bool is_channels_last_;
    std::optional<Pixels> pixels_;
    int64_t weights_size_ = 0;
    double precision_error_ = 0;
    bool is_autocast_ = false;
    bool has_forks_ = false;
    std::atomic<bool> is_optimized_{false};
    std::string optimization_note_;
    std::string device_note_;
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

// What the backend's own class makes of the options, by the table.
std::shared_ptr<TorchModel> load_backend(const ModelOptions& options, const std::vector<at::Tensor>& example,
                                         const std::vector<std::vector<at::Tensor>>& others = {});

// A batch output must have one row per request, or answers would go to the wrong clients.
void check_rows(const c10::IValue& output, size_t count);

}  // namespace pyserve
