// What a compiled program takes: it reads memory as it was compiled to, whatever the tensors say.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensors.h"

namespace pyserve {

struct SizeRule {
    int64_t min;
    int64_t max;
    std::string symbol;  // dimensions of one symbol have one size; "" for none
};

struct InputRule {
    std::string name;  // for messages
    at::ScalarType dtype;
    std::vector<SizeRule> sizes;  // without the batch
};

// An input that the program was not made for. The text is for the client.
class InputRefused : public std::invalid_argument {
  public:
    using std::invalid_argument::invalid_argument;
};

// Throws InputRefused. `inputs` are a request's, each [1, ...]; no rules accept anything.
void check_inputs(const std::vector<InputRule>& rules, const std::vector<at::Tensor>& inputs);

}  // namespace pyserve
