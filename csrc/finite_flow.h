// Where in a graph a number may become NaN or infinite though every number that goes in is ordinary.
#pragma once

#include <torch/csrc/jit/api/module.h>

#include <string>

namespace pyserve {

// The first operator (its name, such as "log") that may do so and whose result reaches an operator that oneDNN has its own
// kernel for; "weights" or "infinity" for a constant; "" if there is none. Such a kernel turns NaN into another number.
// Conservative: an operator that is not known to keep finite numbers finite counts.
//
// REQUIRES: the module is frozen.
std::string may_hide_nan(const torch::jit::Module& module);

}  // namespace pyserve
