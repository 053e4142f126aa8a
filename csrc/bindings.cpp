// The border to Python: the only file with pybind11 or the GIL.
//
// Python objects enter with submit (an owner per request) and leave with drain, both on the loop thread with the
// GIL held; between the two they are opaque pointers that no worker touches. The GIL is let go only around calls
// that load a model or wait for threads.
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/extension.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "clock.h"
#include "completion.h"
#include "lane.h"
#include "torch_model.h"

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
    }
    return "unknown";
}

// A batch result as Python sees it. Its requests have been given back to their lane.
struct Completion {
    py::list owners;   // of those that ended with this outcome
    py::list expired;  // owners of those that expired in the queue
    py::list stamps;   // (arrived_at, queued_at) in ns, one per entry of owners
    const char* code;
    std::string message;
    c10::IValue output;
    int64_t started_at, staged_at, finished_at;
};

// Every lane keeps its engine alive, so that what lanes leave behind is drained here at the latest.
class Engine {
  public:
    Engine() : completions(std::make_shared<Completions<>>()) {}
    ~Engine() { drain(); }
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    std::shared_ptr<Completions<>> completions;

    std::vector<Completion> drain() {
        std::vector<Completion> out;
        CompletionNode* node = completions->drain();
        while (node != nullptr) {
            const std::unique_ptr<BatchResult> result(static_cast<BatchResult*>(node));
            node = node->next;
            out.push_back(to_completion(*result));
        }
        return out;
    }

  private:
    // Cancelled requests were answered when they were cancelled; here only their memory comes back.
    static Completion to_completion(BatchResult& result) {
        Completion completion{py::list(),
                              py::list(),
                              py::list(),
                              name_of(result.status.code),
                              std::move(result.status.message),
                              std::move(result.output),
                              result.started_at,
                              result.staged_at,
                              result.finished_at};
        for (Request* request : result.requests) {
            const State state = request->state.load(std::memory_order_acquire);
            const py::tuple stamp = py::make_tuple(request->arrived_at, request->queued_at.load());
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
};

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

bool cancel(Lane& lane, uint64_t ticket) {
    TensorRequest* request = lane.find(ticket);
    return request != nullptr && request->try_cancel();
}

// When the request began to run, ns; 0 while it waits; -1 when it is over.
int64_t started_at(Lane& lane, uint64_t ticket) {
    const TensorRequest* request = lane.find(ticket);
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

py::dict stats(const Lane& lane) {
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

void set_limits(Lane& lane, uint32_t batch_size_max, uint32_t batch_size_min, int64_t batch_delay_max_ns,
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

    py::class_<Completion>(m, "Completion")
        .def_readonly("owners", &Completion::owners)
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
        .def("fileno", [](const Engine& engine) { return engine.completions->fd(); })
        .def("drain", &Engine::drain)
        .def_property_readonly("signals", [](const Engine& engine) { return engine.completions->signals(); });

    py::class_<Lane>(m, "Lane")
        .def(py::init([](const Engine& engine, std::shared_ptr<TorchModel> model, Inputs example, size_t capacity) {
                 return std::make_unique<Lane>(engine.completions, std::move(model), std::move(example), capacity);
             }),
             py::arg("engine"), py::arg("model"), py::arg("example"), py::arg("capacity"), py::keep_alive<1, 2>())
        .def("submit", &submit, py::arg("owner"), py::arg("inputs"), py::arg("arrived_at"), py::arg("deadline"))
        .def("cancel", &cancel, py::arg("ticket"))
        .def("started_at", &started_at, py::arg("ticket"))
        .def("set_limits", &set_limits, py::kw_only(), py::arg("batch_size_max"), py::arg("batch_size_min"),
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
        .def("stats", &stats)
        .def_property_readonly("ready_count", &Lane::ready_count)
        .def_property_readonly("queue_size", &Lane::queue_size)
        .def_property_readonly("capacity", &Lane::capacity)
        .def_property_readonly("running", &Lane::running);

    m.def("now_ns", &SteadyClock::now_ns, "The engine's clock: time.monotonic_ns().");
}

}  // namespace pyserve
