// How far two outputs of one model are apart.
#pragma once

#include <ATen/core/ivalue.h>

#include <vector>

#include "tensors.h"

namespace pyserve {

// The tensors in an output, in order.
std::vector<at::Tensor> tensors_of(const c10::IValue& output);

// The largest difference of floating-point numbers, relative to the largest one expected in their tensor. Infinite where
// the tensors do not correspond; whole numbers are not looked at.
double relative_difference(const c10::IValue& expected, const c10::IValue& got);

// The same for two ways to compute one thing: NaN and infinities have to stand in the same places, and whole numbers to be
// equal. Not for what only speaks of a precision.
double strict_difference(const c10::IValue& expected, const c10::IValue& got);

// What two ways to compute one thing may differ by, as the above count, when they compute at `precision`: see ROUNDING in
// pyserve/proof/comparison.py.
double rounding_of(at::ScalarType precision, bool is_tf32);

}  // namespace pyserve
