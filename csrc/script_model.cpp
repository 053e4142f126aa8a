#include "script_model.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/jit/passes/autocast.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "comparison.h"
#include "device_constants.h"
#include "finite_flow.h"
#include "graph_state.h"
#include "guarded.h"
#include "interrupt.h"
#include "magnitude.h"

namespace pyserve {
namespace {

using torch::jit::Module;

// Relative to the largest output, or to 1 if that is smaller.
constexpr double optimized_error_max = 1e-5;
// The same network on two kinds of devices, which may multiply numbers of fp32 as shorter ones. What was computed from
// other numbers is further away.
constexpr double other_device_error_max = 2e-2;

// torch.jit.freeze removes the attribute; such a file's weights are constants of its graph.
bool is_frozen(const Module& module) { return !module.hasattr("training"); }

template <class Visit>
void visit_constants(const torch::jit::Block* block, const Visit& visit) {
    for (const torch::jit::Node* node : block->nodes()) {
        if (node->kind() == c10::prim::Constant && node->hasAttribute(c10::attr::value) &&
            node->kindOf(c10::attr::value) == torch::jit::AttributeKind::t) {
            visit(node->t(c10::attr::value));
        }
        for (const torch::jit::Block* inner : node->blocks()) visit_constants(inner, visit);
    }
}

// Calls `visit` for each tensor that lives as long as the module: attributes of any name, and constants.
template <class Visit>
void visit_weights(const Module& module, const Visit& visit) {
    for (const Module& each : module.modules()) {
        for (const auto& attribute : each.named_attributes(/*recurse=*/false)) {
            if (attribute.value.isTensor() && attribute.value.toTensor().defined()) visit(attribute.value.toTensor());
        }
    }
    visit_constants(module.get_method("forward").graph()->block(), visit);
}

int64_t size_of(const Module& module) {
    int64_t size = 0;
    visit_weights(module, [&](const at::Tensor& tensor) { size += static_cast<int64_t>(tensor.nbytes()); });
    return size;
}

// Module::to changes the format of no weight; oneDNN wants 4-d weights in the inputs' format.
void to_channels_last(Module& module) {
    for (at::Tensor parameter : module.parameters()) {
        if (parameter.dim() == 4) parameter.set_data(parameter.contiguous(at::MemoryFormat::ChannelsLast));
    }
}

// Freezing refuses modules whose attributes share memory in lists or dicts. They run as they are.
Module frozen_if_possible(const Module& module) {
    try {
        return torch::jit::freeze(module);
    } catch (const std::exception&) {
        return module;
    }
}

// A storage that was read from a file cannot grow. resize_ finds that out when it has already changed the tensor's
// sizes: it raises, and from then on the tensor reaches beyond its memory.
void make_resizable(const Module& module) {
    for (const Module& each : module.modules()) {
        for (const auto& attribute : each.named_attributes(/*recurse=*/false)) {
            if (attribute.value.isTensor() && attribute.value.toTensor().defined()) {
                at::Tensor tensor = attribute.value.toTensor();
                tensor.set_data(tensor.clone());
            }
        }
    }
}

bool has_convolution(const torch::jit::Block* block) {
    for (const torch::jit::Node* node : block->nodes()) {
        const std::string name = node->kind().toUnqualString();
        if (name == "_convolution" || name == "conv2d" || name == "conv3d") return true;
        for (const torch::jit::Block* inner : node->blocks()) {
            if (has_convolution(inner)) return true;
        }
    }
    return false;
}

ModelOptions on_device(ModelOptions options, at::Device device) {
    options.device = device;
    return options;
}

// Makes torch's autocast the thread's while it lives.
class AutocastScope {
  public:
    explicit AutocastScope(at::ScalarType precision) {
        at::autocast::set_autocast_enabled(at::kCPU, true);
        at::autocast::set_autocast_dtype(at::kCPU, precision);
    }
    ~AutocastScope() { at::autocast::set_autocast_enabled(at::kCPU, false); }
    AutocastScope(const AutocastScope&) = delete;
    AutocastScope& operator=(const AutocastScope&) = delete;
};

}  // namespace

ScriptModel::ScriptModel(const ModelOptions& options, const std::vector<at::Tensor>& example,
                         const std::vector<std::vector<at::Tensor>>& others)
    : ScriptModel(options, std::make_shared<FileWindow>(options.path, options.offset, options.size), example, others) {}

ScriptModel::ScriptModel(const ModelOptions& options, std::shared_ptr<FileWindow> file,
                         const std::vector<at::Tensor>& example, const std::vector<std::vector<at::Tensor>>& others)
    : TorchModel(options), others_(others), file_(std::move(file)) {
    file_->check_unchanged();
    load(example);
    others_.clear();
    if (state_.empty() && options.optimizes) optimize(example);
}

ScriptModel::ScriptModel(const ScriptModel& like, at::Device device, bool optimizes)
    : TorchModel(on_device(like.options_, device)), file_(like.file_) {
    is_autocast_ = like.is_autocast_;
    is_channels_last_ = like.is_channels_last_;
    precision_error_ = like.precision_error_;
    renames_devices_ = like.renames_devices_;
    device_note_ = like.device_note_;
    if (device != like.device()) copied_from_ = like.device();
    file_->check_unchanged();
    load({});
    state_ = like.state_;
    if (optimizes && like.is_optimized()) optimize({});
}

c10::IValue ScriptModel::run(const std::vector<at::Tensor>& inputs) {
    // oneDNN's kernels treat numbers that are none, and what overflows to them, in another way than torch's.
    if (is_optimized() && !is_ordinary(inputs)) return plain()->run(inputs);
    std::vector<c10::IValue> stack;
    stack.reserve(inputs.size());
    for (const at::Tensor& input : inputs) stack.emplace_back(convert_input(input));
    c10::IValue output = forward(std::move(stack));
    // From a device they come as they are, in half the bytes, and become float on the host: see restored.
    return device().is_cpu() ? restored(own(output)) : own(output);
}

c10::IValue ScriptModel::run_plain(const std::vector<at::Tensor>& inputs) {
    return is_optimized() ? plain()->run(inputs) : run(inputs);
}

// Whoever runs it keeps it: `settle` may let go of it meanwhile.
std::shared_ptr<ScriptModel> ScriptModel::plain() {
    const std::lock_guard lock(plain_mutex_);
    if (!plain_) plain_ = std::make_shared<ScriptModel>(*this, device(), /*optimizes=*/false);
    return plain_;
}

void ScriptModel::forget_optimization() {
    if (!is_optimized()) return;
    const std::shared_ptr<ScriptModel> unchanged = plain();
    module_ = unchanged->module_;
    storages_ = unchanged->storages_;
    is_optimized_ = false;
}

std::shared_ptr<TorchModel> ScriptModel::load_again(at::Device device) {
    return std::make_shared<ScriptModel>(*this, device, /*optimizes=*/false);
}

// The answers must not change when the model is called again, nor the model when a handler changes its answers.
c10::IValue ScriptModel::own(const c10::IValue& output) const {
    return map_tensors(output, [this](const at::Tensor& tensor) {
        const bool is_shared = has_state() || (tensor.has_storage() && storages_.count(tensor.storage().data()) != 0);
        return is_shared ? tensor.clone() : tensor;
    });
}

std::string ScriptModel::may_hide_nan() const { return pyserve::may_hide_nan(module_); }

uint64_t ScriptModel::checksum() const {
    uint64_t sum = 0;
    visit_weights(module_, [&](const at::Tensor& tensor) {
        if (!tensor.has_storage() || !tensor.device().is_cpu()) return;
        const auto* words = static_cast<const uint8_t*>(tensor.storage().data());
        const size_t size = tensor.storage().nbytes();
        for (size_t at = 0; at + sizeof(uint64_t) <= size; at += sizeof(uint64_t)) {
            uint64_t word;
            std::memcpy(&word, words + at, sizeof word);
            sum = (sum + word) * 0x9E3779B97F4A7C15u;
        }
        for (size_t at = size / sizeof(uint64_t) * sizeof(uint64_t); at < size; ++at) sum = (sum + words[at]) * 31;
    });
    return sum;
}

Module ScriptModel::read() const { return read_for(options_.device, renames_devices_); }

Module ScriptModel::read_for(at::Device device, bool renames) const {
    Module module = torch::jit::load(file_, device, /*load_debug_files=*/false);
    if (renames || copied_from_) rename_devices(module, renames ? std::nullopt : copied_from_, device);
    if (!is_frozen(module)) module.eval();
    return module;
}

// Lets go of what there was first: the device may have no room for both.
void ScriptModel::read_again() {
    module_ = Module();
    module_ = read();
}

// Reads the module. Returns whether it can be used, since it has not run.
// Of a trace that was made on another device the model's own takes the place; of other code only where it would fail as
// it is, since it may name a device for a reason. Either way it is shown that the answers are those of the CPU.
bool ScriptModel::choose_devices(const std::vector<at::Tensor>& example) {
    module_ = Module();
    module_ = read_for(options_.device, false);
    if (!names_other_devices(module_, options_.device)) return true;
    bool runs = true;
    try {
        forward_copies(example);
    } catch (const Interrupted&) {
        throw;
    } catch (const std::exception&) {
        runs = false;
    }
    if (runs && (options_.device.is_cpu() || has_branches(module_))) return false;
    renames_devices_ = answers_as_on_the_cpu(example);
    if (renames_devices_) device_note_ = "the devices that its code names became " + options_.device.str();
    return false;
}

// Whether it does so when the devices that it names have become the one that it is on.
bool ScriptModel::answers_as_on_the_cpu(const std::vector<at::Tensor>& example) {
    try {
        std::vector<std::vector<at::Tensor>> batches{example};
        batches.insert(batches.end(), others_.begin(), others_.end());
        Module on_the_cpu = read_for(at::kCPU, true);
        module_ = Module();
        module_ = read_for(options_.device, true);
        for (const auto& batch : batches) {
            const c10::IValue got = forward_copies(batch);
            std::vector<c10::IValue> stack;
            for (const at::Tensor& input : batch)
                stack.emplace_back(input.to(at::kCPU, input.scalar_type(), false, true));
            const c10::IValue expected = interruptible([&] { return on_the_cpu.forward(std::move(stack)); });
            if (!(relative_difference(expected, got) <= other_device_error_max)) return false;
        }
        return true;
    } catch (const Interrupted&) {
        throw;
    } catch (const std::exception&) {
        return false;  // what is wrong with it shows when it runs as it is
    }
}

void ScriptModel::load(const std::vector<at::Tensor>& example) {
    const c10::InferenceMode guard;
    if (example.empty() || renames_devices_ || !choose_devices(example)) read_again();
    has_forks_ = pyserve::has_forks(module_);
    const bool was_frozen = is_frozen(module_);
    if (was_frozen && options_.precision != at::kFloat) {
        throw std::invalid_argument(
            "this TorchScript file is frozen, so its precision cannot be changed; save it without torch.jit.freeze, or "
            "take precision out of model-config.yaml");
    }
    if (!was_frozen) {
        if (options_.precision != at::kFloat && !example.empty()) measure(example);
        prepare();
    }
    weights_size_ = size_of(module_);
    if (!was_frozen) module_ = frozen_if_possible(module_);
    state_ = written_state(module_);
    if (has_state()) make_resizable(module_);
    storages_.clear();
    visit_weights(module_, [&](const at::Tensor& tensor) {
        if (tensor.has_storage()) storages_.insert(tensor.storage().data());
    });
}

// Whether there are convolutions in it.
bool ScriptModel::convolves() const {
    const auto graph = module_.get_method("forward").graph()->copy();
    torch::jit::Inline(*graph);
    return has_convolution(graph->block());
}

// What the lower precision costs, whether the model runs at it or needs autocast, and its layout on a device. Leaves the module as it is in the
// file: one that has run is compiled, and may have changed.
void ScriptModel::measure(const std::vector<at::Tensor>& example) {
    std::vector<std::vector<at::Tensor>> batches{example};
    std::vector<c10::IValue> references{forward_copies(example)};
    for (const auto& batch : others_) {
        try {
            references.push_back(forward_copies(batch));
            batches.push_back(batch);
        } catch (const std::exception&) {
            // Numbers that this model does not take.
        }
    }
    // Tensor cores want convolutions so: with the other layout there is a conversion around each of them.
    const bool chooses = options_.chooses_layout && !options_.device.is_cpu() && convolves();
    if (chooses) is_channels_last_ = true;
    for (;;) {
        read_again();
        prepare();
        precision_error_ = 0;
        try {
            for (size_t i = 0; i < batches.size(); ++i) {
                std::vector<at::Tensor> inputs;
                for (const at::Tensor& input : batches[i]) inputs.push_back(on_device_copy(input));
                const double error = relative_difference(references[i], interruptible([&] { return run(inputs); }));
                if (!(error <= precision_error_)) precision_error_ = error;  // what is no number is larger than any
            }
            // A network may read memory as if it were in the order of its indices.
            if (!chooses || !is_channels_last_ || precision_error_ <= other_device_error_max) break;
            is_channels_last_ = false;
        } catch (const Interrupted&) {
            throw;
        } catch (const std::exception&) {
            if (chooses && is_channels_last_) {  // not every network can be called so: `view` wants that order
                is_channels_last_ = false;
                continue;
            }
            // Most often numbers of two precisions meet: some that are made within, and a weight.
            if (is_autocast_ || !options_.device.is_cpu()) throw;
            is_autocast_ = true;
        }
    }
    read_again();
}

void ScriptModel::prepare() {
    if (options_.precision != at::kFloat) lower();
    if (is_channels_last_) to_channels_last(module_);
}

// oneDNN's operators keep their weights, and what flows between convolutions, in the layout its kernels like. That
// saves a fifth of resnet18's time for one picture and more in batches. Networks without convolutions gain
// nothing: a transformer pays for the conversions around its linear layers.
//
// The frozen graph is changed in place. What it gives is compared on the example, and by the caller on harder ones; if
// that is not the same within rounding, or fails, the model is loaded again and stays as it is.
void ScriptModel::optimize(const std::vector<at::Tensor>& example) {
    if (!options_.device.is_cpu() || options_.precision != at::kFloat || is_channels_last_) return;
    if (example.empty() || !has_convolution(module_.get_method("forward").graph()->block())) return;
    const std::string odd = may_hide_nan();
    if (!odd.empty()) {
        optimization_note_ = "left out, since NaN may come up within the model (" + odd + "), which oneDNN would hide";
        return;
    }
    try {
        const c10::IValue expected = forward_copies(example);
        load(example);  // a graph that has run is compiled, and changes to it are not seen
        module_ = torch::jit::optimize_for_inference(module_);
        const c10::IValue got = forward_copies(example);
        if (relative_difference(expected, got) <= optimized_error_max) {
            is_optimized_ = true;
            return;
        }
    } catch (const std::exception&) {
        // Whatever is wrong with the model shows when it warms up.
    }
    load(example);
}

c10::IValue ScriptModel::forward_copies(const std::vector<at::Tensor>& example) {
    std::vector<c10::IValue> stack;
    for (const at::Tensor& input : example) stack.emplace_back(on_device_copy(input));
    return interruptible([&] { return module_.forward(std::move(stack)); });
}

c10::IValue ScriptModel::forward(std::vector<c10::IValue> stack) {
    try {
        return module_.forward(std::move(stack));
    } catch (const std::exception& error) {
        const std::string text = error.what();
        if (!is_out_of_memory(text)) throw;
        throw c10::OutOfMemoryError({__func__, __FILE__, __LINE__}, text);
    }
}

// To the lower precision: the weights that are fp32, since whole numbers, flags, complex numbers and doubles are what
// they are for a reason; or with autocast, which puts conversions around the operators that gain by them.
void ScriptModel::lower() {
    if (is_autocast_) {
        const AutocastScope scope(options_.precision);
        const auto graph = module_.get_method("forward").graph();
        torch::jit::Inline(*graph);
        torch::jit::Autocast(graph);
        return;
    }
    const auto change = [this](at::Tensor tensor) {
        if (tensor.scalar_type() == at::kFloat) tensor.set_data(tensor.to(options_.precision));
    };
    for (const at::Tensor& tensor : module_.parameters()) change(tensor);
    for (const at::Tensor& tensor : module_.buffers()) change(tensor);
}

// A copy even on the CPU: the model may change its input in place.
at::Tensor ScriptModel::on_device_copy(const at::Tensor& input) const {
    return input.to(options_.device, input.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
}

}  // namespace pyserve
