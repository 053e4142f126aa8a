// What bindings.cpp calls to add the functions of bindings_json.cpp to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace pyserve {

void bind_json(pybind11::module_& m);

}  // namespace pyserve
