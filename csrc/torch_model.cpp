#include "torch_model.h"

#include <ATen/DeviceAccelerator.h>
#include <torch/csrc/jit/runtime/graph_executor.h>

#include "package_model.h"
#include "script_model.h"

namespace pyserve {

std::shared_ptr<TorchModel> TorchModel::load(const ModelOptions& options, const std::vector<at::Tensor>& example,
                                             const std::vector<std::vector<at::Tensor>>& others) {
    const c10::InferenceMode guard;
    // The profiling executor exists to fuse kernels on accelerators. On a CPU it only makes the first runs slow and
    // compiles again for shapes it has not seen.
    if (!at::getAccelerator().has_value()) torch::jit::getProfilingMode() = false;
    std::shared_ptr<TorchModel> model;
    if (options.is_package) {
        model = std::make_shared<PackageModel>(options);
    } else {
        model = std::make_shared<ScriptModel>(options, example, others);
    }
    // Weights may still be on their way; the workers' streams do not wait for the one they were copied on.
    if (!options.device.is_cpu()) at::accelerator::synchronizeDevice(options.device.index());
    return model;
}

int TorchModel::warm_up_runs() { return torch::jit::getProfilingMode() ? 3 : 1; }

at::Tensor TorchModel::convert_input(const at::Tensor& input) const {
    at::Tensor out = input;
    // As with the weights: numbers of other kinds (double, complex) are what the model asked for.
    const bool is_lowered = options_.precision != at::kFloat && !is_autocast_;
    if (is_lowered && out.scalar_type() == at::kFloat) out = out.to(options_.precision);
    if (options_.channels_last && out.dim() == 4) out = out.contiguous(at::MemoryFormat::ChannelsLast);
    return out;
}

}  // namespace pyserve
