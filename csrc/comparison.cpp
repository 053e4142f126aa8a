#include "comparison.h"

#include <algorithm>
#include <limits>

#include "torch_model.h"

namespace pyserve {
namespace {

constexpr double infinite = std::numeric_limits<double>::infinity();
constexpr double smallest_scale = 1e-12;

double largest_difference(const at::Tensor& left, const at::Tensor& right) {
    const at::Tensor a = left.to(at::kCPU, at::kFloat), b = right.to(at::kCPU, at::kFloat);
    return a.sizes() == b.sizes() && a.numel() > 0 ? (a - b).abs().max().item<double>() : 0;
}

double largest_number(const at::Tensor& tensor) {
    return tensor.numel() > 0 ? tensor.to(at::kCPU, at::kFloat).abs().max().item<double>() : 0;
}

double strict_difference(const at::Tensor& expected, const at::Tensor& got) {
    if (expected.sizes() != got.sizes() || expected.scalar_type() != got.scalar_type()) return infinite;
    const at::Tensor a = expected.to(at::kCPU), b = got.to(at::kCPU);
    if (!a.is_floating_point()) return a.equal(b) ? 0 : infinite;
    const at::Tensor x = a.to(at::kDouble), y = b.to(at::kDouble);
    const at::Tensor is_finite = x.isfinite();
    if (!is_finite.equal(y.isfinite())) return infinite;
    // Where they are not finite they have to be the same: nan_to_num turns equal ones into equal numbers.
    const at::Tensor odd = is_finite.logical_not();
    if (!x.masked_select(odd).nan_to_num().equal(y.masked_select(odd).nan_to_num())) return infinite;
    const at::Tensor left = x.masked_select(is_finite), right = y.masked_select(is_finite);
    if (left.numel() == 0) return 0;
    const double scale = std::max(left.abs().max().item<double>(), smallest_scale);
    return (left - right).abs().max().item<double>() / scale;
}

}  // namespace

std::vector<at::Tensor> tensors_of(const c10::IValue& output) {
    std::vector<at::Tensor> tensors;
    map_tensors(output, [&](const at::Tensor& tensor) { return tensors.emplace_back(tensor); });
    return tensors;
}

double relative_difference(const c10::IValue& expected, const c10::IValue& got) {
    const std::vector<at::Tensor> left = tensors_of(expected), right = tensors_of(got);
    if (left.size() != right.size()) return infinite;
    double largest = 0;
    for (size_t i = 0; i < left.size(); ++i) {
        if (left[i].sizes() != right[i].sizes()) return infinite;
        if (!left[i].is_floating_point()) continue;
        const double scale = std::max(largest_number(left[i]), smallest_scale);
        const double difference = largest_difference(left[i], right[i]) / scale;
        // Not a number is larger than any.
        if (!(difference <= largest)) largest = difference;
    }
    return largest;
}

double strict_difference(const c10::IValue& expected, const c10::IValue& got) {
    const std::vector<at::Tensor> left = tensors_of(expected), right = tensors_of(got);
    if (left.size() != right.size()) return infinite;
    double largest = 0;
    for (size_t i = 0; i < left.size(); ++i) largest = std::max(largest, strict_difference(left[i], right[i]));
    return largest;
}

double rounding_of(at::ScalarType precision, bool is_tf32) {
    if (precision == at::kBFloat16) return 3e-2;
    if (precision == at::kHalf || is_tf32) return 5e-3;
    return 1e-4;
}

}  // namespace pyserve
