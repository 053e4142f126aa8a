// Requests that are answered without Python: from the bytes of a plain request to an item, and from a row of numbers to the
// bytes of its answer. What runs the item, and where, its subclasses know.
//
//     transport ──> FastConnection::receive ──> FastPath::take ──> the engine ──> FastPath::answer_with ──> transport
//                       │ not plainly right, or something is to be said that only endpoints know
//                       └──> Http1Protocol.data_received, as it came
//
// What is taken is decided before anything is done, so that what is not taken goes its usual way as if nobody had looked.
// One request of a connection is under way here at most. Whatever else happens on its connection meanwhile, it is
// handed over first: it becomes the exchange that it would have been (`FastProtocol.adopt`), among the protocol's own. So
// is one that does not come to an answer of its model.
//
// What content types mean, and how the heads of answers look, Python says once for requests that look alike.
//
// Without torch. Threads: loop thread only, with the GIL.
#pragma once

#include <pthread.h>
#include <pybind11/pybind11.h>

#include <array>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bindings_fast_forms.h"
#include "clock.h"
#include "http/body_kind.h"
#include "http/fast_request.h"
#include "json_rows.h"
#include "request_ids.h"

namespace pyserve {

class FastConnection;

// What went wrong in a call of Python's that nobody can be told of.
inline void tell_fast(py::error_already_set& error) {
    error.discard_as_unraisable("a request that is answered without Python");
}

inline std::string_view view_of(PyObject* bytes) {
    return {PyBytes_AS_STRING(bytes), static_cast<size_t>(PyBytes_GET_SIZE(bytes))};
}

// A request that was taken and is not answered.
struct FastCall {
    FastCall() = default;
    FastCall(const FastCall&) = delete;
    FastCall& operator=(const FastCall&) = delete;
    virtual ~FastCall() = default;

    std::shared_ptr<FastConnection> connection;
    std::shared_ptr<FastRoute> route;
    std::shared_ptr<FastForm> form;
    py::object data;                                  // the request as it came
    size_t id_begin = 0, id_size = 0, head_size = 0;  // in it; no id if the client sent none
    uint64_t body_size = 0;
    int64_t decoding_ns = 0;  // what it took to make the item
    std::array<char, RequestIds::size> drawn_id{};

    std::string_view id() const {
        if (id_size == 0) return {drawn_id.data(), drawn_id.size()};
        return view_of(data.ptr()).substr(id_begin, id_size);
    }
    // Whether it counts what it takes to decode and encode: of bytes that become bytes nobody does, nor of what is described.
    bool is_staged() const { return !route->describes_items && (form->is_json || form->writes_json); }
};

// What never changes of a listener's way.
struct FastOptions {
    FastLimits limits;
    size_t coded_size_min = 0;  // answers from here on may be compressed; 0 if none is
    size_t json_size_max = 0;   // of a body
};

// What an answer is made of: numbers as they lie in memory, and what kind and sizes they have.
struct FastRow {
    std::string_view head;  // "f16", "q3,224"
    const int64_t* shape;
    size_t rank;
    std::string_view bytes;
    size_t count;            // of numbers
    size_t answer_size_max;  // of a body
};

// Of all connections of one listener.
class FastPath {
  public:
    // `budget` has `size` and `quick_max`, as of bodies in memory; `call_soon` is the loop's; `log` has when() and
    // put_all(lines), or is None.
    FastPath(FastOptions options, py::object budget, py::object call_soon, py::object log)
        : options_(options), reader_(options.limits), budget_(std::move(budget)), call_soon_(std::move(call_soon)),
          log_(std::move(log)) {}
    virtual ~FastPath() = default;
    FastPath(const FastPath&) = delete;
    FastPath& operator=(const FastPath&) = delete;

    // Takes nothing any more.
    void close() {
        is_open_ = false;
        routes_.clear();
    }
    uint64_t request_count() const { return request_count_; }

    // Whether `data`, all that has come, is taken. If it throws it was not.
    bool take(FastConnection& connection, PyObject* data);
    // All that was taken in this turn of the loop is to be worked on.
    void announce() {
        is_announcing_ = false;
        begin();
    }

    // The client of a connection's request has gone. What Python has to do about that, or None.
    virtual py::object cancel(FastConnection& connection) = 0;
    // Its request is Python's from here on: who takes it over, and what that is told; None in place of the former if it has
    // to be asked again.
    virtual py::object hand_over(FastConnection& connection) = 0;

  protected:
    // Whether requests to it are taken now.
    virtual bool has_room(const FastRoute& route) const = 0;
    virtual std::unique_ptr<FastCall> new_call() = 0;
    // Where an item's bytes are to be put.
    virtual char* new_item(const FastRoute& route) = 0;
    // Gives that item to the engine; false if it does not take it.
    virtual bool submit(FastConnection& connection, std::unique_ptr<FastCall> call) = 0;
    // Has the engine begin with what was submitted.
    virtual void begin() = 0;
    // `announce`, for the loop.
    virtual py::object announcer() = 0;

    void set_routes(std::unordered_map<std::string, std::shared_ptr<FastRoute>> routes) { routes_ = std::move(routes); }
    // Makes the answer, which `write_answers` writes. False if others have to make it.
    bool answer_with(FastCall& call, const FastRow& row);
    void write_answers();
    // Gives bytes of a body back.
    void give_back(uint64_t size);

    KnownKeys keys_;

  private:
    // The form of a request whose item was put where `new_item` said; nullptr if it is not plainly what the route takes.
    std::shared_ptr<FastForm> decode(FastRoute& route, const FastRequest& request);
    // The numbers of an answer in the form that it has, and what stands around them. nullptr if others have to make it.
    const FastFrame* frame_of(FastCall& call, const FastRow& row, std::string_view& numbers);
    static PyObject* bytes_of(const FastCall& call, const FastFrame& frame, std::string_view numbers);
    bool reserve(uint64_t size);
    void announce_soon();
    void note_lines();

    const FastOptions options_;
    FastRequestReader reader_;
    const py::object budget_, call_soon_, log_;
    bool is_open_ = true, is_announcing_ = false;
    uint64_t request_count_ = 0;
    std::unordered_map<std::string, std::shared_ptr<FastRoute>> routes_;
    std::string path_, numbers_;  // kept, so that they need no new memory

    struct Answered {
        std::shared_ptr<FastConnection> connection;
        std::shared_ptr<FastRoute> route;
    };
    std::vector<Answered> answered_;
};

// One connection's part.
class FastConnection : public std::enable_shared_from_this<FastConnection> {
  public:
    explicit FastConnection(std::shared_ptr<FastPath> path) : path_(std::move(path)) {}

    // What a transport calls with the bytes that have come.
    static py::object receiver(const std::shared_ptr<FastConnection>& connection);

    // `protocol` has received(data), adopt(ticket, data) and again(data); `write` is its transport's. Until `close` they
    // keep each other.
    void open(py::object protocol, py::object write, std::string client) {
        protocol_ = std::move(protocol);
        received_ = protocol_.attr("received");
        write_ = std::move(write);
        client_ = std::move(client);
    }
    // Its client has gone. What Python has to do about a request that is cancelled by that, or None.
    py::object close() {
        py::object cancelled = call ? path_->cancel(*this) : py::object(py::none());
        is_ready = false;
        protocol_ = py::none();
        received_ = write_ = answer = py::object();
        return cancelled;
    }
    // What is under way, as of `FastPath::hand_over`; None if nothing is.
    py::object hand_over() { return call ? path_->hand_over(*this) : py::object(py::none()); }

    PyObject* receive(PyObject* data);
    void write();

    bool is_busy() const { return call != nullptr; }
    const std::string& client() const { return client_; }
    py::object protocol() const { return protocol_; }

    bool is_ready = false;  // the protocol has nothing of its own under way
    std::unique_ptr<FastCall> call;
    py::object answer;        // what `write` writes
    int64_t arrived_at = 0;   // of the last request that was taken, ns
    int64_t answered_at = 0;  // of the last answer, ns; 0 before the first

  private:
    const std::shared_ptr<FastPath> path_;
    py::object protocol_ = py::none(), received_, write_;
    std::string client_;
};

namespace fast {

// Larger answers leave in parts, and more numbers are made text of behind the loop.
inline constexpr size_t answer_size_max = 1 << 20;
inline constexpr size_t numbers_max = 16 << 10;

inline RequestIds ids;

// Names that are asked for with every request: made once. They live as long as the process.
inline PyObject* const size_name = PyUnicode_InternFromString("size");
inline PyObject* const quick_max_name = PyUnicode_InternFromString("quick_max");

inline long long number_of(const py::handle& object, PyObject* name) {
    const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), name));
    if (!found) throw py::error_already_set();
    const long long number = PyLong_AsLongLong(found.ptr());
    if (number == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return number;
}

inline void set_number(const py::handle& object, PyObject* name, long long number) {
    const auto made = py::reinterpret_steal<py::object>(PyLong_FromLongLong(number));
    if (!made || PyObject_SetAttr(object.ptr(), name, made.ptr()) != 0) throw py::error_already_set();
}

inline PyObject* receive(PyObject* self, PyObject* data) {
    auto* held = static_cast<std::shared_ptr<FastConnection>*>(PyCapsule_GetPointer(self, nullptr));
    if (held == nullptr) return nullptr;
    const std::shared_ptr<FastConnection> connection = *held;
    return connection->receive(data);
}

inline PyMethodDef receive_method = {"data_received", receive, METH_O, "Takes bytes that have come."};

}  // namespace fast

inline bool FastPath::take(FastConnection& connection, PyObject* data) {
    FastRequest request;
    if (!is_open_ || !reader_.read(view_of(data), request)) return false;
    path_.assign(request.path);
    const auto found = routes_.find(path_);
    if (found == routes_.end()) return false;
    const std::shared_ptr<FastRoute> route = found->second;
    if (!has_room(*route) || !keys_.lets_in(request.authorization)) return false;
    const int64_t began_at = SteadyClock::now_ns();
    std::shared_ptr<FastForm> form = decode(*route, request);
    if (!form) return false;
    std::unique_ptr<FastCall> call = new_call();
    call->connection = connection.shared_from_this();
    call->route = route;
    call->form = std::move(form);
    call->data = py::reinterpret_borrow<py::object>(data);
    call->id_size = request.id.size();
    call->id_begin = request.id.empty() ? 0 : static_cast<size_t>(request.id.data() - view_of(data).data());
    if (request.id.empty()) fast::ids.put(call->drawn_id.data());
    call->head_size = request.head_size;
    call->body_size = request.body.size();
    if (!reserve(request.body.size())) return false;
    connection.arrived_at = SteadyClock::now_ns();
    call->decoding_ns = connection.arrived_at - began_at;
    try {
        if (!submit(connection, std::move(call))) {
            give_back(request.body.size());
            return false;
        }
    } catch (...) {
        if (!connection.is_busy()) give_back(request.body.size());
        throw;
    }
    ++request_count_;
    announce_soon();
    return connection.is_busy();
}

inline void FastPath::announce_soon() {
    if (std::exchange(is_announcing_, true)) return;
    try {
        call_soon_(announcer());
    } catch (py::error_already_set& error) {
        tell_fast(error);
        announce();
    }
}

inline std::shared_ptr<FastForm> FastPath::decode(FastRoute& route, const FastRequest& request) {
    std::string_view body = request.body;
    std::shared_ptr<FastForm> form;
    if (route.describes_items) {
        uint64_t size = 0;
        if (request.json_size.size() > 7 || !plain::read_length(request.json_size, size)) return {};
        if (size > FastRoute::known_size_max || body.size() < size || body.size() - size != route.item_size) return {};
        form = route.form(request, body.substr(0, size));
        body.remove_prefix(size);
    } else {
        form = route.form(request, {});
    }
    if (!form || form->is_left) return {};
    if (form->is_json) {
        if (!route.json || body.size() > options_.json_size_max) return {};
        return route.json->read(body, new_item(route)) ? form : nullptr;
    }
    if (body.size() != route.item_size || (!route.describes_items && may_be_read(request.content_type, body)))
        return {};
    std::memcpy(new_item(route), body.data(), body.size());
    return form;
}

inline bool FastPath::reserve(uint64_t size) {
    const long long taken = fast::number_of(budget_, fast::size_name) + static_cast<long long>(size);
    if (taken > fast::number_of(budget_, fast::quick_max_name)) return false;
    fast::set_number(budget_, fast::size_name, taken);
    return true;
}

inline void FastPath::give_back(uint64_t size) {
    try {
        const long long taken = fast::number_of(budget_, fast::size_name);
        fast::set_number(budget_, fast::size_name, taken - static_cast<long long>(size));
    } catch (py::error_already_set& error) {
        tell_fast(error);
    }
}

inline bool FastPath::answer_with(FastCall& call, const FastRow& row) {
    std::string_view numbers = row.bytes;
    try {
        const FastFrame* frame = frame_of(call, row, numbers);
        if (frame == nullptr) return false;
        PyObject* made = bytes_of(call, *frame, numbers);
        if (made == nullptr) throw py::error_already_set();
        call.connection->answer = py::reinterpret_steal<py::object>(made);
    } catch (py::error_already_set& error) {
        tell_fast(error);
        return false;
    }
    give_back(call.body_size);
    answered_.push_back({call.connection, call.route});
    return true;
}

inline const FastFrame* FastPath::frame_of(FastCall& call, const FastRow& row, std::string_view& numbers) {
    FastForm& form = *call.form;
    if (form.writes_json) {
        if (row.count > fast::numbers_max) {
            form.is_left = true;
            return nullptr;
        }
        numbers_.clear();
        JsonRow json(row.head.front(), row.shape, row.rank);
        if (!json.write(row.bytes.data(), row.bytes.size(), numbers_, form.writes_flat)) return nullptr;
        numbers = numbers_;
    }
    const int64_t second = wall_time().tv_sec;
    const FastFrame* frame = &form.frame(row.head, false, second);
    const size_t size = frame->prefix.size() + numbers.size() + frame->suffix.size();
    if (size > row.answer_size_max) return nullptr;
    const bool is_large = options_.coded_size_min != 0 && size >= options_.coded_size_min;
    if (size > fast::answer_size_max || (is_large && form.is_coded)) {
        form.is_left = true;
        return nullptr;
    }
    return is_large ? &form.frame(row.head, true, second) : frame;
}

inline PyObject* FastPath::bytes_of(const FastCall& call, const FastFrame& frame, std::string_view numbers) {
    const size_t body_size = frame.prefix.size() + numbers.size() + frame.suffix.size();
    std::array<char, 24> text;
    const std::string_view size_text(
        text.data(), static_cast<size_t>(std::to_chars(text.begin(), text.end(), body_size).ptr - text.begin()));
    const std::string_view id = call.id();
    const size_t size = frame.before.size() + id.size() + frame.between.size() + size_text.size() + frame.after.size();
    PyObject* made = PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size + body_size));
    if (made == nullptr) return nullptr;
    char* to = PyBytes_AS_STRING(made);
    for (const std::string_view part :
         {std::string_view(frame.before), id, std::string_view(frame.between), size_text, std::string_view(frame.after),
          std::string_view(frame.prefix), numbers, std::string_view(frame.suffix)}) {
        std::memcpy(to, part.data(), part.size());
        to += part.size();
    }
    return made;
}

inline void FastPath::write_answers() {
    if (answered_.empty()) return;
    try {
        note_lines();
    } catch (py::error_already_set& error) {
        tell_fast(error);
    }
    for (const Answered& each : std::exchange(answered_, {})) each.connection->write();
}

inline void FastPath::note_lines() {
    if (log_.is_none()) return;
    constexpr int64_t ns_per_ms = 1'000'000;
    const auto when = log_.attr("when")().cast<std::string>();
    const int64_t now = SteadyClock::now_ns();
    py::list lines(answered_.size());
    std::string line;
    for (size_t at = 0; at < answered_.size(); ++at) {
        const FastConnection& connection = *answered_[at].connection;
        line.assign(when).append(" - /").append(connection.client()).append(" ").append(answered_[at].route->log_head);
        line.append(" ").append(std::to_string((now - connection.arrived_at) / ns_per_ms)).append("\n");
        lines[at] = py::str(line);
    }
    log_.attr("put_all")(lines);
}

inline py::object FastConnection::receiver(const std::shared_ptr<FastConnection>& connection) {
    auto held = std::make_unique<std::shared_ptr<FastConnection>>(connection);
    const auto capsule = py::reinterpret_steal<py::object>(PyCapsule_New(held.get(), nullptr, [](PyObject* self) {
        delete static_cast<std::shared_ptr<FastConnection>*>(PyCapsule_GetPointer(self, nullptr));
    }));
    if (!capsule) throw py::error_already_set();
    held.release();
    return py::reinterpret_steal<py::object>(PyCFunction_New(&fast::receive_method, capsule.ptr()));
}

inline PyObject* FastConnection::receive(PyObject* data) {
    if (is_ready && !call && PyBytes_CheckExact(data)) {
        try {
            if (path_->take(*this, data)) Py_RETURN_NONE;
        } catch (py::error_already_set& error) {
            tell_fast(error);
        } catch (const std::exception&) {
            // No memory for an item, say: the usual way has words for that.
        }
        if (call) Py_RETURN_NONE;
    }
    is_ready = false;
    if (!received_) Py_RETURN_NONE;
    const py::object received = received_;
    return PyObject_CallOneArg(received.ptr(), data);
}

inline void FastConnection::write() {
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

// Of the module that it is called by alone: both modules that have this class load beside each other.
template <class Path>
void bind_fast_connection(py::module_& m) {
    pthread_atfork(nullptr, nullptr, [] { fast::ids.forget(); });
    py::class_<FastConnection, std::shared_ptr<FastConnection>>(m, "FastConnection", py::module_local())
        .def(py::init([](const std::shared_ptr<Path>& path) { return std::make_shared<FastConnection>(path); }),
             py::arg("path"))
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
