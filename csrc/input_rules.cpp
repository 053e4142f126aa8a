#include "input_rules.h"

#include <limits>
#include <map>
#include <sstream>

namespace pyserve {
namespace {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw InputRefused(text.str());
}

std::string limits_of(const SizeRule& rule) {
    if (rule.min == rule.max) return std::to_string(rule.min);
    if (rule.max == std::numeric_limits<int64_t>::max()) return std::to_string(rule.min) + " or more";
    return std::to_string(rule.min) + " to " + std::to_string(rule.max);
}

}  // namespace

void check_inputs(const std::vector<InputRule>& rules, const std::vector<at::Tensor>& inputs) {
    if (rules.empty()) return;
    if (rules.size() != inputs.size()) {
        refuse("the model takes ", rules.size(), " inputs, got ", inputs.size());
    }
    struct Seen {
        int64_t size;
        const std::string* input;
        size_t dimension;
    };
    std::map<std::string, Seen> sizes;
    for (size_t i = 0; i < rules.size(); ++i) {
        const InputRule& rule = rules[i];
        const at::Tensor& input = inputs[i];
        if (input.scalar_type() != rule.dtype) {
            refuse(rule.name, ": the model takes ", rule.dtype, ", got ", input.scalar_type());
        }
        if (static_cast<size_t>(input.dim()) != rule.sizes.size() + 1) {
            refuse(rule.name, ": the model takes ", rule.sizes.size(), " dimensions, got ", input.dim() - 1);
        }
        for (size_t d = 0; d < rule.sizes.size(); ++d) {
            const SizeRule& limit = rule.sizes[d];
            const int64_t size = input.size(static_cast<int64_t>(d) + 1);
            if (size < limit.min || size > limit.max) {
                refuse(rule.name, ": dimension ", d + 1, " has size ", size, "; the model was made for ",
                       limits_of(limit));
            }
            if (limit.symbol.empty()) continue;
            const auto [first, is_new] = sizes.try_emplace(limit.symbol, Seen{size, &rule.name, d + 1});
            if (!is_new && first->second.size != size) {
                refuse(rule.name, ": dimension ", d + 1, " has size ", size, ", but must be as large as dimension ",
                       first->second.dimension, " of ", *first->second.input, ", which has ", first->second.size);
            }
        }
    }
}

}  // namespace pyserve
