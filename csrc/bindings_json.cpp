// The border to Python of json_plan.h.
#include "bindings_json.h"

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <utility>

#include "json_plan.h"

namespace py = pybind11;

namespace pyserve {

namespace {

JsonPlan plan_of(const void* text, int kind, int64_t size, int64_t piece, bool takes_numbers) {
    switch (kind) {
        case PyUnicode_1BYTE_KIND:
            return JsonPlanner<uint8_t>(static_cast<const uint8_t*>(text), size, piece, takes_numbers).plan();
        case PyUnicode_2BYTE_KIND:
            return JsonPlanner<uint16_t>(static_cast<const uint16_t*>(text), size, piece, takes_numbers).plan();
        default: return JsonPlanner<uint32_t>(static_cast<const uint32_t*>(text), size, piece, takes_numbers).plan();
    }
}

py::tuple json_plan(const py::str& text, int64_t piece, bool takes_numbers) {
    PyObject* object = text.ptr();
    if (PyUnicode_READY(object) < 0) throw py::error_already_set();
    const void* characters = PyUnicode_DATA(object);
    const int kind = PyUnicode_KIND(object);
    const int64_t size = PyUnicode_GET_LENGTH(object);
    JsonPlan plan;
    {
        const py::gil_scoped_release release;  // a text never changes, and the caller keeps this one
        plan = plan_of(characters, kind, size, piece, takes_numbers);
    }
    py::list places, numbers;
    for (const JsonPlace& place : plan.places) {
        places.append(py::make_tuple(static_cast<int>(place.step), place.begin, place.end));
    }
    for (JsonNumbers& each : plan.numbers) numbers.append(py::cast(std::make_unique<JsonNumbers>(std::move(each))));
    return py::make_tuple(std::move(places), std::move(numbers));
}

int64_t depth_of(const py::buffer& body) {
    const py::buffer_info info = body.request();
    const py::gil_scoped_release release;
    return json_depth(static_cast<const char*>(info.ptr), static_cast<size_t>(info.size * info.itemsize));
}

}  // namespace

void bind_json(py::module_& m) {
    py::class_<JsonNumbers>(m, "JsonNumbers", py::buffer_protocol())
        .def_buffer([](JsonNumbers& numbers) {
            const auto size = static_cast<py::ssize_t>(numbers.bits.size());
            return py::buffer_info(
                numbers.bits.data(), 8,
                numbers.is_float ? py::format_descriptor<double>::format() : py::format_descriptor<int64_t>::format(),
                1, {size}, {py::ssize_t{8}});
        })
        .def_property_readonly("shape",
                               [](const JsonNumbers& numbers) {
                                   py::tuple shape(numbers.shape.size());
                                   for (size_t i = 0; i < numbers.shape.size(); ++i) shape[i] = numbers.shape[i];
                                   return shape;
                               })
        .def_readonly("is_float", &JsonNumbers::is_float);

    m.def("json_plan", &json_plan, py::arg("text"), py::arg("piece"), py::arg("takes_numbers"));
    m.def("json_depth", &depth_of, py::arg("body"));
}

}  // namespace pyserve
