// The border to Python: the only file with pybind11 or the GIL.
//
// Python objects enter with submit (an owner per request) and leave with drain, both on the loop thread with the
// GIL held; between the two they are opaque pointers that no worker touches. The GIL is let go only around calls
// that load a model or wait for threads.
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/extension.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "clock.h"
#include "completion.h"
#include "lane.h"
#include "process_lane.h"
#include "torch_model.h"
#include "worker_channel.h"

namespace py = pybind11;

namespace pyserve {
namespace {

const char* name_of(WorkerState state) {
    switch (state) {
        case WorkerState::starting: return "starting";
        case WorkerState::warming: return "warming";
        case WorkerState::ready: return "ready";
        case WorkerState::failed: return "failed";
        case WorkerState::stopped: return "stopped";
    }
    return "unknown";
}

const char* name_of(Code code) {
    switch (code) {
        case Code::ok: return "ok";
        case Code::model_error: return "model_error";
        case Code::out_of_memory: return "out_of_memory";
        case Code::expired: return "expired";
        case Code::cancelled: return "cancelled";
        case Code::closed: return "closed";
        case Code::worker_died: return "worker_died";
        case Code::not_run: return "not_run";
    }
    return "unknown";
}

const char* name_of(ProcessState state) {
    switch (state) {
        case ProcessState::ready: return "ready";
        case ProcessState::stopped: return "stopped";
        case ProcessState::died: return "died";
    }
    return "unknown";
}

// Memory that Python looks at without copying it.
struct Body {
    std::string bytes;
};

// Larger bodies go to Python without another copy.
constexpr size_t copied_body_max = 65536;

py::object body_object(std::string&& bytes) {
    if (bytes.size() < copied_body_max) return py::bytes(bytes);
    const py::object body = py::cast(std::make_unique<Body>(Body{std::move(bytes)}));
    return py::memoryview(body);
}

// A result as Python sees it. Its requests have been given back to their lane.
struct Completion {
    py::list owners;   // of those that ended with this outcome
    py::list expired;  // owners of those that expired in the queue
    py::list stamps;   // (arrived_at, queued_at) in ns, one per entry of owners
    py::list answers;  // (kind, status, head, body) per entry of owners; python lane only
    const char* code;
    std::string message;
    c10::IValue output;
    int64_t started_at, staged_at, finished_at;
};

// Every lane keeps its engine alive, so that what lanes leave behind is drained here at the latest.
class Engine : public Watched {
  public:
    Engine() : completions(std::make_shared<Completions<>>()), poller(std::make_shared<Poller>()) {
        poller->add(completions->fd(), *this);
    }
    ~Engine() override { drain(); }
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    std::shared_ptr<Completions<>> completions;
    std::shared_ptr<Poller> poller;

    void on_ready(uint32_t) noexcept override {}  // the drain that follows takes what is there

    std::vector<Completion> drain() {
        std::vector<Completion> out;
        poller->run_ready();
        CompletionNode* node = completions->drain();
        while (node != nullptr) {
            const std::unique_ptr<Result> result(static_cast<Result*>(node));
            node = node->next;
            out.push_back(to_completion(*result));
        }
        return out;
    }

  private:
    // Cancelled requests were answered when they were cancelled; here only their memory comes back.
    static Completion to_completion(Result& result) {
        Completion completion{py::list(),
                              py::list(),
                              py::list(),
                              py::list(),
                              name_of(result.status.code),
                              std::move(result.status.message),
                              {},
                              result.started_at,
                              result.staged_at,
                              result.finished_at};
        ProcessResult* of_process = nullptr;
        if (result.lane == Result::Lane::native) {
            completion.output = std::move(static_cast<BatchResult&>(result).output);
        } else {
            of_process = static_cast<ProcessResult*>(&result);
            for (AnswerPart& part : of_process->answers) {
                completion.answers.append(py::make_tuple(static_cast<int>(part.kind), part.status, py::bytes(part.head),
                                                         body_object(std::move(part.body))));
            }
            if (of_process->is_chunk) add_stream(completion, *of_process);
        }
        for (Request* request : result.requests) {
            const State state = request->state.load(std::memory_order_acquire);
            const py::tuple stamp = py::make_tuple(request->arrived_at, request->queued_at.load());
            if (of_process != nullptr) release_buffer(*static_cast<ProcessRequest*>(request));
            const auto owner =
                py::reinterpret_steal<py::object>(static_cast<PyObject*>(result.pool->release(request)));
            if (state == State::expired) {
                completion.expired.append(owner);
            } else {
                // A place per row of the output, so that row i stays owner i's; None for a dropped result.
                completion.owners.append(state == State::done ? owner : py::none());
                completion.stamps.append(stamp);
            }
        }
        return completion;
    }

    // The request of a streamed part goes on; it may be over already.
    static void add_stream(Completion& completion, const ProcessResult& result) {
        completion.code = "chunk";
        auto* pool = static_cast<ProcessPool*>(result.pool.get());
        const ProcessRequest* request = pool->find(result.chunk_ticket);
        const bool goes_on = request != nullptr && request->state.load(std::memory_order_acquire) != State::cancelled;
        completion.owners.append(goes_on ? py::reinterpret_borrow<py::object>(static_cast<PyObject*>(request->owner))
                                         : py::none());
        completion.stamps.append(py::make_tuple(0, 0));
    }

    static void release_buffer(ProcessRequest& request) {
        auto* buffer = static_cast<Py_buffer*>(std::exchange(request.buffer, nullptr));
        if (buffer == nullptr) return;
        PyBuffer_Release(buffer);
        delete buffer;
    }
};

std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> buffer_of(const py::handle& object) {
    auto view = std::make_unique<Py_buffer>();
    if (PyObject_GetBuffer(object.ptr(), view.get(), PyBUF_SIMPLE) != 0) throw py::error_already_set();
    return {view.release(), [](Py_buffer* held) {
                PyBuffer_Release(held);
                delete held;
            }};
}

uint64_t submit_bytes(ProcessLane& lane, const py::object& owner, const py::bytes& head, const py::object& body,
                      uint32_t flags, int64_t arrived_at, int64_t deadline) {
    auto buffer = buffer_of(body);
    const std::string_view content(static_cast<const char*>(buffer->buf), static_cast<size_t>(buffer->len));
    const auto text = static_cast<std::string_view>(head);
    if (text.size() > head_size_max) throw py::value_error("the head of a request is too long");
    ProcessRequest* request = lane.try_submit(text, content, flags, owner.ptr(), arrived_at, deadline);
    if (request == nullptr) throw std::overflow_error("the queue is full");
    if (content.size() > body_inline_max) request->buffer = buffer.release();
    owner.inc_ref();  // until drain gives it back
    return ProcessPool::ticket_of(*request);
}

Inputs checked_inputs(const py::object& inputs) {
    Inputs tensors;
    try {
        if (THPVariable_Check(inputs.ptr())) {
            tensors.push_back(inputs.cast<at::Tensor>());
        } else {
            tensors = inputs.cast<Inputs>();
        }
    } catch (const py::cast_error&) {
        throw py::type_error("the input of a request must be a tensor or a list of tensors, not " +
                             std::string(Py_TYPE(inputs.ptr())->tp_name));
    }
    if (tensors.empty()) throw py::value_error("a request needs at least one input tensor");
    for (const at::Tensor& tensor : tensors) {
        if (tensor.layout() != at::kStrided || !tensor.device().is_cpu() || tensor.dim() < 1 || tensor.size(0) != 1) {
            throw py::value_error("each input of a request must be a dense tensor on the host of shape [1, ...]");
        }
    }
    return tensors;
}

uint64_t submit(Lane& lane, const py::object& owner, const py::object& inputs, int64_t arrived_at,
                int64_t deadline) {
    Inputs tensors = checked_inputs(inputs);
    TensorRequest* request = lane.try_submit(std::move(tensors), owner.ptr(), arrived_at, deadline);
    if (request == nullptr) throw std::overflow_error("the queue is full");
    owner.inc_ref();  // until drain gives it back
    return RequestPool::ticket_of(*request);
}

template <class L>
bool cancel(L& lane, uint64_t ticket) {
    auto* request = lane.find(ticket);
    return request != nullptr && request->try_cancel();
}

// When the request began to run, ns; 0 while it waits; -1 when it is over.
template <class L>
int64_t started_at(L& lane, uint64_t ticket) {
    const auto* request = lane.find(ticket);
    if (request == nullptr) return -1;
    switch (request->state.load(std::memory_order_acquire)) {
        case State::queued: return 0;
        case State::batched:
        case State::running: return request->started_at.load(std::memory_order_relaxed);
        default: return -1;
    }
}

template <size_t N>
py::tuple histogram(const Histogram<N>& histogram) {
    return py::make_tuple(py::cast(histogram.bounds()), py::cast(histogram.counts()), histogram.sum());
}

template <class L>
py::dict stats(const L& lane) {
    const LaneStats& s = lane.stats();
    py::dict out;
    out["queue"] = histogram(s.queue);
    out["staging"] = histogram(s.staging);
    out["inference"] = histogram(s.inference);
    out["batch_size"] = histogram(s.batch_size);
    out["submitted"] = s.submitted.load();
    out["batches"] = s.batches.load();
    out["failed"] = s.failed.load();
    out["expired"] = s.expired.load();
    out["cancelled"] = s.cancelled.load();
    out["retried_singly"] = s.retried_singly.load();
    out["staging_fallback"] = s.staging_fallback.load();
    return out;
}

bool is_leaving(const WorkerRow& row) {
    return row.is_stopping && row.state != WorkerState::failed && row.state != WorkerState::stopped;
}

py::list workers(const Lane& lane) {
    py::list rows;
    for (const WorkerRow& row : lane.workers()) {
        py::dict out;
        out["id"] = row.id;
        out["state"] = is_leaving(row) ? "stopping" : name_of(row.state);
        out["running_since"] = row.running_since;
        out["batches"] = row.batches;
        out["error"] = row.error;
        rows.append(out);
    }
    return rows;
}

py::list process_workers(const ProcessLane& lane) {
    py::list rows;
    for (const ProcessWorkerRow& row : lane.workers()) {
        py::dict out;
        out["id"] = row.id;
        out["state"] = row.is_stopping && row.state == ProcessState::ready ? "stopping" : name_of(row.state);
        out["running_since"] = row.running_since;
        out["batches"] = row.batches;
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
        const auto answer = py::reinterpret_borrow<py::tuple>(each);
        if (answer.size() != 5) throw py::value_error("an answer is (ticket, kind, status, head, body)");
        OutgoingAnswer& made = out.emplace_back();
        made.ticket = answer[0].cast<uint64_t>();
        made.kind = static_cast<AnswerKind>(answer[1].cast<uint16_t>());
        made.status = answer[2].cast<uint16_t>();
        made.head = answer[3].cast<std::string_view>();
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

template <class L>
void set_limits(L& lane, uint32_t batch_size_max, uint32_t batch_size_min, int64_t batch_delay_max_ns,
                uint32_t running_max) {
    BatchLimits limits;
    limits.batch_size_max = batch_size_max;
    limits.batch_size_min = batch_size_min;
    limits.batch_delay_max_ns = batch_delay_max_ns;
    limits.running_max = running_max;
    lane.set_limits(limits);
}

at::ScalarType precision_of(const std::string& name) {
    if (name == "fp32") return at::kFloat;
    if (name == "bf16") return at::kBFloat16;
    if (name == "fp16") return at::kHalf;
    throw py::value_error("precision must be fp32, bf16 or fp16, not " + name);
}

std::shared_ptr<TorchModel> load_model(const std::string& path, const Inputs& example, int64_t offset, int64_t size,
                                       bool is_package, const std::string& device, const std::string& precision,
                                       bool channels_last, int package_runners_max) {
    ModelOptions options;
    options.path = path;
    options.offset = offset;
    options.size = size;
    options.is_package = is_package;
    options.device = at::Device(device);
    options.precision = precision_of(precision);
    options.channels_last = channels_last;
    options.package_runners_max = package_runners_max;
    // Reading and freezing takes seconds and needs no Python.
    const py::gil_scoped_release release;
    return TorchModel::load(options, example);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "pyserve's native engine. See _core.pyi for the contract.";
    m.attr("torch_version") = PYSERVE_TORCH_VERSION;

    py::class_<TorchModel, std::shared_ptr<TorchModel>>(m, "TorchModel")
        .def_static("load", &load_model, py::arg("path"), py::arg("example"), py::kw_only(), py::arg("offset") = 0,
                    py::arg("size") = -1, py::arg("is_package") = false, py::arg("device") = "cpu",
                    py::arg("precision") = "fp32", py::arg("channels_last") = false,
                    py::arg("package_runners_max") = 1)
        .def("run",
             [](TorchModel& model, const Inputs& inputs) {
                 c10::IValue output;
                 {
                     const py::gil_scoped_release release;  // the forward needs no Python
                     const c10::InferenceMode guard;
                     output = model.run(inputs);
                 }
                 return torch::jit::toPyObject(std::move(output));
             },
             py::arg("inputs"))
        .def_property_readonly("weights_size", &TorchModel::weights_size)
        .def_property_readonly("precision_error", &TorchModel::precision_error);

    py::class_<Body>(m, "Body", py::buffer_protocol()).def_buffer([](Body& body) {
        return py::buffer_info(body.bytes.data(), 1, py::format_descriptor<uint8_t>::format(), 1,
                               {static_cast<py::ssize_t>(body.bytes.size())}, {py::ssize_t{1}}, true);
    });

    py::class_<Completion>(m, "Completion")
        .def_readonly("owners", &Completion::owners)
        .def_readonly("answers", &Completion::answers)
        .def_readonly("expired", &Completion::expired)
        .def_readonly("stamps", &Completion::stamps)
        .def_readonly("code", &Completion::code)
        .def_readonly("message", &Completion::message)
        .def_property_readonly("output",
                               [](const Completion& completion) { return torch::jit::toPyObject(completion.output); })
        .def_readonly("started_at", &Completion::started_at)
        .def_readonly("staged_at", &Completion::staged_at)
        .def_readonly("finished_at", &Completion::finished_at);

    py::class_<Engine>(m, "Engine")
        .def(py::init<>())
        .def("fileno", [](const Engine& engine) { return engine.poller->fd(); })
        .def("drain", &Engine::drain)
        .def_property_readonly("signals", [](const Engine& engine) { return engine.completions->signals(); });

    py::class_<Lane>(m, "Lane")
        .def(py::init([](const Engine& engine, std::shared_ptr<TorchModel> model, Inputs example, size_t capacity) {
                 return std::make_unique<Lane>(engine.completions, std::move(model), std::move(example), capacity);
             }),
             py::arg("engine"), py::arg("model"), py::arg("example"), py::arg("capacity"), py::keep_alive<1, 2>())
        .def("submit", &submit, py::arg("owner"), py::arg("inputs"), py::arg("arrived_at"), py::arg("deadline"))
        .def("cancel", &cancel<Lane>, py::arg("ticket"))
        .def("started_at", &started_at<Lane>, py::arg("ticket"))
        .def("set_limits", &set_limits<Lane>, py::kw_only(), py::arg("batch_size_max"), py::arg("batch_size_min"),
             py::arg("batch_delay_max_ns"), py::arg("running_max"))
        .def("set_intra_op_threads", &Lane::set_intra_op_threads, py::arg("count"))
        .def("set_workers", &Lane::set_workers, py::arg("count"),
             // Reaping joins threads that have ended already; growing only starts threads.
             py::call_guard<py::gil_scoped_release>())
        .def("reap", &Lane::reap, py::call_guard<py::gil_scoped_release>())
        .def("purge", &Lane::purge)
        .def("close", &Lane::close)
        // A worker may take long to finish its batch.
        .def("join", &Lane::join, py::call_guard<py::gil_scoped_release>())
        .def("workers", &workers)
        .def("stats", &stats<Lane>)
        .def_property_readonly("ready_count", &Lane::ready_count)
        .def_property_readonly("queue_size", &Lane::queue_size)
        .def_property_readonly("capacity", &Lane::capacity)
        .def_property_readonly("running", &Lane::running);

    py::class_<ProcessLane>(m, "ProcessLane")
        .def(py::init([](const Engine& engine, size_t capacity) {
                 return std::make_unique<ProcessLane>(engine.completions, engine.poller, capacity);
             }),
             py::arg("engine"), py::arg("capacity"), py::keep_alive<1, 2>())
        .def("submit", &submit_bytes, py::arg("owner"), py::arg("head"), py::arg("body"), py::arg("flags"),
             py::arg("arrived_at"), py::arg("deadline"))
        .def("cancel", &ProcessLane::cancel, py::arg("ticket"))
        .def("started_at", &started_at<ProcessLane>, py::arg("ticket"))
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
        .def(py::init<int, int, int>(), py::arg("socket_fd"), py::arg("request_memory_fd"),
             py::arg("answer_memory_fd"))
        .def("receive", &receive, py::arg("timeout_ms") = -1)
        .def("begin", &WorkerChannel::begin, py::arg("batch_id"))
        .def("send", &send_answers, py::arg("batch_id"), py::arg("answers"))
        .def("is_cancelled", &WorkerChannel::is_cancelled, py::arg("ticket"));

    m.def("now_ns", &SteadyClock::now_ns, "The engine's clock: time.monotonic_ns().");
}

}  // namespace pyserve
