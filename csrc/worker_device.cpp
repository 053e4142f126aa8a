// What surrounds the model on a device: inputs that lie there already, and the last steps of answers.
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <utility>

#include "finish.h"
#include "guarded.h"
#include "worker.h"

namespace pyserve {
namespace {

bool any_wants_output(const std::vector<Request*>& requests) {
    return std::any_of(requests.begin(), requests.end(),
                       [](const Request* request) { return static_cast<const TensorRequest*>(request)->wants_output; });
}

}  // namespace

// The stream that reads inputs on a device, which is current there, waits for what makes them.
void Worker::await_inputs(const std::vector<Request*>& requests) const {
    for (const Request* request : requests) {
        const auto* of_tensors = static_cast<const TensorRequest*>(request);
        if (!of_tensors->made) continue;
        const c10::Device device = of_tensors->inputs.front().device();
        of_tensors->made->block(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
    }
}

// On the device, before the output is copied to the host: of scores per pixel a tenth is left.
void Worker::shrink_output(Flight& flight) const {
    flight.is_finished = false;
    if (shared_.finish != Finish::classes || any_wants_output(flight.requests)) return;
    if (auto found = class_per_pixel(flight.staged.output)) {
        flight.staged.output = std::move(*found);
        flight.is_finished = true;
    }
}

// The output is on the host.
void Worker::finish_output(Flight& flight, BatchResult& result) const {
    (flight.is_finished ? result.finished : result.output) = std::move(flight.staged.output);
    if (shared_.finish != Finish::ranked) return;
    guarded([&] {  // what cannot be ranked has the handler's words for it
        auto found = ranked(result.output, shared_.finish_count);
        if (!found) return;
        result.finished = std::move(*found);
        if (!any_wants_output(flight.requests)) result.output = {};
    });
}

}  // namespace pyserve
