#include "package_model.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace pyserve {
namespace {

// `input` with copies of its last row behind it, so that it has `count` rows.
at::Tensor filled_up(const at::Tensor& input, int64_t count) {
    const int64_t rows = input.size(0);
    std::vector<int64_t> shape = input.sizes().vec();
    shape[0] = count - rows;
    return at::cat({input, input.narrow(0, rows - 1, 1).expand(shape)});
}

}  // namespace

PackageModel::PackageModel(const ModelOptions& options) : TorchModel(options) {
    if (options.precision != at::kFloat) {
        throw std::invalid_argument(
            "a .pt2 package is compiled for one precision; export it again with the one you want, or take precision "
            "out of model-config.yaml");
    }
    if (options.offset != 0) throw std::invalid_argument("a .pt2 package must be a file of its own");
    loader_ = std::make_unique<torch::inductor::AOTIModelPackageLoader>(
        options.path, "model", /*run_single_threaded=*/false, static_cast<size_t>(std::max(1, options.runners_max)),
        options.device.has_index() ? options.device.index() : c10::DeviceIndex(-1));
}

c10::IValue PackageModel::run(const std::vector<at::Tensor>& inputs) {
    const int64_t rows = inputs.front().size(0);
    std::vector<at::Tensor> laid_out;
    laid_out.reserve(inputs.size());
    for (const at::Tensor& given : inputs) {
        const at::Tensor input = numbers_of(given);
        // Compiled code reads memory with the strides that it was compiled for, and does not look at the tensor's.
        at::Tensor each = rows < options_.rows_min ? filled_up(input, options_.rows_min) : input;
        laid_out.push_back(is_channels_last_ && each.dim() == 4 ? each.contiguous(at::MemoryFormat::ChannelsLast)
                                                                : each.contiguous());
    }
    std::vector<at::Tensor> outputs = loader_->run(laid_out);
    for (at::Tensor& output : outputs) {
        if (rows < options_.rows_min && output.dim() > 0 && output.size(0) == options_.rows_min) {
            output = output.narrow(0, 0, rows);
        }
        // What a package keeps between its calls may be among its outputs.
        if (has_state()) output = output.clone();
    }
    if (outputs.size() == 1) return std::move(outputs.front());
    std::vector<c10::IValue> elements(std::make_move_iterator(outputs.begin()), std::make_move_iterator(outputs.end()));
    return c10::ivalue::Tuple::create(std::move(elements));
}

std::shared_ptr<TorchModel> PackageModel::load_again(at::Device device) {
    ModelOptions options = options_;
    options.device = device;
    if (has_state()) options.runners_max = 1;  // it is one worker's
    auto model = std::make_shared<PackageModel>(options);
    model->note_state(state());
    return model;
}

}  // namespace pyserve
