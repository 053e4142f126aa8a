// The border to Python: the module, and the native lane's part of it.
#include "bindings.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings_json.h"
#include "clock.h"
#include "input_rules.h"
#include "interrupt.h"
#include "torch_model.h"

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

bool cancel(Lane& lane, uint64_t ticket) {
    TensorRequest* request = lane.find(ticket);
    return request != nullptr && request->try_cancel();
}

// `announces` wakes a worker at once; without it `announce` must follow.
uint64_t submit(Lane& lane, const py::object& owner, const py::object& inputs, int64_t arrived_at, int64_t deadline,
                bool announces) {
    Inputs tensors = checked_inputs(inputs);
    check_inputs(lane.input_rules(), tensors);
    TensorRequest* request = lane.try_submit(std::move(tensors), owner.ptr(), arrived_at, deadline);
    if (request == nullptr) throw std::overflow_error("the queue is full");
    owner.inc_ref();  // until drain gives it back
    if (announces) lane.announce();
    return RequestPool::ticket_of(*request);
}

at::ScalarType dtype_of(const py::object& dtype) {
    if (!THPDtype_Check(dtype.ptr())) throw py::type_error("the dtype of an input rule must be a torch.dtype");
    return reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
}

using SizeEntry = std::tuple<int64_t, int64_t, std::string>;
using RuleEntry = std::tuple<std::string, py::object, std::vector<SizeEntry>>;

void set_input_rules(Lane& lane, const std::vector<RuleEntry>& entries) {
    std::vector<InputRule> rules;
    for (const auto& [name, dtype, sizes] : entries) {
        InputRule rule{name, dtype_of(dtype), {}};
        for (const auto& [min, max, symbol] : sizes) rule.sizes.push_back({min, max, symbol});
        rules.push_back(std::move(rule));
    }
    lane.set_input_rules(std::move(rules));
}

// As `submit` without announcing. `body` holds one item as it lies in memory. It is copied only if it is read-only,
// since a model may write to its input, or not aligned for its numbers.
uint64_t submit_bytes(Lane& lane, const py::object& owner, const py::object& body, int64_t arrived_at,
                      int64_t deadline) {
    if (lane.example().size() != 1) throw py::value_error("the model does not take one tensor");
    const at::Tensor& item = lane.example().front();
    auto buffer = buffer_of(body);
    if (static_cast<size_t>(buffer->len) != item.nbytes()) {
        throw py::value_error("an item of this model has " + std::to_string(item.nbytes()) + " bytes, not " +
                              std::to_string(buffer->len));
    }
    const bool is_aligned = reinterpret_cast<uintptr_t>(buffer->buf) % item.element_size() == 0;
    Inputs inputs;
    if (buffer->readonly != 0 || !is_aligned) {
        inputs.push_back(at::empty(item.sizes(), item.options()));
        std::memcpy(inputs.front().data_ptr(), buffer->buf, item.nbytes());
        buffer.reset();
    } else {
        inputs.push_back(at::from_blob(buffer->buf, item.sizes(), item.options()));
    }
    TensorRequest* request = lane.try_submit(std::move(inputs), owner.ptr(), arrived_at, deadline);
    if (request == nullptr) throw std::overflow_error("the queue is full");
    request->buffer = buffer.release();
    owner.inc_ref();  // until drain gives it back
    return RequestPool::ticket_of(*request);
}

// The output cut into its rows, as they lie in memory, large ones without copying; None in the place of a row that
// nobody waits for. None if the output is not one tensor with a row per request.
py::object rows_of(const Completion& completion) {
    if (!completion.output.isTensor()) return py::none();
    at::Tensor output = completion.output.toTensor();
    const size_t count = completion.owners.size();
    if (output.layout() != at::kStrided || !output.device().is_cpu() || output.dim() < 1 ||
        static_cast<size_t>(output.size(0)) != count || count == 0) {
        return py::none();
    }
    output = output.resolve_conj().resolve_neg().contiguous();
    const size_t size = output.nbytes() / count;
    const char* row = static_cast<const char*>(output.data_ptr());
    py::list rows(count);
    for (size_t i = 0; i < count; ++i, row += size) {
        if (completion.owners[i].is_none()) {
            rows[i] = py::none();
        } else if (size < copied_body_max) {
            rows[i] = py::bytes(row, size);
        } else {
            rows[i] = py::memoryview(py::cast(std::make_unique<Row>(Row{output, row, size})));
        }
    }
    return rows;
}

bool is_leaving(const WorkerRow& row) {
    return row.is_stopping && row.state != WorkerState::failed && row.state != WorkerState::stopped;
}

py::list workers(const Lane& lane) {
    py::list rows;
    for (const WorkerRow& row : lane.workers()) {
        py::dict out;
        out["id"] = row.id;
        out["state"] = row.is_lost ? "lost" : is_leaving(row) ? "stopping" : name_of(row.state);
        out["running_since"] = row.running_since;
        out["batches"] = row.batches;
        out["error"] = row.error;
        rows.append(out);
    }
    return rows;
}

at::ScalarType precision_of(const std::string& name) {
    if (name == "fp32") return at::kFloat;
    if (name == "bf16") return at::kBFloat16;
    if (name == "fp16") return at::kHalf;
    throw py::value_error("precision must be fp32, bf16 or fp16, not " + name);
}

template <c10::IValue (TorchModel::*Run)(const std::vector<at::Tensor>&)>
py::object run_model(TorchModel& model, const Inputs& inputs) {
    c10::IValue output;
    {
        const py::gil_scoped_release release;  // the forward needs no Python
        const c10::InferenceMode guard;
        output = interruptible([&] { return (model.*Run)(inputs); });
    }
    return torch::jit::toPyObject(std::move(output));
}

std::shared_ptr<TorchModel> load_model(const std::string& path, const Inputs& example, int64_t offset, int64_t size,
                                       bool is_package, const std::string& device, const std::string& precision,
                                       bool channels_last, bool optimizes, int package_runners_max, int64_t rows_min,
                                       const std::vector<Inputs>& others) {
    ModelOptions options;
    options.path = path;
    options.offset = offset;
    options.size = size;
    options.is_package = is_package;
    options.device = at::Device(device);
    options.precision = precision_of(precision);
    options.channels_last = channels_last;
    options.optimizes = optimizes;
    options.package_runners_max = package_runners_max;
    options.rows_min = rows_min;
    // Reading and freezing takes seconds and needs no Python.
    const py::gil_scoped_release release;
    return TorchModel::load(options, example, others);
}

// The runs of the Python thread that has entered it.
class ThreadRuns {
  public:
    void enter() { runs_.bind(); }
    void leave() { runs_.unbind(); }
    int64_t since() const { return runs_.since(); }
    void refuse() {
        runs_.refuse();
        runs_.interrupt(runs_.since());
    }

  private:
    Runs runs_;
};

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "pyserve's native engine. See _core.pyi for the contract.";
    m.attr("torch_version") = PYSERVE_TORCH_VERSION;

    py::register_exception<InputRefused>(m, "InputRefused", PyExc_ValueError);

    install_interrupts();
    py::class_<ThreadRuns>(m, "ThreadRuns")
        .def(py::init<>())
        .def("enter", &ThreadRuns::enter)
        .def("leave", &ThreadRuns::leave)
        .def("refuse", &ThreadRuns::refuse)
        .def_property_readonly("since", &ThreadRuns::since);

    py::class_<TorchModel, std::shared_ptr<TorchModel>>(m, "TorchModel")
        .def_static("load", &load_model, py::arg("path"), py::arg("example"), py::kw_only(), py::arg("offset") = 0,
                    py::arg("size") = -1, py::arg("is_package") = false, py::arg("device") = "cpu",
                    py::arg("precision") = "fp32", py::arg("channels_last") = false, py::arg("optimizes") = true,
                    py::arg("package_runners_max") = 1, py::arg("rows_min") = 1,
                    py::arg("others") = std::vector<Inputs>{})
        .def("run", &run_model<&TorchModel::run>, py::arg("inputs"))
        .def("run_plain", &run_model<&TorchModel::run_plain>, py::arg("inputs"))
        .def("instance", &TorchModel::instance, py::call_guard<py::gil_scoped_release>())
        .def("forget_optimization", &TorchModel::forget_optimization, py::call_guard<py::gil_scoped_release>())
        .def("settle", &TorchModel::settle, py::call_guard<py::gil_scoped_release>())
        .def("checksum", &TorchModel::checksum, py::call_guard<py::gil_scoped_release>())
        .def("call_spec", &TorchModel::call_spec)
        .def("note_state", &TorchModel::note_state, py::arg("text"))
        .def_property_readonly("state", &TorchModel::state)
        .def_property_readonly("is_autocast", &TorchModel::is_autocast)
        .def_property_readonly("weights_size", &TorchModel::weights_size)
        .def_property_readonly("optimization_note", &TorchModel::optimization_note)
        .def_property_readonly("is_optimized", &TorchModel::is_optimized)
        .def_property_readonly("precision_error", &TorchModel::precision_error);

    py::class_<Body>(m, "Body", py::buffer_protocol()).def_buffer([](Body& body) {
        return py::buffer_info(body.bytes.data(), 1, py::format_descriptor<uint8_t>::format(), 1,
                               {static_cast<py::ssize_t>(body.bytes.size())}, {py::ssize_t{1}}, true);
    });

    py::class_<Row>(m, "Row", py::buffer_protocol()).def_buffer([](const Row& row) {
        return py::buffer_info(const_cast<char*>(row.bytes), 1, py::format_descriptor<uint8_t>::format(), 1,
                               {static_cast<py::ssize_t>(row.size)}, {py::ssize_t{1}}, true);
    });

    py::class_<Completion>(m, "Completion")
        .def_readonly("owners", &Completion::owners)
        .def_readonly("answers", &Completion::answers)
        .def_readonly("expired", &Completion::expired)
        .def("rows", &rows_of)
        .def_readonly("stamps", &Completion::stamps)
        .def_readonly("code", &Completion::code)
        .def_readonly("message", &Completion::message)
        .def_property_readonly("output",
                               [](const Completion& completion) { return torch::jit::toPyObject(completion.output); })
        .def_readonly("started_at", &Completion::started_at)
        .def_readonly("staged_at", &Completion::staged_at)
        .def_readonly("finished_at", &Completion::finished_at)
        .def_readonly("batch_size", &Completion::batch_size)
        .def_readonly("release", &Completion::release)
        .def_readonly("was_alone", &Completion::was_alone);

    py::class_<Engine>(m, "Engine")
        .def(py::init<>())
        .def("fileno", [](const Engine& engine) { return engine.poller->fd(); })
        .def("drain", &Engine::drain)
        .def_property_readonly("signals", [](const Engine& engine) { return engine.completions->signals(); })
        .def_property_readonly("lost_count", [](const Engine& engine) { return engine.lost->load(); });

    py::class_<Lane>(m, "Lane")
        .def(py::init([](const Engine& engine, std::shared_ptr<TorchModel> model, Inputs example, size_t capacity) {
                 return std::make_unique<Lane>(engine.completions, std::move(model), std::move(example), capacity,
                                               engine.lost);
             }),
             py::arg("engine"), py::arg("model"), py::arg("example"), py::arg("capacity"), py::keep_alive<1, 2>())
        .def("submit", &submit, py::arg("owner"), py::arg("inputs"), py::arg("arrived_at"), py::arg("deadline"),
             py::arg("announces") = true)
        .def("submit_bytes", &submit_bytes, py::arg("owner"), py::arg("body"), py::arg("arrived_at"),
             py::arg("deadline"))
        .def("set_input_rules", &set_input_rules, py::arg("rules"))
        .def("announce", &Lane::announce)
        .def("has_room", &has_room<Lane>, py::arg("waiting_max"))
        .def("cancel", &cancel, py::arg("ticket"))
        .def("started_at", &started_at<Lane>, py::arg("ticket"))
        .def("set_limits", &set_limits<Lane>, py::kw_only(), py::arg("batch_size_max"), py::arg("batch_size_min"),
             py::arg("batch_delay_max_ns"), py::arg("running_max"))
        .def("set_intra_op_threads", &Lane::set_intra_op_threads, py::arg("count"))
        .def("set_workers", &Lane::set_workers, py::arg("count"),
             // Reaping joins threads that have ended already; growing only starts threads.
             py::call_guard<py::gil_scoped_release>())
        .def("reap", &Lane::reap, py::call_guard<py::gil_scoped_release>())
        .def("interrupt", &Lane::interrupt, py::arg("id"), py::arg("since"))
        .def("lose", &Lane::lose, py::arg("id"))
        .def_property_readonly("running_since", &Lane::running_since)
        .def_property_readonly("lost_count", &Lane::lost_count)
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

    bind_process_lane(m);
    bind_json(m);

    m.def("now_ns", &SteadyClock::now_ns, "The engine's clock: time.monotonic_ns().");
}

}  // namespace pyserve
