// The border to Python of bindings_fast.h, and its work.
#include "bindings_fast.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "clock.h"

namespace py = pybind11;

namespace pyserve {
namespace {

// Of a batch that has more numbers each answer's text is made behind the loop.
constexpr int64_t batch_numbers_max = 32 << 10;

}  // namespace

bool LanePath::submit(FastConnection& connection, std::unique_ptr<FastCall> taken) {
    auto& call = static_cast<LaneCall&>(*taken);
    const std::shared_ptr<LaneRows> rows = call.lane_route().lane;
    call.lane = rows;
    call.source = this;
    call.url_version = call.lane_route().url_version;
    call.ticket = call.FastCall::form->adopts_answers ? 0 : 1;
    call.arrived_at = connection.arrived_at;
    Inputs inputs;
    inputs.push_back(std::exchange(item_, at::Tensor()));
    const int64_t deadline = call.arrived_at + rows->queue_limit_ns();
    TensorRequest* request = rows->lane().try_submit(std::move(inputs), nullptr, call.arrived_at, deadline);
    if (request == nullptr) return false;
    request->call = &call;
    call.request = RequestPool::ticket_of(*request);
    connection.call = std::move(taken);
    rows->add(call);
    if (call.is_staged()) rows->note_decoded(call.decoding_ns);
    // Its worker need not wait for others that may come in this turn: there were none that it would run with.
    call.was_alone = under_way_++ == 0 && rows->lane().running() == 0;
    if (call.was_alone) {
        alone_ = call.route;
        rows->announce();
    } else {
        touched_.add(rows);
        alone_ = nullptr;
    }
    return true;
}

py::object LanePath::announcer() {
    return py::cast(std::static_pointer_cast<LanePath>(shared_from_this())).attr("announce");
}

void LanePath::begin() {
    touched_.announce();
    const std::shared_ptr<FastRoute> route = std::exchange(alone_, nullptr);
    if (!route || !completions_ || under_way_ != 1) return;
    Lookout& lookout = static_cast<LaneRoute&>(*route).lookout;
    const int64_t wait_ns = lookout.wait_ns();
    if (wait_ns == 0) return;
    const bool has_come = completions_->wait_awake(wait_ns);
    lookout.note_wait(has_come);
    if (!has_come) return;
    try {
        drain_();
    } catch (py::error_already_set& error) {
        tell_fast(error);
    }
}

std::unique_ptr<FrontCall> LanePath::release(FrontCall* ended) {
    ended->lane->remove(*ended);
    --under_way_;
    FastConnection& connection = *static_cast<LaneCall*>(ended)->connection;
    return std::unique_ptr<FrontCall>(static_cast<LaneCall*>(connection.call.release()));
}

bool LanePath::answer(FrontCall& ended, const RowCut& cut, const char* row) {
    auto& call = static_cast<LaneCall&>(ended);
    const int64_t began_at = SteadyClock::now_ns();
    const at::IntArrayRef shape = cut.shape();
    const size_t count = cut.size / cut.output.element_size();
    if (call.FastCall::form->writes_json && count <= fast::numbers_max && cut.output.numel() > batch_numbers_max)
        return false;
    const FastRow made{cut.head, shape.data(), shape.size(), {row, cut.size}, count, call.lane->answer_size_max()};
    if (!answer_with(call, made)) return false;
    if (call.was_alone) call.lane_route().lookout.note_duration(call.finished_at - call.arrived_at);
    if (call.is_staged()) call.lane->note_encoded(SteadyClock::now_ns() - began_at);
    return true;
}

void LanePath::again(FrontCall& ended) {
    auto& call = static_cast<LaneCall&>(ended);
    give_back(call.body_size);
    again_.emplace_back(call.connection, call.data);
}

void LanePath::wake() {
    write_answers();
    for (const auto& [connection, data] : std::exchange(again_, {})) {
        if (connection->protocol().is_none()) continue;
        try {
            connection->is_ready = false;
            connection->protocol().attr("again")(data);
        } catch (py::error_already_set& error) {
            tell_fast(error);
        }
    }
}

py::object LanePath::link(const FrontCall& call) const {
    return static_cast<const LaneCall&>(call).connection->protocol();
}

py::object LanePath::head(const FrontCall& call) const { return static_cast<const LaneCall&>(call).data; }

py::object LanePath::cancel(FastConnection& connection) {
    auto* const call = static_cast<LaneCall*>(connection.call.get());
    if (TensorRequest* request = call->lane->lane().find(call->request)) {
        request->call = nullptr;
        request->try_cancel();
    }
    const std::unique_ptr<FrontCall> gone = release(call);
    give_back(static_cast<LaneCall&>(*gone).body_size);
    return py::make_tuple(gone->lane->owner(), gone->url_version);
}

py::object LanePath::hand_over(FastConnection& connection) {
    auto& call = static_cast<LaneCall&>(*connection.call);
    const std::shared_ptr<LaneRows> rows = call.lane;
    return py::make_tuple(rows->owner(), handed_over(call));
}

void bind_fast_path(py::module_& m) {
    py::class_<LaneRoute, std::shared_ptr<LaneRoute>>(m, "FastRoute")
        .def(py::init([](const std::shared_ptr<LaneRows>& rows, std::string url_version, bool describes_items,
                         py::object form_of, std::string log_head, char kind, std::vector<int64_t> shape,
                         bool takes_json) {
                 return std::make_shared<LaneRoute>(
                     rows, std::move(url_version),
                     FastPlace::make(rows->item().nbytes(), describes_items, std::move(form_of), std::move(log_head),
                                     kind, std::move(shape), takes_json));
             }),
             py::arg("rows"), py::arg("url_version"), py::kw_only(), py::arg("describes_items"), py::arg("form_of"),
             py::arg("log_head"), py::arg("kind"), py::arg("shape"), py::arg("takes_json"));
    py::class_<LanePath, std::shared_ptr<LanePath>>(m, "FastPath")
        .def(py::init([](std::shared_ptr<RowTable> table, py::object budget, py::object call_soon, py::object log,
                         py::object key_until, size_t head_size_max, size_t line_size_max, size_t header_count_max,
                         uint64_t body_size_max, bool takes_ids, size_t coded_size_min, size_t json_size_max) {
                 const FastLimits limits{head_size_max, line_size_max, header_count_max, body_size_max, takes_ids};
                 return std::make_shared<LanePath>(std::move(table), FastOptions{limits, coded_size_min, json_size_max},
                                                   std::move(budget), std::move(call_soon), std::move(log),
                                                   std::move(key_until));
             }),
             py::arg("table"), py::kw_only(), py::arg("budget"), py::arg("call_soon"), py::arg("log"),
             py::arg("key_until"), py::arg("head_size_max"), py::arg("line_size_max"), py::arg("header_count_max"),
             py::arg("body_size_max"), py::arg("takes_ids"), py::arg("coded_size_min"), py::arg("json_size_max"))
        .def("set", &LanePath::set, py::arg("generation"), py::arg("routes"))
        .def(
            "wait_awake",
            [](LanePath& path, const Engine& engine, py::object drain) {
                path.wait_awake(engine.completions, std::move(drain));
            },
            py::arg("engine"), py::arg("drain"))
        .def("announce", [](LanePath& path) { path.announce(); })
        .def("close", [](LanePath& path) { path.close(); })
        .def_property_readonly("request_count", [](const LanePath& path) { return path.request_count(); });
    bind_fast_connection<LanePath>(m);
}

}  // namespace pyserve
