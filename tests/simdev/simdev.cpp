// simdev: an accelerator made of threads, for tests of code that is written for accelerators.
#include <pybind11/pybind11.h>

#include "faults.h"
#include "graphs.h"
#include "operators.h"

namespace py = pybind11;

namespace simdev {

C10_REGISTER_GUARD_IMPL(PrivateUse1, GuardImpl)

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", empty_memory_format);
    m.impl("empty_strided", empty_strided);
    m.impl("as_strided", as_strided);
    m.impl("view", view);
    m.impl("_reshape_alias", reshape_alias);
    m.impl("record_stream", record_stream);
    m.impl("_copy_from", copy_from);
    m.impl("_copy_from_and_resize", copy_from_and_resize);
    m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
}

// Copies see to it themselves. What torch does otherwise, for all other operators, is such a copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

void register_all() {
    c10::register_privateuse1_backend("simdev");
    at::RegisterPrivateUse1HooksInterface(new Hooks);
    c10::SetAllocator(device_type, &allocator());
    at::setHostAllocator(device_type, &host_allocator);
    obey_environment();
}

// Sums over all devices, or those of one.
py::dict counters(int device) {
    const auto sum = [device](auto of) {
        int64_t total = 0;
        for (int i = 0; i < device_count_max; ++i) {
            if (device < 0 || i == device) total += of(i);
        }
        return total;
    };
    const auto stats = [](int i) { return allocator().getDeviceStats(static_cast<c10::DeviceIndex>(i)); };
    py::dict out;
    for (int kind = 0; kind < kind_count; ++kind) {
        out[kind_names[static_cast<size_t>(kind)]] = sum([kind](int i) { return state_of(i).ran[kind].load(); });
    }
    out["launches"] = sum([](int i) { return state_of(i).launches.load(); });
    out["replays"] = sum([](int i) { return state_of(i).replays.load(); });
    out["waits"] = sum([](int i) { return state_of(i).waits.load(); });
    out["overlaps"] = sum([](int i) { return state_of(i).overlaps.load(); });
    out["pageable_h2d"] = sum([](int i) { return state_of(i).pageable_h2d.load(); });
    out["pageable_d2h"] = sum([](int i) { return state_of(i).pageable_d2h.load(); });
    out["h2d_bytes"] = sum([](int i) { return state_of(i).h2d_bytes.load(); });
    out["d2h_bytes"] = sum([](int i) { return state_of(i).d2h_bytes.load(); });
    out["allocations"] = sum([](int i) { return state_of(i).allocations.load(); });
    out["driver_allocations"] = sum([&](int i) { return stats(i).num_device_alloc; });
    out["in_use"] = sum([&](int i) { return stats(i).allocated_bytes[0].current; });
    out["peak"] = sum([&](int i) { return stats(i).allocated_bytes[0].peak; });
    out["reserved"] = sum([&](int i) { return stats(i).reserved_bytes[0].current; });
    out["pinned"] = pinned_size.load();
    out["pinned_allocations"] = pinned_allocations.load();
    const std::lock_guard<std::mutex> lock(known_mutex);
    out["known"] = known.size();
    return out;
}

py::list take_spans() {
    std::vector<Span> taken;
    {
        const std::lock_guard<std::mutex> lock(spans_mutex);
        taken.swap(spans);
    }
    py::list out;
    for (const Span& span : taken) {
        const char* kind = kind_names[static_cast<size_t>(span.kind)];
        out.append(
            py::make_tuple(span.device, span.stream, kind, span.name, span.begin_ns, span.end_ns, span.delay_us));
    }
    return out;
}

}  // namespace simdev

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    using namespace simdev;
    register_all();
    // Waits for threads that may need the interpreter's lock to warn.
    const auto free_lock = py::call_guard<py::gil_scoped_release>();
    m.def("fault", [](const std::string& line) { obey(line); }, py::arg("line"), free_lock);
    m.def("reset", &reset_faults, free_lock);
    m.def("device_count", &device_count);
    m.def("current_device", [] { return current_device; });
    m.def("set_visible", [](bool on) { is_visible = on; }, py::arg("on"));
    m.def("is_used", [] { return user == getpid(); });
    m.def("is_in_bad_fork", &is_in_bad_fork);
    m.def("is_broken", [](int device) { return state_of(device).is_broken.load(); }, py::arg("device") = 0);
    m.def("is_hanging", [](int device) { return state_of(device).hang.is_held(); }, py::arg("device") = 0);
    m.def("trace", [](bool on) { is_tracing = on; }, py::arg("on"));
    m.def("take_spans", &take_spans);
    m.def("counters", &counters, py::arg("device") = -1);
}
