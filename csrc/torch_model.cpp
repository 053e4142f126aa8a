#include "torch_model.h"

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <c10/core/DeviceGuard.h>
#include <torch/csrc/jit/passes/tensorexpr_fuser.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include <algorithm>
#include <stdexcept>

#include "checked_model.h"
#include "comparison.h"
#include "openvino_model.h"
#include "package_model.h"
#include "script_model.h"

namespace pyserve {
namespace {

using Batches = std::vector<std::vector<at::Tensor>>;

struct BackendRow {
    Backend backend;
    const char* name;
    std::shared_ptr<TorchModel> (*load)(const ModelOptions&, const std::vector<at::Tensor>& example,
                                        const Batches& others);
};

const BackendRow backends[] = {
    {Backend::torchscript, "torchscript",
     [](const ModelOptions& options, const std::vector<at::Tensor>& example, const Batches& others)
         -> std::shared_ptr<TorchModel> { return std::make_shared<ScriptModel>(options, example, others); }},
    {Backend::aotinductor, "aotinductor",
     [](const ModelOptions& options, const std::vector<at::Tensor>&, const Batches&) -> std::shared_ptr<TorchModel> {
         return std::make_shared<PackageModel>(options);
     }},
    {Backend::openvino, "openvino",
     [](const ModelOptions& options, const std::vector<at::Tensor>& example,
        const Batches&) -> std::shared_ptr<TorchModel> { return std::make_shared<OpenVinoModel>(options, example); }},
};

// Weights may still be on their way; the workers' streams do not wait for the one they were copied on.
void wait_for_copies(at::Device device) {
    if (!device.is_cpu()) at::accelerator::synchronizeDevice(device.index());
}

}  // namespace

Backend backend_of(const std::string& name) {
    std::string names;
    for (const BackendRow& row : backends) {
        if (name == row.name) return row.backend;
        names += names.empty() ? row.name : std::string(", ") + row.name;
    }
    throw std::invalid_argument("backend must be one of " + names + ", not " + name);
}

const char* name_of(Backend backend) {
    const BackendRow* row = std::find_if(std::begin(backends), std::end(backends),
                                         [&](const auto& each) { return each.backend == backend; });
    return row->name;
}

std::shared_ptr<TorchModel> load_backend(const ModelOptions& options, const std::vector<at::Tensor>& example,
                                         const Batches& others) {
    const BackendRow* row = std::find_if(std::begin(backends), std::end(backends),
                                         [&](const auto& each) { return each.backend == options.backend; });
    return row->load(options, example, others);
}

std::shared_ptr<TorchModel> TorchModel::load(const ModelOptions& options, const std::vector<at::Tensor>& example,
                                             const std::vector<std::vector<at::Tensor>>& others) {
    const c10::InferenceMode guard;
    const c10::DeviceGuard current(options.device);
    // The profiling executor measures the first runs of a shape, and then fuses kernels for it: on an accelerator it
    // compiles for each new size of a batch, under one lock, while requests wait. What fusing saves there graphs save too.
    torch::jit::getProfilingMode() = false;
    torch::jit::setTensorExprFuserEnabled(false);
    std::shared_ptr<TorchModel> model;
    if (options.plain.path.empty()) {
        model = load_backend(options, example, others);
    } else {
        model = std::make_shared<CheckedModel>(options, example, others);
    }
    wait_for_copies(options.device);
    return model;
}

std::shared_ptr<TorchModel> TorchModel::instance() {
    if (!has_state()) return shared_from_this();
    std::shared_ptr<TorchModel> model = load_again(device());
    wait_for_copies(device());
    return model;
}

std::shared_ptr<TorchModel> TorchModel::copy_on(at::Device device) {
    const c10::InferenceMode guard;
    const c10::DeviceGuard current(device);
    std::shared_ptr<TorchModel> model = load_again(device);
    wait_for_copies(device);
    return model;
}

c10::IValue TorchModel::restored(const c10::IValue& output) const {
    if (options_.precision == at::kFloat) return output;
    return map_tensors(output, [this](const at::Tensor& tensor) {
        return tensor.scalar_type() == options_.precision ? tensor.to(at::kFloat) : tensor;
    });
}

double TorchModel::rounding() const {
    // torch's own default for convolutions there, whatever the precision is called.
    return rounding_of(options_.precision, device().is_cuda() && at::globalContext().allowTF32CuDNN());
}

at::Tensor TorchModel::convert_input(const at::Tensor& input) const {
    at::Tensor out = numbers_of(input);
    // As with the weights: numbers of other kinds (double, complex) are what the model asked for.
    const bool is_lowered = options_.precision != at::kFloat && !is_autocast_;
    if (is_lowered && out.scalar_type() == at::kFloat) out = out.to(options_.precision);
    if (is_channels_last_ && out.dim() == 4) out = out.contiguous(at::MemoryFormat::ChannelsLast);
    return out;
}

void check_rows(const c10::IValue& output, size_t count) {
    map_tensors(output, [count](const at::Tensor& tensor) {
        TORCH_CHECK(tensor.dim() > 0 && static_cast<size_t>(tensor.size(0)) == count,
                    "the model returned a tensor of shape ", tensor.sizes(), " for a batch of ", count,
                    "; its first dimension must be the batch");
        return tensor;
    });
}

}  // namespace pyserve
