// The border to Python of bindings_rows.h, and the rings as the engine process has them.
#include "bindings_rows.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"

namespace py = pybind11;

namespace pyserve {
namespace {

// Those that wait, or run, for too long at `now`; those that have ended are on their way.
py::list take_overdue(const LaneRows& rows, int64_t now, int64_t queue_limit_ns, int64_t run_limit_ns) {
    py::list out;
    for (FrontCall *call = rows.first(), *next = nullptr; call != nullptr; call = next) {
        next = call->after;
        if (now - call->arrived_at < std::min(queue_limit_ns, run_limit_ns)) continue;
        const int64_t since = started_at(rows.lane(), call->request);
        const bool is_over =
            since > 0 ? now - since >= run_limit_ns : since == 0 && now - call->arrived_at >= queue_limit_ns;
        if (is_over) out.append(handed_over(*call));
    }
    return out;
}

py::list take_all(const LaneRows& rows, bool waiting_only) {
    py::list out;
    for (FrontCall *call = rows.first(), *next = nullptr; call != nullptr; call = next) {
        next = call->after;
        if (!waiting_only || started_at(rows.lane(), call->request) == 0) out.append(handed_over(*call));
    }
    return out;
}

// Whether there is still such a request; `owner` has it then.
bool give(const LaneRows& rows, uint64_t ticket, const py::object& owner) {
    TensorRequest* request = rows.lane().find(ticket);
    if (request == nullptr || request->owner != nullptr) return false;
    request->owner = owner.inc_ref().ptr();  // until drain gives it back
    return true;
}

py::object lane_and_version(const FrontCall& call) { return py::make_tuple(call.lane->owner(), call.url_version); }

}  // namespace

void bind_front_rows(py::module_& m) {
    bind_front_link(m);
    py::class_<LaneRows, std::shared_ptr<LaneRows>>(m, "LaneRows")
        .def(py::init<py::object, py::object, std::vector<double>, std::vector<double>>(), py::arg("lane"),
             py::arg("owner"), py::arg("bounds"), py::arg("stage_bounds"))
        .def("take_stages",
             [](LaneRows& rows) {
                 const auto [decoded, encoded] = rows.take_stages();
                 const auto told = [](const StageCounts& stage) { return py::make_tuple(stage.counts, stage.total_s); };
                 return py::make_tuple(told(decoded), told(encoded));
             })
        .def("set_limits", &LaneRows::set_limits, py::kw_only(), py::arg("is_open"), py::arg("waiting_max"),
             py::arg("queue_limit_ns"), py::arg("answer_size_max"))
        .def("take_overdue", &take_overdue, py::arg("now"), py::arg("queue_limit_ns"), py::arg("run_limit_ns"))
        .def("take_all", &take_all, py::kw_only(), py::arg("waiting_only"))
        .def("give", &give, py::arg("ticket"), py::arg("owner"))
        .def_property_readonly("count", &LaneRows::count)
        .def_property_readonly("is_open", &LaneRows::is_open)
        .def_readwrite("is_watched", &LaneRows::is_watched);
    py::class_<RowTable, std::shared_ptr<RowTable>>(m, "RowTable")
        .def(py::init<>())
        .def(
            "set",
            [](RowTable& table, uint64_t generation,
               const std::vector<std::pair<std::shared_ptr<LaneRows>, std::string>>& routes) {
                table.generation = generation;
                table.routes.clear();
                for (const auto& [lane, url_version] : routes) table.routes.push_back({lane, url_version});
            },
            py::arg("generation"), py::arg("routes"));
    py::class_<FrontRows, std::shared_ptr<FrontRows>>(m, "FrontRows")
        .def(py::init<py::object, std::shared_ptr<Writer>, int, std::shared_ptr<RowTable>, uint64_t, uint64_t>(),
             py::arg("link"), py::arg("writer"), py::arg("wake"), py::arg("table"), py::arg("count_max"),
             py::arg("size_max"))
        .def("read_from", [](const std::shared_ptr<FrontRows>& rows, Reader& reader) { reader.give_rows_to(rows); })
        .def("cancel",
             [](FrontRows& rows, uint64_t ticket) -> py::object {
                 const auto call = rows.cancel(ticket);
                 return call ? lane_and_version(*call) : py::none();
             })
        .def("close",
             [](FrontRows& rows) {
                 py::list out;
                 for (const auto& call : rows.close()) out.append(lane_and_version(*call));
                 return out;
             })
        .def_property_readonly("count", &FrontRows::count)
        .def_property_readonly("size", &FrontRows::size)
        .def_property_readonly("request_count", &FrontRows::request_count);
}

}  // namespace pyserve
