// The border to Python: the module, and the native lane's part of it.
#include "bindings.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/jit/python/pybind_utils.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings_batching.h"
#include "bindings_fast.h"
#include "bindings_json.h"
#include "clock.h"
#include "device_probe.h"
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

Inputs checked_inputs(const Lane& lane, const py::object& inputs) {
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
    for (at::Tensor& tensor : tensors) {
        if (tensor.layout() != at::kStrided || tensor.dim() < 1 || tensor.size(0) != 1) {
            throw py::value_error("each input of a request must be a dense tensor of shape [1, ...]");
        }
        if (tensor.device() != tensors.front().device() || !lane.takes_from(tensor.device())) {
            throw py::value_error("the inputs of a request must be on the host, or all on the device of the model, " +
                                  lane.places() + "; got one on " + tensor.device().str());
        }
        // Conjugated or negated only by a mark in the tensor: batches are made of its memory, which does not show that.
        if (tensor.is_conj() || tensor.is_neg()) tensor = tensor.resolve_conj().resolve_neg();
    }
    return tensors;
}

// ("well", ""), ("lost", why) or ("silent", "").
std::pair<const char*, std::string> probe(const std::string& device, double limit_s) {
    const py::gil_scoped_release release;
    DeviceCheck check = probe_device(c10::Device(device), static_cast<int64_t>(limit_s * 1e9));
    switch (check.state) {
        case DeviceState::well: return {"well", {}};
        case DeviceState::lost: return {"lost", std::move(check.text)};
        case DeviceState::silent: return {"silent", {}};
    }
    return {"silent", {}};
}

// What the calling thread's current stream has been given to do so far; nothing for tensors of the host.
std::optional<c10::Event> event_behind(const at::Tensor& tensor) {
    const c10::Device device = tensor.device();
    if (device.is_cpu()) return {};
    std::optional<c10::Event> event(std::in_place, device.type());
    event->record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
    return event;
}

bool cancel(Lane& lane, uint64_t ticket) {
    TensorRequest* request = lane.find(ticket);
    return request != nullptr && request->try_cancel();
}

// `announces` wakes a worker at once; without it `announce` must follow.
uint64_t submit(Lane& lane, const py::object& owner, const py::object& inputs, int64_t arrived_at, int64_t deadline,
                bool announces, bool wants_output) {
    Inputs tensors = checked_inputs(lane, inputs);
    if (!lane.input_rules().empty()) {
        const bool are_pixels = lane.takes_as_pixels(tensors.front());
        check_inputs(lane.input_rules(), are_pixels ? Pixels::described(tensors) : tensors);
    }
    std::optional<c10::Event> made = event_behind(tensors.front());
    TensorRequest* request =
        lane.try_submit(std::move(tensors), owner.ptr(), arrived_at, deadline, wants_output, std::move(made));
    if (request == nullptr) throw std::overflow_error("the queue is full");
    owner.inc_ref();  // until drain gives it back
    if (announces) lane.announce();
    return RequestPool::ticket_of(*request);
}

at::ScalarType dtype_of(const py::object& dtype) {
    if (!THPDtype_Check(dtype.ptr())) throw py::type_error("the dtype of an input rule must be a torch.dtype");
    return reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
}

void set_finish(Lane& lane, const std::string& kind, int64_t count) {
    if (kind == "ranked" && count >= 1) return lane.set_finish(Finish::ranked, count);
    if (kind == "classes") return lane.set_finish(Finish::classes, 0);
    if (kind == "none") return lane.set_finish(Finish::none, 0);
    throw py::value_error("workers cannot finish answers by " + kind + " of " + std::to_string(count));
}

using SizeEntry = std::tuple<int64_t, int64_t, std::string>;
using RuleEntry = std::tuple<std::string, py::object, std::vector<SizeEntry>>;

std::vector<InputRule> rules_of(const std::vector<RuleEntry>& entries) {
    std::vector<InputRule> rules;
    for (const auto& [name, dtype, sizes] : entries) {
        InputRule rule{name, dtype_of(dtype), {}};
        for (const auto& [min, max, symbol] : sizes) rule.sizes.push_back({min, max, symbol});
        rules.push_back(std::move(rule));
    }
    return rules;
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
        out["device"] = row.device.str();
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

// Runs `body` without the interpreter; that memory ran out is torch.OutOfMemoryError for Python.
template <class Body>
auto loading(const Body& body) {
    const py::gil_scoped_release release;  // reading and freezing takes seconds
    try {
        return body();
    } catch (const c10::OutOfMemoryError& error) {
        const py::gil_scoped_acquire acquire;
        PyErr_SetString(py::module_::import("torch").attr("OutOfMemoryError").ptr(), error.what_without_backtrace());
        throw py::error_already_set();
    }
}

template <c10::IValue (TorchModel::*Run)(const std::vector<at::Tensor>&)>
py::object run_model(TorchModel& model, const Inputs& inputs) {
    c10::IValue output;
    {
        const py::gil_scoped_release release;  // the forward needs no Python
        const c10::InferenceMode guard;
        const c10::DeviceGuard device(model.device());
        output = interruptible([&] { return model.restored((model.*Run)(inputs)); });
    }
    return torch::jit::toPyObject(std::move(output));
}

using PlainEntry = std::tuple<std::string, int64_t, int64_t>;  // path, offset, size
using NormalizationEntry = std::optional<std::pair<std::array<float, 3>, std::array<float, 3>>>;

std::shared_ptr<TorchModel> load_model(const std::string& path, const Inputs& example, int64_t offset, int64_t size,
                                       const std::string& backend, const std::string& library,
                                       const std::optional<PlainEntry>& plain, const std::vector<RuleEntry>& rules,
                                       const std::vector<std::optional<std::pair<int64_t, int64_t>>>& value_ranges,
                                       int64_t rows_max, const std::string& device, const std::string& precision,
                                       bool channels_last, bool optimizes, int runners_max, int workers, int threads,
                                       int64_t rows_min, const std::vector<Inputs>& others,
                                       const NormalizationEntry& pixels, bool chooses_layout) {
    ModelOptions options;
    options.path = path;
    options.offset = offset;
    options.size = size;
    options.backend = backend_of(backend);
    options.library = library;
    if (plain) options.plain = {std::get<0>(*plain), std::get<1>(*plain), std::get<2>(*plain)};
    options.rules = rules_of(rules);
    for (const auto& range : value_ranges) {
        options.value_ranges.push_back(range ? std::optional(ValueRange{range->first, range->second}) : std::nullopt);
    }
    options.rows_max = rows_max;
    options.device = at::Device(device);
    options.precision = precision_of(precision);
    options.channels_last = channels_last;
    options.chooses_layout = chooses_layout;
    options.optimizes = optimizes;
    options.runners_max = runners_max;
    options.workers = workers;
    options.threads = threads;
    options.rows_min = rows_min;
    if (pixels) options.pixels = Normalization{pixels->first, pixels->second};
    return loading([&] { return TorchModel::load(options, example, others); });
}

std::shared_ptr<TorchModel> copy_on(TorchModel& model, const std::string& device) {
    return loading([&] { return model.copy_on(at::Device(device)); });
}

// A lane's end joins its workers, and a worker may be in Python just then: operators of a model may be written in it.
struct WithoutInterpreter {
    void operator()(Lane* lane) const {
        const py::gil_scoped_release release;
        delete lane;
    }
};
using LanePtr = std::unique_ptr<Lane, WithoutInterpreter>;

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
                    py::arg("size") = -1, py::arg("backend") = "torchscript", py::arg("library") = "",
                    py::arg("plain") = py::none(), py::arg("rules") = std::vector<RuleEntry>{},
                    py::arg("value_ranges") = std::vector<std::optional<std::pair<int64_t, int64_t>>>{},
                    py::arg("rows_max") = 0, py::arg("device") = "cpu", py::arg("precision") = "fp32",
                    py::arg("channels_last") = false, py::arg("optimizes") = true, py::arg("runners_max") = 1,
                    py::arg("workers") = 1, py::arg("threads") = 1, py::arg("rows_min") = 1,
                    py::arg("others") = std::vector<Inputs>{}, py::arg("pixels") = py::none(),
                    py::arg("chooses_layout") = false)
        .def("run", &run_model<&TorchModel::run>, py::arg("inputs"))
        .def("run_plain", &run_model<&TorchModel::run_plain>, py::arg("inputs"))
        .def("numbers_of", &TorchModel::numbers_of, py::arg("input"), py::call_guard<py::gil_scoped_release>())
        .def("instance", &TorchModel::instance, py::call_guard<py::gil_scoped_release>())
        .def("copy_on", &copy_on, py::arg("device"))
        .def("use_threads", &TorchModel::use_threads, py::arg("count"), py::arg("workers") = 0)
        .def("prepare_threads", &TorchModel::prepare_threads, py::arg("count"), py::arg("workers") = 0,
             py::call_guard<py::gil_scoped_release>())
        .def_property_readonly("streams_and_threads", &TorchModel::streams_and_threads)
        .def_property_readonly("plain_runs", &TorchModel::plain_runs)
        .def_property_readonly("backend", [](const TorchModel& model) { return name_of(model.options().backend); })
        .def("forget_optimization", &TorchModel::forget_optimization, py::call_guard<py::gil_scoped_release>())
        .def("settle", &TorchModel::settle, py::call_guard<py::gil_scoped_release>())
        .def("checksum", &TorchModel::checksum, py::call_guard<py::gil_scoped_release>())
        .def("call_spec", &TorchModel::call_spec)
        .def("note_state", &TorchModel::note_state, py::arg("text"))
        .def_property_readonly("state", &TorchModel::state)
        .def_property_readonly("is_autocast", &TorchModel::is_autocast)
        .def_property_readonly("weights_size", &TorchModel::weights_size)
        .def_property_readonly("optimization_note", &TorchModel::optimization_note)
        .def_property_readonly("device_note", &TorchModel::device_note)
        .def_property_readonly("is_optimized", &TorchModel::is_optimized)
        .def_property_readonly("is_channels_last", &TorchModel::is_channels_last)
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
        .def_property_readonly("finished",
                               [](const Completion& completion) { return torch::jit::toPyObject(completion.finished); })
        .def_readonly("started_at", &Completion::started_at)
        .def_readonly("staged_at", &Completion::staged_at)
        .def_readonly("finished_at", &Completion::finished_at)
        .def_readonly("batch_size", &Completion::batch_size)
        .def_readonly("release", &Completion::release)
        .def_readonly("was_alone", &Completion::was_alone)
        .def_readonly("row_lane", &Completion::row_lane)
        .def_readonly("row_counts", &Completion::row_counts)
        .def_readonly("row_arrived_at", &Completion::row_arrived_at);

    py::class_<Engine>(m, "Engine")
        .def(py::init<>())
        .def("fileno", [](const Engine& engine) { return engine.poller->fd(); })
        .def("drain", &Engine::drain)
        .def_property_readonly("signals", [](const Engine& engine) { return engine.completions->signals(); })
        .def_property_readonly("lost_count", [](const Engine& engine) { return engine.lost->load(); });

    py::class_<Lane, LanePtr>(m, "Lane")
        .def(py::init([](const Engine& engine, std::shared_ptr<TorchModel> model, Inputs example, size_t capacity) {
                 return LanePtr(
                     new Lane(engine.completions, std::move(model), std::move(example), capacity, engine.lost));
             }),
             py::arg("engine"), py::arg("model").none(false), py::arg("example"), py::arg("capacity"),
             py::keep_alive<1, 2>())
        .def("submit", &submit, py::arg("owner"), py::arg("inputs"), py::arg("arrived_at"), py::arg("deadline"),
             py::arg("announces") = true, py::arg("wants_output") = false)
        .def("submit_bytes", &submit_bytes, py::arg("owner"), py::arg("body"), py::arg("arrived_at"),
             py::arg("deadline"))
        .def(
            "set_input_rules",
            [](Lane& lane, const std::vector<RuleEntry>& rules) { lane.set_input_rules(rules_of(rules)); },
            py::arg("rules"))
        .def("set_finish", &set_finish, py::arg("kind"), py::arg("count"))
        .def("set_batching", &set_batching, py::kw_only(), py::arg("no_padding") = "", py::arg("no_graphs") = "",
             py::arg("sizes") = std::vector<size_t>(), py::arg("rows") = std::vector<Inputs>())
        .def("batching_notes", &batching_notes)
        .def("set_warm_up", &set_warm_up, py::kw_only(), py::arg("items") = std::vector<Inputs>(),
             py::arg("items_limit_s") = 0.0, py::arg("sizes_limit_s") = 0.0)
        .def("warm_up_runs", &warm_up_runs)
        .def("announce", &Lane::announce)
        .def("has_room", &has_room<Lane>, py::arg("waiting_max"))
        .def("cancel", &cancel, py::arg("ticket"))
        .def("started_at", &started_at<Lane>, py::arg("ticket"))
        .def("set_limits", &set_limits<Lane>, py::kw_only(), py::arg("batch_size_max"), py::arg("batch_size_min"),
             py::arg("batch_delay_max_ns"), py::arg("running_max"))
        .def("set_intra_op_threads", &Lane::set_intra_op_threads, py::arg("count"))
        .def("set_cpus", &Lane::set_cpus, py::arg("device"), py::arg("cpus"))
        .def("set_models", &Lane::set_models, py::arg("models"))
        .def("exchange_model", &Lane::exchange_model, py::arg("model").none(false))
        .def("exchange_state",
             [](const Lane& lane) {
                 ExchangeState state = lane.exchange_state();
                 return std::pair(state.pending, std::move(state.refusal));
             })
        .def("set_workers", &Lane::set_workers, py::arg("count"),
             // Reaping joins threads that have ended already; growing only starts threads.
             py::call_guard<py::gil_scoped_release>())
        .def("reap", &Lane::reap, py::call_guard<py::gil_scoped_release>())
        .def("interrupt", &Lane::interrupt, py::arg("id"), py::arg("since"))
        .def("lose", &Lane::lose, py::arg("id"))
        .def_property_readonly("running_since", &Lane::running_since)
        .def_property_readonly("lost_count", &Lane::lost_count)
        .def_property_readonly("ceiling", &Lane::ceiling)
        .def("forget_ceiling", &Lane::forget_ceiling)
        .def("purge", &Lane::purge)
        .def("close", &Lane::close)
        // A worker may take long to finish its batch.
        .def("join", &Lane::join, py::call_guard<py::gil_scoped_release>())
        .def("workers", &workers)
        .def("stats", &native_stats)
        .def_property_readonly("ready_count", &Lane::ready_count)
        .def_property_readonly("queue_size", &Lane::queue_size)
        .def_property_readonly("capacity", &Lane::capacity)
        .def_property_readonly("running", &Lane::running);

    m.def("probe_device", &probe, py::arg("device"), py::arg("limit_s"));
    m.def(
        "note_lost_device",
        [](const std::string& device, const std::string& reason) {
            return DeviceLosses::of_process().note(c10::Device(device), reason);
        },
        py::arg("device"), py::arg("reason"));
    m.def("lost_devices", [] { return DeviceLosses::of_process().all(); });
    bind_process_lane(m);
    bind_front_rows(m);
    bind_fast_path(m);
    bind_json(m);

    m.def(
        "has_graphs", [](const std::string& kind) { return make_graph_pool(at::Device(kind).type()) != nullptr; },
        py::arg("kind"), "Whether calls of a model can be recorded and replayed on devices of this kind.");
    m.def("now_ns", &SteadyClock::now_ns, "The engine's clock: time.monotonic_ns().");
}

}  // namespace pyserve
