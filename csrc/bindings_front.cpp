// The border to Python of front_ring.h: a module of its own, without torch, since front ends load it.
#include "bindings_front.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings_fast_door.h"
#include "front_ledger.h"
#include "http/body_kind.h"
#include "json_item.h"

namespace py = pybind11;

namespace pyserve {
namespace {

// The numbers of a JSON text as they lie in memory, None if it is not exactly an item of that kind and shape.
py::object read_item(const py::handle& text, char kind, const std::vector<int64_t>& shape) {
    const View view(text);
    JsonItem item(kind, shape);
    py::object made = py::reinterpret_steal<py::object>(
        PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(item.byte_count())));
    if (!made) throw py::error_already_set();
    if (!item.read(view.text(), PyBytes_AS_STRING(made.ptr()))) return py::none();
    return made;
}

// The same of an item that begins at `begin`, and where it ends; None if there is none.
py::object read_item_at(const py::handle& text, size_t begin, char kind, const std::vector<int64_t>& shape) {
    const View view(text);
    JsonItem item(kind, shape);
    // Each number has a character at least: what is announced takes no memory before it is there.
    const size_t left = begin < view.text().size() ? view.text().size() - begin : 0;
    if (item.byte_count() / sizeof(int64_t) > left) return py::none();
    py::object made = py::reinterpret_steal<py::object>(
        PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(item.byte_count())));
    if (!made) throw py::error_already_set();
    const size_t end = item.read_at(view.text(), begin, PyBytes_AS_STRING(made.ptr()));
    if (end == 0) return py::none();
    return py::make_tuple(std::move(made), end);
}

// A process's own page of the memory file, and all of them to be read.
class Ledger {
  public:
    Ledger(int fd, size_t count, size_t number, uint64_t size_max)
        : count_(count), all_(fd, 0, checked_count(count, number, size_max) * ledger_page_size, PROT_READ),
          own_(fd, number * ledger_page_size, ledger_page_size),
          view_(all_.place(), own_.place(), count, number, size_max) {}

    bool hold(uint64_t size) { return view_.hold(size); }
    void charge(uint64_t size) { view_.charge(size); }
    void want(int64_t until) { view_.want(until); }
    uint64_t others() const { return view_.others(); }
    uint64_t free() const { return view_.free(); }
    size_t wanting_count(int64_t now) const { return view_.wanting_count(now); }
    size_t busy_count(uint64_t floor, int64_t now) const { return view_.busy_count(floor, now); }
    uint64_t held_by(size_t number) const {
        if (number >= count_) throw py::index_error("there are not so many processes");
        return view_.held_by(number);
    }

  private:
    static size_t checked_count(size_t count, size_t number, uint64_t size_max) {
        if (count < 1 || count > ledger_count_max) throw std::invalid_argument("a ledger is of 1 to 1024 processes");
        if (number >= count) throw std::invalid_argument("a ledger has no such process");
        if (size_max > ledger_size_max) throw std::invalid_argument("a ledger's sum is at most 2^48");
        return count;
    }

    const size_t count_;
    SharedMemory all_, own_;
    LedgerView view_;
};

void bind_ledger(py::module_& m) {
    py::class_<Ledger>(m, "Ledger")
        .def(py::init<int, size_t, size_t, uint64_t>(), py::arg("fd"), py::arg("count"), py::arg("number"),
             py::arg("size_max"))
        .def("hold", &Ledger::hold)
        .def("charge", &Ledger::charge)
        .def("want", &Ledger::want)
        .def("wanting_count", &Ledger::wanting_count)
        .def("busy_count", &Ledger::busy_count)
        .def("held_by", &Ledger::held_by)
        .def_property_readonly("others", &Ledger::others)
        .def_property_readonly("free", &Ledger::free);
}

}  // namespace
}  // namespace pyserve

PYBIND11_MODULE(_front, m) {
    m.doc() = "The rings between front ends and the engine process. See _front.pyi for the contract.";
    m.attr("STATE_SIZE") = pyserve::ring_state_size;
    m.attr("HEAD_SIZE_MAX") = pyserve::ring_head_size_max;
    m.attr("MORE") = pyserve::ring_more;
    m.attr("ROW") = pyserve::ring_row;
    m.attr("LEDGER_PAGE_SIZE") = pyserve::ledger_page_size;
    pyserve::bind_front_link(m);
    pyserve::bind_ledger(m);
    pyserve::bind_fast_door(m);
    m.def(
        "may_be_read",
        [](const std::string& content_type, const py::handle& body) {
            return pyserve::may_be_read(content_type, pyserve::View(body).text());
        },
        py::arg("content_type"), py::arg("body"));
    m.def("read_item", &pyserve::read_item, py::arg("text"), py::arg("kind"), py::arg("shape"));
    m.def("read_item_at", &pyserve::read_item_at, py::arg("text"), py::arg("begin"), py::arg("kind"), py::arg("shape"));
}
