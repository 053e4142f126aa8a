// What a TorchScript graph does to the module that it belongs to.
#pragma once

#include <torch/csrc/jit/api/module.h>

#include <string>

namespace pyserve {

// In a few words what a call of `forward` writes to the module itself: an attribute that it sets, a buffer that it
// changes in place. "" if it writes to nothing but its own tensors. Conservative: what cannot be followed counts as
// written to.
//
// REQUIRES: the module is frozen or its calls are inlined; constants of the graph count as parts of the module.
std::string written_state(const torch::jit::Module& module);

}  // namespace pyserve
