#include "finish.h"

#include <algorithm>
#include <exception>

namespace pyserve {
namespace {

bool are_scores(const at::Tensor& tensor, int64_t dimensions) {
    return tensor.defined() && tensor.layout() == at::kStrided && tensor.dim() == dimensions && tensor.size(1) > 0 &&
           !tensor.is_complex();
}

}  // namespace

std::optional<c10::IValue> ranked(const c10::IValue& output, int64_t count) {
    if (!output.isTensor() || !are_scores(output.toTensor(), 2) || !output.toTensor().device().is_cpu()) return {};
    const at::Tensor& scores = output.toTensor();
    const at::Tensor probabilities = at::softmax(scores.to(at::kFloat), 1);
    const auto [values, classes] = probabilities.topk(std::min(count, scores.size(1)), 1);
    return c10::ivalue::Tuple::create(values, classes);
}

std::optional<c10::IValue> class_per_pixel(const c10::IValue& output) {
    c10::IValue found = output;
    if (output.isGenericDict()) {
        const auto entries = output.toGenericDict();
        const c10::IValue name("out");
        if (!entries.keyType()->isSubtypeOf(*c10::StringType::get()) || !entries.contains(name)) return {};
        found = entries.at(name);
    }
    if (!found.isTensor() || !are_scores(found.toTensor(), 4)) return {};
    const auto [probabilities, classes] = at::softmax(found.toTensor().to(at::kFloat), 1).max(1);
    return c10::IValue(at::stack({classes.to(probabilities.scalar_type()), probabilities}, 3));
}

}  // namespace pyserve
