// The border to Python of bindings_fast.h, and its work.
#include "bindings_fast.h"

#include <pthread.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <time.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "clock.h"
#include "json_rows.h"
#include "request_ids.h"

namespace py = pybind11;

namespace pyserve {
namespace {

// Larger answers leave in parts, and more numbers, of one or of a batch, are made text of behind the loop.
constexpr size_t answer_size_max = 1 << 20;
constexpr size_t numbers_max = 16 << 10;
constexpr int64_t batch_numbers_max = 32 << 10;

int64_t second_now() {
    timespec now{};
    clock_gettime(CLOCK_REALTIME, &now);
    return now.tv_sec;
}

RequestIds ids;

std::string_view view_of(PyObject* bytes) {
    return {PyBytes_AS_STRING(bytes), static_cast<size_t>(PyBytes_GET_SIZE(bytes))};
}

// Names that are asked for with every request: made once. They live as long as the process.
PyObject* const size_name = PyUnicode_InternFromString("size");
PyObject* const quick_max_name = PyUnicode_InternFromString("quick_max");

long long number_of(const py::handle& object, PyObject* name) {
    const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), name));
    if (!found) throw py::error_already_set();
    const long long number = PyLong_AsLongLong(found.ptr());
    if (number == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return number;
}

void set_number(const py::handle& object, PyObject* name, long long number) {
    const auto made = py::reinterpret_steal<py::object>(PyLong_FromLongLong(number));
    if (!made || PyObject_SetAttr(object.ptr(), name, made.ptr()) != 0) throw py::error_already_set();
}

// What went wrong in a call of Python's that nobody can be told of.
void tell(py::error_already_set& error) { error.discard_as_unraisable("a request that is answered without Python"); }

extern "C" PyObject* fast_receive(PyObject* self, PyObject* data) {
    auto* held = static_cast<std::shared_ptr<FastConnection>*>(PyCapsule_GetPointer(self, nullptr));
    if (held == nullptr) return nullptr;
    const std::shared_ptr<FastConnection> connection = *held;
    return connection->receive(data);
}

PyMethodDef receive_method = {"data_received", fast_receive, METH_O, "Takes bytes that have come."};

}  // namespace

bool FastPath::take(FastConnection& connection, PyObject* data) {
    if (!is_open_ || table_->generation != generation_) return false;
    FastRequest request;
    if (!reader_.read(view_of(data), request)) return false;
    path_.assign(request.path);
    const auto found = routes_.find(path_);
    if (found == routes_.end()) return false;
    const std::shared_ptr<FastRoute> route = found->second;
    if (!route->lane->has_room() || !keys_.lets_in(request.authorization)) return false;
    std::shared_ptr<FastForm> form;
    const int64_t began_at = SteadyClock::now_ns();
    std::optional<at::Tensor> item = item_of(*route, request, form);
    if (!item || !reserve(request.body.size())) return false;
    auto call = std::make_unique<FastCall>();
    call->connection = connection.shared_from_this();
    call->route = route;
    call->form = std::move(form);
    call->ticket = call->form->adopts_answers ? 0 : 1;
    call->data = py::reinterpret_borrow<py::object>(data);
    call->id_begin = request.id.empty() ? 0 : static_cast<size_t>(request.id.data() - view_of(data).data());
    call->id_size = request.id.size();
    call->body_size = request.body.size();
    call->arrived_at = SteadyClock::now_ns();
    const int64_t decoding_ns = call->arrived_at - began_at;
    submit(connection, std::move(call), std::move(*item));
    if (connection.call && connection.call->is_staged()) route->lane->note_decoded(decoding_ns);
    return connection.is_busy();
}

std::optional<at::Tensor> FastPath::item_of(FastRoute& route, const FastRequest& request,
                                            std::shared_ptr<FastForm>& form) {
    const at::Tensor& like = route.lane->item();
    std::string_view body = request.body;
    if (route.describes_items) {
        uint64_t size = 0;
        if (request.json_size.size() > 7 || !plain::read_length(request.json_size, size)) return {};
        if (size > FastRoute::known_size_max || body.size() < size || body.size() - size != like.nbytes()) return {};
        form = route.form(request, body.substr(0, size));
        body.remove_prefix(size);
    } else {
        form = route.form(request, {});
    }
    if (!form || form->is_left) return {};
    if (form->is_json) {
        if (!route.json || body.size() > options_.json_size_max) return {};
    } else if (body.size() != like.nbytes() || (!route.describes_items && may_be_read(request.content_type, body))) {
        return {};
    }
    at::Tensor item = at::empty(like.sizes(), like.options());
    auto* const place = static_cast<char*>(item.data_ptr());
    if (!form->is_json) {
        std::memcpy(place, body.data(), body.size());
    } else if (!route.json->read(body, place)) {
        return {};
    }
    return item;
}

bool FastPath::reserve(uint64_t size) {
    const long long taken = number_of(budget_, size_name) + static_cast<long long>(size);
    if (taken > number_of(budget_, quick_max_name)) return false;
    set_number(budget_, size_name, taken);
    return true;
}

void FastPath::give_back(uint64_t size) {
    try {
        set_number(budget_, size_name, number_of(budget_, size_name) - static_cast<long long>(size));
    } catch (py::error_already_set& error) {
        tell(error);
    }
}

void FastPath::submit(FastConnection& connection, std::unique_ptr<FastCall> call, at::Tensor item) {
    LaneRows& rows = *call->route->lane;
    call->lane = call->route->lane;
    call->source = this;
    call->url_version = call->route->url_version;
    Inputs inputs;
    inputs.push_back(std::move(item));
    const int64_t deadline = call->arrived_at + rows.queue_limit_ns();
    TensorRequest* request = rows.lane().try_submit(std::move(inputs), nullptr, call->arrived_at, deadline);
    if (request == nullptr) {
        give_back(call->body_size);
        return;
    }
    request->call = call.get();
    call->request = RequestPool::ticket_of(*request);
    rows.add(*call);
    ++request_count_;
    connection.arrived_at = call->arrived_at;
    // Its worker need not wait for others that may come in this turn: there were none that it would run with.
    call->was_alone = under_way_++ == 0 && rows.lane().running() == 0;
    if (call->was_alone) {
        rows.announce();
        alone_ = call->route;
    } else {
        touched_.add(call->lane);
        alone_ = nullptr;
    }
    connection.call = std::move(call);
    if (!std::exchange(is_announcing_, true)) {
        const auto self = std::static_pointer_cast<FastPath>(shared_from_this());
        try {
            call_soon_(py::cast(self).attr("announce"));
        } catch (py::error_already_set& error) {
            tell(error);
            announce();
        }
    }
}

void FastPath::announce() {
    is_announcing_ = false;
    touched_.announce();
    const std::shared_ptr<FastRoute> route = std::exchange(alone_, nullptr);
    if (!route || !completions_ || under_way_ != 1) return;
    const int64_t wait_ns = route->lookout.wait_ns();
    if (wait_ns == 0) return;
    const bool has_come = completions_->wait_awake(wait_ns);
    route->lookout.note_wait(has_come);
    if (!has_come) return;
    try {
        drain_();
    } catch (py::error_already_set& error) {
        tell(error);
    }
}

std::unique_ptr<FrontCall> FastPath::release(FrontCall* ended) {
    ended->lane->remove(*ended);
    --under_way_;
    return std::move(static_cast<FastCall*>(ended)->connection->call);
}

bool FastPath::answer(FrontCall& ended, const RowCut& cut, const char* row) {
    auto& call = static_cast<FastCall&>(ended);
    const int64_t began_at = SteadyClock::now_ns();
    std::string_view numbers(row, cut.size);
    try {
        const FastFrame* frame = frame_of(call, cut, numbers);
        if (frame == nullptr) return false;
        PyObject* made = bytes_of(call, *frame, numbers);
        if (made == nullptr) throw py::error_already_set();
        call.connection->answer = py::reinterpret_steal<py::object>(made);
    } catch (py::error_already_set& error) {
        tell(error);
        return false;
    }
    if (call.was_alone) call.route->lookout.note_duration(call.finished_at - call.arrived_at);
    if (call.is_staged()) call.lane->note_encoded(SteadyClock::now_ns() - began_at);
    give_back(call.body_size);
    answered_.push_back({call.connection, call.route, call.arrived_at});
    return true;
}

const FastFrame* FastPath::frame_of(FastCall& call, const RowCut& cut, std::string_view& numbers) {
    FastForm& form = *call.form;
    if (form.writes_json) {
        const at::IntArrayRef shape = cut.shape();
        if (cut.size / cut.output.element_size() > numbers_max) {
            form.is_left = true;
            return nullptr;
        }
        if (cut.output.numel() > batch_numbers_max) return nullptr;
        numbers_.clear();
        JsonRow json(cut.head.front(), shape.data(), shape.size());
        if (!json.write(numbers.data(), cut.size, numbers_, form.writes_flat)) return nullptr;
        numbers = numbers_;
    }
    const int64_t second = second_now();
    const auto size_of = [&](const FastFrame& frame) {
        return frame.prefix.size() + numbers.size() + frame.suffix.size();
    };
    const FastFrame* frame = &form.frame(cut.head, false, second);
    const size_t size = size_of(*frame);
    if (size > call.lane->answer_size_max()) return nullptr;
    const bool is_large = options_.coded_size_min != 0 && size >= options_.coded_size_min;
    if (size > answer_size_max || (is_large && form.is_coded)) {
        form.is_left = true;
        return nullptr;
    }
    return is_large ? &form.frame(cut.head, true, second) : frame;
}

PyObject* FastPath::bytes_of(const FastCall& call, const FastFrame& frame, std::string_view numbers) {
    const size_t body_size = frame.prefix.size() + numbers.size() + frame.suffix.size();
    std::array<char, 24> text;
    const std::string_view size_text(
        text.data(), static_cast<size_t>(std::to_chars(text.begin(), text.end(), body_size).ptr - text.begin()));
    const size_t id_size = call.id_size != 0 ? call.id_size : RequestIds::size;
    const size_t size = frame.before.size() + id_size + frame.between.size() + size_text.size() + frame.after.size();
    PyObject* made = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size + body_size));
    if (made == nullptr) return nullptr;
    char* to = PyBytes_AS_STRING(made);
    const auto put = [&to](std::string_view part) {
        std::memcpy(to, part.data(), part.size());
        to += part.size();
    };
    put(frame.before);
    if (call.id_size != 0) {
        put(view_of(call.data.ptr()).substr(call.id_begin, call.id_size));
    } else {
        ids.put(to);
        to += RequestIds::size;
    }
    for (const std::string_view part : {std::string_view(frame.between), size_text, std::string_view(frame.after),
                                        std::string_view(frame.prefix), numbers, std::string_view(frame.suffix)})
        put(part);
    return made;
}

void FastPath::again(FrontCall& ended) {
    auto& call = static_cast<FastCall&>(ended);
    give_back(call.body_size);
    again_.emplace_back(call.connection, call.data);
}

void FastPath::wake() {
    if (!answered_.empty()) {
        try {
            note_lines();
        } catch (py::error_already_set& error) {
            tell(error);
        }
        for (const Answered& each : std::exchange(answered_, {})) each.connection->write();
    }
    for (const auto& [connection, data] : std::exchange(again_, {})) {
        if (connection->protocol().is_none()) continue;
        try {
            connection->is_ready = false;
            connection->protocol().attr("again")(data);
        } catch (py::error_already_set& error) {
            tell(error);
        }
    }
}

void FastPath::note_lines() {
    if (log_.is_none()) return;
    constexpr int64_t ns_per_ms = 1'000'000;
    const auto when = log_.attr("when")().cast<std::string>();
    const int64_t now = SteadyClock::now_ns();
    py::list lines(answered_.size());
    std::string line;
    for (size_t at = 0; at < answered_.size(); ++at) {
        const Answered& each = answered_[at];
        line.assign(when).append(" - /").append(each.connection->client()).append(" ").append(each.route->log_head);
        line.append(" ").append(std::to_string((now - each.arrived_at) / ns_per_ms)).append("\n");
        lines[at] = py::str(line);
    }
    log_.attr("put_all")(lines);
}

py::object FastPath::link(const FrontCall& call) const {
    return static_cast<const FastCall&>(call).connection->protocol();
}

py::object FastPath::head(const FrontCall& call) const { return static_cast<const FastCall&>(call).data; }

py::object FastConnection::receiver(const std::shared_ptr<FastConnection>& connection) {
    auto held = std::make_unique<std::shared_ptr<FastConnection>>(connection);
    const auto capsule = py::reinterpret_steal<py::object>(PyCapsule_New(held.get(), nullptr, [](PyObject* self) {
        delete static_cast<std::shared_ptr<FastConnection>*>(PyCapsule_GetPointer(self, nullptr));
    }));
    if (!capsule) throw py::error_already_set();
    held.release();
    return py::reinterpret_steal<py::object>(PyCFunction_New(&receive_method, capsule.ptr()));
}

PyObject* FastConnection::receive(PyObject* data) {
    if (is_ready && !call && PyBytes_CheckExact(data)) {
        try {
            if (path_->take(*this, data)) Py_RETURN_NONE;
        } catch (py::error_already_set& error) {
            tell(error);
        } catch (const std::exception&) {
            // No memory for a tensor, say: the usual way has words for that.
        }
        if (call) Py_RETURN_NONE;
    }
    is_ready = false;
    if (!received_) Py_RETURN_NONE;
    const py::object received = received_;
    return PyObject_CallOneArg(received.ptr(), data);
}

void FastConnection::write() {
    const py::object bytes = std::exchange(answer, py::object()), call_write = write_;
    answered_at = SteadyClock::now_ns();
    if (!bytes || !call_write) return;
    PyObject* const done = PyObject_CallOneArg(call_write.ptr(), bytes.ptr());
    if (done == nullptr) {
        PyErr_WriteUnraisable(call_write.ptr());
    } else {
        Py_DECREF(done);
    }
}

py::object FastConnection::close() {
    py::object cancelled = py::none();
    if (call) {
        if (TensorRequest* request = call->lane->lane().find(call->request)) {
            request->call = nullptr;
            request->try_cancel();
        }
        const std::unique_ptr<FrontCall> gone = path_->release(call.get());
        path_->give_back(static_cast<FastCall&>(*gone).body_size);
        cancelled = py::make_tuple(gone->lane->owner(), gone->url_version);
    }
    is_ready = false;
    protocol_ = py::none();
    received_ = write_ = answer = py::object();
    return cancelled;
}

py::object FastConnection::hand_over() {
    if (!call) return py::none();
    const std::shared_ptr<LaneRows> rows = call->lane;
    return py::make_tuple(rows->owner(), handed_over(*call));
}

void bind_fast_path(py::module_& m) {
    pthread_atfork(nullptr, nullptr, [] { ids.forget(); });
    py::class_<FastRoute, std::shared_ptr<FastRoute>>(m, "FastRoute")
        .def(py::init([](std::shared_ptr<LaneRows> rows, std::string url_version, bool describes_items,
                         py::object form_of, std::string log_head, char kind, std::vector<int64_t> shape,
                         bool takes_json) {
                 std::optional<JsonItem> item;
                 if (takes_json) item.emplace(kind, std::move(shape));
                 if (item && item->byte_count() != rows->item().nbytes()) item.reset();
                 return std::make_shared<FastRoute>(std::move(rows), std::move(url_version), describes_items,
                                                    std::move(form_of), std::move(log_head), std::move(item));
             }),
             py::arg("rows"), py::arg("url_version"), py::kw_only(), py::arg("describes_items"), py::arg("form_of"),
             py::arg("log_head"), py::arg("kind"), py::arg("shape"), py::arg("takes_json"));
    py::class_<FastPath, std::shared_ptr<FastPath>>(m, "FastPath")
        .def(py::init([](std::shared_ptr<RowTable> table, py::object budget, py::object call_soon, py::object log,
                         py::object key_until, size_t head_size_max, size_t line_size_max, size_t header_count_max,
                         uint64_t body_size_max, bool takes_ids, size_t coded_size_min, size_t json_size_max) {
                 const FastLimits limits{head_size_max, line_size_max, header_count_max, body_size_max, takes_ids};
                 return std::make_shared<FastPath>(std::move(table), FastOptions{limits, coded_size_min, json_size_max},
                                                   std::move(budget), std::move(call_soon), std::move(log),
                                                   std::move(key_until));
             }),
             py::arg("table"), py::kw_only(), py::arg("budget"), py::arg("call_soon"), py::arg("log"),
             py::arg("key_until"), py::arg("head_size_max"), py::arg("line_size_max"), py::arg("header_count_max"),
             py::arg("body_size_max"), py::arg("takes_ids"), py::arg("coded_size_min"), py::arg("json_size_max"))
        .def("set", &FastPath::set, py::arg("generation"), py::arg("routes"))
        .def(
            "wait_awake",
            [](FastPath& path, const Engine& engine, py::object drain) {
                path.wait_awake(engine.completions, std::move(drain));
            },
            py::arg("engine"), py::arg("drain"))
        .def("announce", &FastPath::announce)
        .def("close", &FastPath::close)
        .def_property_readonly("request_count", &FastPath::request_count);
    py::class_<FastConnection, std::shared_ptr<FastConnection>>(m, "FastConnection")
        .def(py::init<std::shared_ptr<FastPath>>(), py::arg("path"))
        .def_property_readonly("receive", &FastConnection::receiver)
        .def("open", &FastConnection::open, py::arg("protocol"), py::arg("write"), py::arg("client"))
        .def("close", &FastConnection::close)
        .def("hand_over", &FastConnection::hand_over)
        .def_readwrite("is_ready", &FastConnection::is_ready)
        .def_property_readonly("is_busy", &FastConnection::is_busy)
        .def_readonly("arrived_at", &FastConnection::arrived_at)
        .def_readonly("answered_at", &FastConnection::answered_at);
}

}  // namespace pyserve
