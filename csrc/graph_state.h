// What a TorchScript graph does to the module that it belongs to.
#pragma once

#include <torch/csrc/jit/api/module.h>

#include <string>

namespace pyserve {

// What is written about a graph that seeds torch's random numbers, which all threads of the process draw from.
inline constexpr const char* seeded_state = "forward seeds torch's random numbers";

// And of one that makes nested tensors: torch's operators for them end the process for an item that is masked throughout.
inline constexpr const char* nested_state = "forward makes nested tensors";

// In a few words what a call of `forward` writes to the module itself: an attribute that it sets, a buffer that it
// changes in place; or one of the two above. "" if it writes to nothing but its own tensors. Conservative: what cannot be
// followed counts as written to.
//
// REQUIRES: the module is frozen or its calls are inlined; constants of the graph count as parts of the module.
std::string written_state(const torch::jit::Module& module);

}  // namespace pyserve
