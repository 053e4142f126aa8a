#include "pixels.h"

#include <algorithm>

namespace pyserve {
namespace {

at::Tensor per_channel(const std::array<float, 3>& values, float neutral, at::Device device) {
    if (std::all_of(values.begin(), values.end(), [&](float each) { return each == neutral; })) return {};
    return at::tensor(at::ArrayRef<float>(values), at::kFloat).view({1, 3, 1, 1}).to(device);
}

}  // namespace

// Constants of the device: divided by a number of the host, some devices multiply by its reciprocal, which is another
// result.
Pixels::Pixels(const Normalization& normalization, at::Device device)
    : divisor_(at::tensor({255.0f}, at::kFloat).view({1, 1, 1, 1}).to(device)),
      mean_(per_channel(normalization.mean, 0.0f, device)), std_(per_channel(normalization.std, 1.0f, device)) {}

at::Tensor Pixels::numbers(const at::Tensor& pixels, at::MemoryFormat format) const {
    const at::Tensor planes = pixels.permute({0, 3, 1, 2});
    at::Tensor out = at::empty(planes.sizes(), pixels.options().dtype(at::kFloat), format);
    at::div_out(out, planes, divisor_);
    if (mean_.defined()) out.sub_(mean_);
    if (std_.defined()) out.div_(std_);
    return out;
}

std::vector<at::Tensor> Pixels::described(const std::vector<at::Tensor>& inputs) {
    std::vector<at::Tensor> out = inputs;
    for (at::Tensor& input : out) {
        if (are(input)) input = at::zeros({1}).expand({input.size(0), 3, input.size(1), input.size(2)});
    }
    return out;
}

}  // namespace pyserve
