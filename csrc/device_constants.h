// Devices that a model's code names. A trace has a constant wherever the model asked a tensor for its device: made on the
// CPU it creates positions and masks there for ever, and fails or goes back and forth on any other device.
#pragma once

#include <c10/core/Device.h>
#include <torch/csrc/jit/api/module.h>

#include <optional>

namespace pyserve {

// Whether it names another device than `device`.
bool names_other_devices(const torch::jit::Module& module, c10::Device device);

// Whether its code can take one of several ways. What such code does for other inputs is not seen by running it.
bool has_branches(const torch::jit::Module& module);

// Whether parts of it run in threads of their own (torch.jit.fork), where no stream is current but the device's default.
bool has_forks(const torch::jit::Module& module);

// Makes it name `to` in place of `from`, or of every other device without one. Devices that are compared stay what they
// are. REQUIRES: it has not run.
void rename_devices(torch::jit::Module& module, std::optional<c10::Device> from, c10::Device to);

}  // namespace pyserve
