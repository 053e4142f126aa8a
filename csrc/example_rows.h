// Items like an example, with other numbers: what batches are made of whose rows must not influence each other.
#pragma once

#include <cstddef>
#include <vector>

#include "staging.h"

namespace pyserve {

// `count` items, each [1, ...], the same ones at every call. Floating-point numbers are drawn at random around 0, others
// from those that the example has: they may be places in a table.
std::vector<Inputs> rows_like(const Inputs& example, size_t count);

// Whether no two of the first items differ: nothing is seen of what one does to another.
bool are_alike(const std::vector<Inputs>& rows);

}  // namespace pyserve
