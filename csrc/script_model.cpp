#include "script_model.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/jit/passes/autocast.h>
#include <torch/csrc/jit/passes/inliner.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "finite_flow.h"
#include "graph_state.h"
#include "interrupt.h"
#include "magnitude.h"

namespace pyserve {
namespace {

using torch::jit::Module;

// Relative to the largest output, or to 1 if that is smaller.
constexpr double optimized_error_max = 1e-5;

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

double largest_difference(const at::Tensor& left, const at::Tensor& right) {
    const at::Tensor a = left.to(at::kCPU, at::kFloat), b = right.to(at::kCPU, at::kFloat);
    return a.sizes() == b.sizes() && a.numel() > 0 ? (a - b).abs().max().item<double>() : 0;
}

double largest_number(const at::Tensor& tensor) {
    return tensor.numel() > 0 ? tensor.to(at::kCPU, at::kFloat).abs().max().item<double>() : 0;
}

// Of all tensors in both, each relative to its largest number. Infinite where they do not correspond.
double relative_difference(const c10::IValue& expected, const c10::IValue& got) {
    std::vector<at::Tensor> left, right;
    map_tensors(expected, [&](const at::Tensor& tensor) { return left.emplace_back(tensor); });
    map_tensors(got, [&](const at::Tensor& tensor) { return right.emplace_back(tensor); });
    if (left.size() != right.size()) return std::numeric_limits<double>::infinity();
    double largest = 0;
    for (size_t i = 0; i < left.size(); ++i) {
        if (left[i].sizes() != right[i].sizes()) return std::numeric_limits<double>::infinity();
        if (!left[i].is_floating_point()) continue;
        const double scale = std::max(largest_number(left[i]), 1e-12);
        const double difference = largest_difference(left[i], right[i]) / scale;
        // Not a number is larger than any.
        if (!(difference <= largest)) largest = difference;
    }
    return largest;
}

// TorchScript turns every exception of an operator into std::runtime_error; only the text tells then that memory ran
// out. These are the words of torch's allocators.
bool is_out_of_memory(const std::string& text) {
    for (const char* words : {" out of memory. Tried to allocate", "can't allocate memory: you tried to allocate"}) {
        if (text.find(words) != std::string::npos) return true;
    }
    return false;
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
    : TorchModel(options), others_(others),
      file_(std::make_shared<FileWindow>(options.path, options.offset, options.size)) {
    load(example);
    others_.clear();
    if (state_.empty() && options.optimizes) optimize(example);
}

ScriptModel::ScriptModel(const ScriptModel& like, bool optimizes) : TorchModel(like.options_), file_(like.file_) {
    is_autocast_ = like.is_autocast_;
    precision_error_ = like.precision_error_;
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
    if (options_.precision == at::kFloat) return own(output);
    return map_tensors(own(output), [this](const at::Tensor& tensor) {
        return tensor.scalar_type() == options_.precision ? tensor.to(at::kFloat) : tensor;
    });
}

c10::IValue ScriptModel::run_plain(const std::vector<at::Tensor>& inputs) {
    return is_optimized() ? plain()->run(inputs) : run(inputs);
}

// Whoever runs it keeps it: `settle` may let go of it meanwhile.
std::shared_ptr<ScriptModel> ScriptModel::plain() {
    const std::lock_guard lock(plain_mutex_);
    if (!plain_) plain_ = std::make_shared<ScriptModel>(*this, /*optimizes=*/false);
    return plain_;
}

void ScriptModel::forget_optimization() {
    if (!is_optimized()) return;
    const std::shared_ptr<ScriptModel> unchanged = plain();
    module_ = unchanged->module_;
    storages_ = unchanged->storages_;
    is_optimized_ = false;
}

std::shared_ptr<TorchModel> ScriptModel::load_again() {
    return std::make_shared<ScriptModel>(*this, /*optimizes=*/false);
}

// The answers must not change when the model is called again, nor the model when a handler changes its answers.
c10::IValue ScriptModel::own(const c10::IValue& output) const {
    return map_tensors(output, [this](const at::Tensor& tensor) {
        const bool is_shared = has_state() || (tensor.has_storage() && storages_.count(tensor.storage().data()) != 0);
        return is_shared ? tensor.clone() : tensor;
    });
}

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

Module ScriptModel::read() const {
    Module module = torch::jit::load(file_, options_.device, /*load_debug_files=*/false);
    if (!is_frozen(module)) module.eval();
    return module;
}

void ScriptModel::load(const std::vector<at::Tensor>& example) {
    const c10::InferenceMode guard;
    module_ = read();
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

// What the lower precision costs, and whether the model runs at it or needs autocast. Leaves the module as it is in the
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
    for (;;) {
        module_ = read();
        prepare();
        precision_error_ = 0;
        try {
            for (size_t i = 0; i < batches.size(); ++i) {
                std::vector<at::Tensor> inputs;
                for (const at::Tensor& input : batches[i]) inputs.push_back(on_device_copy(input));
                const double error = relative_difference(references[i], interruptible([&] { return run(inputs); }));
                if (!(error <= precision_error_)) precision_error_ = error;  // what is no number is larger than any
            }
            break;
        } catch (const std::exception&) {
            // Most often numbers of two precisions meet: some that are made within, and a weight.
            if (is_autocast_ || !options_.device.is_cpu()) throw;
            is_autocast_ = true;
        }
    }
    module_ = read();
}

void ScriptModel::prepare() {
    if (options_.precision != at::kFloat) lower();
    if (options_.channels_last) to_channels_last(module_);
}

// oneDNN's operators keep their weights, and what flows between convolutions, in the layout its kernels like. That
// saves a fifth of resnet18's time for one picture and more in batches. Networks without convolutions gain
// nothing: a transformer pays for the conversions around its linear layers.
//
// The frozen graph is changed in place. What it gives is compared on the example, and by the caller on harder ones; if
// that is not the same within rounding, or fails, the model is loaded again and stays as it is.
void ScriptModel::optimize(const std::vector<at::Tensor>& example) {
    if (!options_.device.is_cpu() || options_.precision != at::kFloat || options_.channels_last) return;
    if (example.empty() || !has_convolution(module_.get_method("forward").graph()->block())) return;
    const std::string odd = may_hide_nan(module_);
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
