// The border to Python of the python lane: both ends of the wire to worker processes.
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "worker_channel.h"

namespace pyserve {
namespace {

const char* name_of(ProcessState state) {
    switch (state) {
        case ProcessState::ready: return "ready";
        case ProcessState::stopped: return "stopped";
        case ProcessState::died: return "died";
    }
    return "unknown";
}

uint64_t submit_bytes(ProcessLane& lane, const py::object& owner, const py::bytes& head, const py::object& body,
                      uint32_t flags, int64_t arrived_at, int64_t deadline) {
    auto buffer = buffer_of(body);
    const std::string_view content(static_cast<const char*>(buffer->buf), static_cast<size_t>(buffer->len));
    const auto text = static_cast<std::string_view>(head);
    if (text.size() > head_size_max)
        throw py::value_error("the head of a request may have " + std::to_string(head_size_max) + " bytes, not " +
                              std::to_string(text.size()));
    if (content.size() > body_size_max)
        throw py::value_error("the body of a request may have " + std::to_string(body_size_max) + " bytes, not " +
                              std::to_string(content.size()));
    ProcessRequest* request = lane.try_submit(text, content, flags, owner.ptr(), arrived_at, deadline);
    if (request == nullptr) throw std::overflow_error("the queue is full");
    if (content.size() > body_inline_max) request->buffer = buffer.release();
    owner.inc_ref();  // until drain gives it back
    return ProcessPool::ticket_of(*request);
}

py::list process_workers(const ProcessLane& lane) {
    py::list rows;
    for (const ProcessWorkerRow& row : lane.workers()) {
        py::dict out;
        out["id"] = row.id;
        out["state"] = row.is_stopping && row.state == ProcessState::ready ? "stopping" : name_of(row.state);
        out["running_since"] = row.running_since;
        out["batches"] = row.batches;
        out["died_in_rerun"] = row.died_in_rerun;
        out["error"] = row.error;
        rows.append(out);
    }
    return rows;
}

struct WorkerBatch {
    uint64_t id;
    uint32_t intra_op_threads;
    py::list items;  // (ticket, flags, head, body)
};

std::optional<WorkerBatch> receive(WorkerChannel& channel, int timeout_ms) {
    IncomingBatch batch;
    for (;;) {
        WorkerChannel::Got got;
        {
            const py::gil_scoped_release release;  // it waits
            got = channel.receive(batch, timeout_ms);
        }
        if (got == WorkerChannel::Got::timeout) return std::nullopt;
        if (got == WorkerChannel::Got::interrupted) {
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
            continue;
        }
        if (got == WorkerChannel::Got::batch) break;
        PyErr_SetString(PyExc_EOFError, "no more batches come");
        throw py::error_already_set();
    }
    WorkerBatch out{batch.id, batch.intra_op_threads, py::list(batch.items.size())};
    for (size_t i = 0; i < batch.items.size(); ++i) {
        const IncomingItem& item = batch.items[i];
        const bool is_inline = item.offset == in_frame;
        auto body = py::reinterpret_steal<py::object>(PyByteArray_FromStringAndSize(
            is_inline ? item.body.data() : nullptr, static_cast<Py_ssize_t>(item.body_size)));
        if (!body) throw py::error_already_set();
        if (!is_inline && !channel.read_body(item, PyByteArray_AS_STRING(body.ptr())))
            throw std::runtime_error("a body is not in the request memory");
        out.items[i] = py::make_tuple(item.ticket, item.flags, py::bytes(item.head), body);
    }
    return out;
}

void send_answers(WorkerChannel& channel, uint64_t batch, const py::list& answers) {
    std::vector<OutgoingAnswer> out;
    std::vector<std::unique_ptr<Py_buffer, void (*)(Py_buffer*)>> held;
    out.reserve(answers.size());
    held.reserve(answers.size());
    for (const py::handle& each : answers) {
        if (!py::isinstance<py::tuple>(each) || py::len(each) != 5)
            throw py::value_error("an answer is (ticket, kind, status, head, body)");
        const auto answer = py::reinterpret_borrow<py::tuple>(each);
        OutgoingAnswer& made = out.emplace_back();
        try {
            made.ticket = answer[0].cast<uint64_t>();
            made.kind = static_cast<AnswerKind>(answer[1].cast<uint16_t>());
            made.status = answer[2].cast<uint16_t>();
            made.head = answer[3].cast<std::string_view>();
        } catch (const py::cast_error&) {
            throw py::type_error("an answer is (ticket, kind, status, head, body): three numbers and two of bytes");
        }
        if (made.kind > AnswerKind::last)
            throw py::value_error("the kind of an answer is 0, 1, 2 or 3, not " +
                                  std::to_string(static_cast<int>(made.kind)));
        held.push_back(buffer_of(answer[4]));
        made.body = {static_cast<const char*>(held.back()->buf), static_cast<size_t>(held.back()->len)};
    }
    bool sent;
    {
        const py::gil_scoped_release release;  // it may wait for the server
        sent = channel.send(batch, out);
    }
    if (!sent) {
        PyErr_SetString(PyExc_EOFError, "the server is gone");
        throw py::error_already_set();
    }
}

}  // namespace

void bind_process_lane(py::module_& m) {
    py::class_<ProcessLane>(m, "ProcessLane")
        .def(py::init([](const Engine& engine, size_t capacity) {
                 return std::make_unique<ProcessLane>(engine.completions, engine.poller, capacity);
             }),
             py::arg("engine"), py::arg("capacity"), py::keep_alive<1, 2>())
        .def("submit", &submit_bytes, py::arg("owner"), py::arg("head"), py::arg("body"), py::arg("flags"),
             py::arg("arrived_at"), py::arg("deadline"))
        .def("has_room", &has_room<ProcessLane>, py::arg("waiting_max"))
        .def("cancel", &ProcessLane::cancel, py::arg("ticket"))
        .def("started_at", &started_at<ProcessLane>, py::arg("ticket"))
        .def("batch_size_of", &ProcessLane::batch_size_of, py::arg("ticket"))
        .def("set_limits", &set_limits<ProcessLane>, py::kw_only(), py::arg("batch_size_max"),
             py::arg("batch_size_min"), py::arg("batch_delay_max_ns"), py::arg("running_max"))
        .def("set_intra_op_threads", &ProcessLane::set_intra_op_threads, py::arg("count"))
        .def("add_worker", &ProcessLane::add_worker, py::arg("socket_fd"), py::arg("request_memory_fd"),
             py::arg("answer_memory_fd"), py::kw_only(), py::arg("in_flight_max") = 0)
        .def("stop_worker", &ProcessLane::stop_worker, py::arg("id"))
        .def("remove_worker", &ProcessLane::remove_worker, py::arg("id"))
        .def("purge", &ProcessLane::purge)
        .def("close", &ProcessLane::close)
        .def("join", &ProcessLane::join)
        .def("workers", &process_workers)
        .def("stats", &stats<ProcessLane>)
        .def_property_readonly("ready_count", &ProcessLane::ready_count)
        .def_property_readonly("queue_size", &ProcessLane::queue_size)
        .def_property_readonly("capacity", &ProcessLane::capacity)
        .def_property_readonly("running", &ProcessLane::running);

    py::class_<WorkerBatch>(m, "WorkerBatch")
        .def_readonly("id", &WorkerBatch::id)
        .def_readonly("intra_op_threads", &WorkerBatch::intra_op_threads)
        .def_readonly("items", &WorkerBatch::items);

    py::class_<WorkerChannel>(m, "WorkerChannel")
        .def(py::init<int, int, int>(), py::arg("socket_fd"), py::arg("request_memory_fd"), py::arg("answer_memory_fd"))
        .def("receive", &receive, py::arg("timeout_ms") = -1)
        .def("begin", &WorkerChannel::begin, py::arg("batch_id"))
        .def("begin_alone", &WorkerChannel::begin_alone, py::arg("ticket"))
        .def("send", &send_answers, py::arg("batch_id"), py::arg("answers"))
        .def("is_cancelled", &WorkerChannel::is_cancelled, py::arg("ticket"))
        .def("cancelled_tickets", &WorkerChannel::cancelled_tickets)
        .def("fileno", &WorkerChannel::fd);
}

}  // namespace pyserve
