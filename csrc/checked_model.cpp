#include "checked_model.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <stdexcept>

#include "comparison.h"
#include "interrupt.h"
#include "magnitude.h"

namespace pyserve {
namespace {

// OpenVINO computes with numbers of 32 bits, whatever the input's are.
constexpr ValueRange of_32_bits{std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()};

ModelOptions plain_options(ModelOptions options) {
    options.path = options.plain.path;
    options.offset = options.plain.offset;
    options.size = options.plain.size;
    options.backend = Backend::torchscript;
    options.optimizes = false;
    return options;
}

ModelOptions quick_options(ModelOptions options) {
    options.plain = {};
    if (options.backend == Backend::aotinductor) options.precision = at::kFloat;  // it is compiled for one
    return options;
}

// The sizes of the example, as rules.
std::vector<InputRule> rules_of(const std::vector<at::Tensor>& example) {
    std::vector<InputRule> rules;
    for (const at::Tensor& input : example) {
        InputRule rule{"input", input.scalar_type(), {}};
        for (int64_t d = 1; d < input.dim(); ++d) rule.sizes.push_back({input.size(d), input.size(d), ""});
        rules.push_back(std::move(rule));
    }
    return rules;
}

bool fits(const std::vector<InputRule>& rules, const std::vector<at::Tensor>& inputs) {
    try {
        check_inputs(rules, inputs);
        return true;
    } catch (const InputRefused&) {
        return false;
    }
}

template <class Number>
bool is_within(const at::Tensor& numbers, const ValueRange& range) {
    const Number* at = numbers.const_data_ptr<Number>();
    bool is_outside = false;  // without a branch the compiler takes several numbers at once
    for (int64_t i = 0; i < numbers.numel(); ++i) is_outside |= at[i] < range.min || at[i] > range.max;
    return !is_outside;
}

bool is_within(const at::Tensor& input, const ValueRange& range) {
    if (input.numel() == 0) return true;
    if (input.is_contiguous() && input.scalar_type() == at::kLong) return is_within<int64_t>(input, range);
    if (input.is_contiguous() && input.scalar_type() == at::kInt) return is_within<int32_t>(input, range);
    const auto [least, largest] = at::aminmax(input.to(at::kLong));
    return least.item<int64_t>() >= range.min && largest.item<int64_t>() <= range.max;
}

bool is_finite(const std::vector<at::Tensor>& outputs) {
    return std::all_of(outputs.begin(), outputs.end(), [](const at::Tensor& output) {
        if (output.scalar_type() == at::kFloat && output.is_non_overlapping_and_dense()) {
            return is_below(output.const_data_ptr<float>(), static_cast<size_t>(output.numel()),
                            std::numeric_limits<float>::max());
        }
        return !output.is_floating_point() || at::isfinite(output).all().item<bool>();
    });
}

// Whether all in it are tensors: of other things nobody knows how the next answer's would be.
bool has_only_tensors(const c10::IValue& value) {
    if (value.isTensor() || value.isTensorList() || value.isNone()) return true;
    if (value.isTuple()) {
        const auto& elements = value.toTupleRef().elements();
        return std::all_of(elements.begin(), elements.end(), has_only_tensors);
    }
    if (value.isList()) {
        const auto list = value.toListRef();
        return std::all_of(list.begin(), list.end(), has_only_tensors);
    }
    if (value.isGenericDict()) {
        for (const auto& entry : value.toGenericDict()) {
            if (!has_only_tensors(entry.value())) return false;
        }
        return true;
    }
    return false;
}

std::vector<at::Tensor> copies_of(const std::vector<at::Tensor>& inputs) {
    std::vector<at::Tensor> copies;
    for (const at::Tensor& each : inputs) copies.push_back(each.clone());
    return copies;
}

}  // namespace

CheckedModel::CheckedModel(const ModelOptions& options, const std::vector<at::Tensor>& example,
                           const std::vector<std::vector<at::Tensor>>& others)
    : TorchModel(options),
      file_(std::make_shared<FileWindow>(options.plain.path, options.plain.offset, options.plain.size)),
      rules_(options.rules.empty() ? rules_of(example) : options.rules) {
    if (!options.device.is_cpu()) throw std::invalid_argument("a network is compiled for the CPU only");
    if (example.empty()) throw std::invalid_argument("nothing can be compared without an example");
    {
        ScriptModel plain(plain_options(options), file_, example, others);
        if (plain.has_state()) throw std::invalid_argument("a call changes the model: " + plain.state());
        if (options.backend == Backend::openvino) {
            const std::string odd = plain.may_hide_nan();
            if (!odd.empty()) {
                throw std::invalid_argument("NaN may come up within the model (" + odd +
                                            "), which OpenVINO would hide");
            }
        }
        weights_size_ = plain.weights_size();
        precision_error_ = plain.precision_error();
        is_autocast_ = plain.is_autocast();
        const c10::IValue answer = interruptible([&] { return plain.run(copies_of(example)); });
        if (!has_only_tensors(answer)) {
            throw std::invalid_argument("what the model returns has more in it than tensors");
        }
        outputs_ = tensors_of(answer).size();
        structure_ = map_tensors(answer, [](const at::Tensor& tensor) { return at::empty({0}, tensor.options()); });
    }
    quick_ = load_backend(quick_options(options), example);
    const auto ask = [&] { return tensors_of(interruptible([&] { return quick_->run(copies_of(example)); })); };
    const std::vector<at::Tensor> first = ask(), second = ask();
    if (first.size() != outputs_) {
        throw std::invalid_argument("it gives " + std::to_string(first.size()) + " outputs, and as TorchScript " +
                                    std::to_string(outputs_));
    }
    for (size_t i = 0; i < first.size(); ++i) {
        shares_outputs_ |= first[i].numel() > 0 && first[i].const_data_ptr() == second[i].const_data_ptr();
    }
}

c10::IValue CheckedModel::run(const std::vector<at::Tensor>& inputs) {
    if (!was_tried(inputs)) return run_instead(inputs);
    std::vector<at::Tensor> outputs;
    try {
        outputs = tensors_of(quick_->run(inputs));
        if (outputs.size() != outputs_ || !is_finite(outputs)) return run_instead(inputs);
    } catch (const Interrupted&) {
        throw;
    } catch (const std::exception&) {
        const Runs* runs = Runs::current();
        if (runs != nullptr && runs->is_interrupted()) throw;
        return run_instead(inputs);  // which gives the answer, or the words for it
    }
    return in_structure(outputs);
}

// Whether it is among what the quick one was compared for.
bool CheckedModel::was_tried(const std::vector<at::Tensor>& inputs) const {
    if (!fits(rules_, inputs)) return false;
    if (options_.rows_max > 0 && inputs.front().size(0) > options_.rows_max) return false;
    for (size_t i = 0; i < inputs.size(); ++i) {
        const at::ScalarType dtype = inputs[i].scalar_type();
        if (!c10::isIntegralType(dtype, /*includeBool=*/false)) continue;
        const bool has_range = i < options_.value_ranges.size() && options_.value_ranges[i];
        if (has_range && !is_within(inputs[i], *options_.value_ranges[i])) return false;
        if (!has_range && dtype == at::kLong && !is_within(inputs[i], of_32_bits)) return false;
    }
    return is_ordinary(inputs);
}

c10::IValue CheckedModel::in_structure(const std::vector<at::Tensor>& outputs) const {
    size_t next = 0;
    return map_tensors(structure_, [&](const at::Tensor&) {
        const at::Tensor& output = outputs[next++];
        return shares_outputs_ ? output.clone() : output;
    });
}

c10::IValue CheckedModel::run_instead(const std::vector<at::Tensor>& inputs) {
    plain_runs_.fetch_add(1, std::memory_order_relaxed);
    return plain()->run(inputs);
}

std::shared_ptr<ScriptModel> CheckedModel::plain() {
    const std::lock_guard lock(plain_mutex_);
    if (!plain_) plain_ = std::make_shared<ScriptModel>(plain_options(options_), file_);
    return plain_;
}

void CheckedModel::settle() {
    const std::lock_guard lock(plain_mutex_);
    plain_.reset();  // a second copy of the weights
}

std::shared_ptr<TorchModel> CheckedModel::load_again(at::Device device) {
    throw std::invalid_argument("a network that was compiled for the CPU has no copy on " + device.str());
}

}  // namespace pyserve
