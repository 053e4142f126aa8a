#include "torch_model.h"

#include <ATen/DeviceAccelerator.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/csrc/jit/serialization/import.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "mapped_file.h"

namespace pyserve {
namespace {

using torch::jit::Module;

// Relative to the largest output, or to 1 if that is smaller.
constexpr double optimized_error_max = 1e-5;

// torch.jit.freeze removes the attribute; such a file's weights are constants of its graph.
bool is_frozen(const Module& module) { return !module.hasattr("training"); }

int64_t size_of(const Module& module) {
    int64_t size = 0;
    for (const at::Tensor& tensor : module.parameters()) size += static_cast<int64_t>(tensor.nbytes());
    for (const at::Tensor& tensor : module.buffers()) size += static_cast<int64_t>(tensor.nbytes());
    return size;
}

int64_t size_of_constants(const Module& module) {
    int64_t size = 0;
    for (const torch::jit::Node* node : module.get_method("forward").graph()->nodes()) {
        if (node->kind() != c10::prim::Constant || !node->hasAttribute(c10::attr::value)) continue;
        if (node->kindOf(c10::attr::value) != torch::jit::AttributeKind::t) continue;
        size += static_cast<int64_t>(node->t(c10::attr::value).nbytes());
    }
    return size;
}

// Module::to changes the format of no weight; oneDNN wants 4-d weights in the inputs' format.
void to_channels_last(Module& module) {
    for (at::Tensor parameter : module.parameters()) {
        if (parameter.dim() == 4) parameter.set_data(parameter.contiguous(at::MemoryFormat::ChannelsLast));
    }
}

double largest_difference(const c10::IValue& left, const c10::IValue& right) {
    if (!left.isTensor() || !right.isTensor()) return 0;
    const at::Tensor a = left.toTensor().to(at::kCPU, at::kFloat), b = right.toTensor().to(at::kCPU, at::kFloat);
    return a.sizes() == b.sizes() && a.numel() > 0 ? (a - b).abs().max().item<double>() : 0;
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

class ScriptModel final : public TorchModel {
  public:
    ScriptModel(const ModelOptions& options, const std::vector<at::Tensor>& example) : TorchModel(options) {
        load(example);
        optimize(example);
    }

    c10::IValue run(const std::vector<at::Tensor>& inputs) override {
        std::vector<c10::IValue> stack;
        stack.reserve(inputs.size());
        for (const at::Tensor& input : inputs) stack.emplace_back(convert_input(input));
        c10::IValue output = forward(std::move(stack));
        if (options_.precision == at::kFloat) return output;
        return map_tensors(output, [this](const at::Tensor& tensor) {
            return tensor.scalar_type() == options_.precision ? tensor.to(at::kFloat) : tensor;
        });
    }

  private:
    void load(const std::vector<at::Tensor>& example) {
        const auto file = std::make_shared<MappedFile>(options_.path, options_.offset, options_.size);
        module_ = torch::jit::load(file, options_.device, /*load_debug_files=*/false);
        if (is_frozen(module_)) {
            if (options_.precision != at::kFloat) {
                throw std::invalid_argument(
                    "this TorchScript file is frozen, so its precision cannot be changed; save it without "
                    "torch.jit.freeze, or take precision out of model-config.yaml");
            }
            weights_size_ = size_of_constants(module_);
            return;
        }
        module_.eval();
        convert(example);
        weights_size_ = size_of(module_);
        module_ = torch::jit::freeze(module_);
    }

    // oneDNN's operators keep their weights, and what flows between convolutions, in the layout its kernels like. That
    // saves a fifth of resnet18's time for one picture and more in batches. Networks without convolutions gain
    // nothing: a transformer pays for the conversions around its linear layers.
    //
    // The frozen graph is changed in place. What it gives is compared on the example; if that is not the same within
    // rounding, or fails, the model is loaded again and stays as it is.
    void optimize(const std::vector<at::Tensor>& example) {
        if (!options_.device.is_cpu() || options_.precision != at::kFloat || options_.channels_last) return;
        if (example.empty() || !has_convolution(module_.get_method("forward").graph()->block())) return;
        try {
            const c10::IValue expected = forward_copies(example);
            if (!expected.isTensor()) return;
            load(example);  // a graph that has run is compiled, and changes to it are not seen
            module_ = torch::jit::optimize_for_inference(module_);
            const c10::IValue got = forward_copies(example);
            const double scale = expected.toTensor().abs().max().item<double>();
            if (got.isTensor() && got.toTensor().sizes() == expected.toTensor().sizes() &&
                largest_difference(expected, got) <= optimized_error_max * std::max(1.0, scale)) {
                is_optimized_ = true;
                return;
            }
        } catch (const std::exception&) {
            // Whatever is wrong with the model shows when it warms up.
        }
        load(example);
    }

    c10::IValue forward_copies(const std::vector<at::Tensor>& example) {
        std::vector<c10::IValue> stack;
        for (const at::Tensor& input : example) stack.emplace_back(on_device_copy(input));
        return module_.forward(std::move(stack));
    }

    c10::IValue forward(std::vector<c10::IValue> stack) {
        try {
            return module_.forward(std::move(stack));
        } catch (const std::exception& error) {
            const std::string text = error.what();
            if (!is_out_of_memory(text)) throw;
            throw c10::OutOfMemoryError({__func__, __FILE__, __LINE__}, text);
        }
    }

    // The difference is measured here, where both precisions are at hand.
    void convert(const std::vector<at::Tensor>& example) {
        const bool is_lowered = options_.precision != at::kFloat;
        c10::IValue reference;
        if (is_lowered && !example.empty()) {
            reference = forward_copies(example);
        }
        if (is_lowered) module_.to(options_.precision);
        if (options_.channels_last) to_channels_last(module_);
        if (is_lowered && !example.empty()) {
            std::vector<at::Tensor> inputs;
            for (const at::Tensor& input : example) inputs.push_back(on_device_copy(input));
            precision_error_ = largest_difference(reference, run(inputs));
        }
    }

    // A copy even on the CPU: the model may change its input in place.
    at::Tensor on_device_copy(const at::Tensor& input) const {
        return input.to(options_.device, input.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
    }

    Module module_;
};

class PackageModel final : public TorchModel {
  public:
    PackageModel(const ModelOptions& options) : TorchModel(options) {
        if (options.precision != at::kFloat || options.channels_last) {
            throw std::invalid_argument(
                "a .pt2 package is compiled for one precision and memory format; export it again with the ones you "
                "want, or take precision and memoryFormat out of model-config.yaml");
        }
        if (options.offset != 0) throw std::invalid_argument("a .pt2 package must be a file of its own");
        loader_ = std::make_unique<torch::inductor::AOTIModelPackageLoader>(
            options.path, "model", /*run_single_threaded=*/false,
            static_cast<size_t>(std::max(1, options.package_runners_max)),
            options.device.has_index() ? options.device.index() : c10::DeviceIndex(-1));
    }

    c10::IValue run(const std::vector<at::Tensor>& inputs) override {
        std::vector<at::Tensor> outputs = loader_->run(inputs);
        if (outputs.size() == 1) return std::move(outputs.front());
        std::vector<c10::IValue> elements(std::make_move_iterator(outputs.begin()),
                                          std::make_move_iterator(outputs.end()));
        return c10::ivalue::Tuple::create(std::move(elements));
    }

  private:
    std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader_;
};

}  // namespace

std::shared_ptr<TorchModel> TorchModel::load(const ModelOptions& options, const std::vector<at::Tensor>& example) {
    const c10::InferenceMode guard;
    // The profiling executor exists to fuse kernels on accelerators. On a CPU it only makes the first runs slow and
    // compiles again for shapes it has not seen.
    if (!at::getAccelerator().has_value()) torch::jit::getProfilingMode() = false;
    std::shared_ptr<TorchModel> model;
    if (options.is_package) {
        model = std::make_shared<PackageModel>(options);
    } else {
        model = std::make_shared<ScriptModel>(options, example);
    }
    // Weights may still be on their way; the workers' streams do not wait for the one they were copied on.
    if (!options.device.is_cpu()) at::accelerator::synchronizeDevice(options.device.index());
    return model;
}

int TorchModel::warm_up_runs() { return torch::jit::getProfilingMode() ? 3 : 1; }

at::Tensor TorchModel::convert_input(const at::Tensor& input) const {
    at::Tensor out = input;
    if (out.is_floating_point() && options_.precision != at::kFloat) out = out.to(options_.precision);
    if (options_.channels_last && out.dim() == 4) out = out.contiguous(at::MemoryFormat::ChannelsLast);
    return out;
}

}  // namespace pyserve
