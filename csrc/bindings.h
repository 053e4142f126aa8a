// What the parts of the border to Python share: completions, the engine that drains them, and a lane's common calls.
//
// Python objects enter with submit (an owner per request) and leave with drain, both on the loop thread with the
// GIL held; between the two they are opaque pointers that no worker touches. The GIL is let go only around calls
// that load a model or wait for threads.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings_rows.h"
#include "completion.h"
#include "lane.h"
#include "process_lane.h"

namespace py = pybind11;

namespace pyserve {

inline const char* name_of(Code code) {
    switch (code) {
        case Code::ok: return "ok";
        case Code::model_error: return "model_error";
        case Code::out_of_memory: return "out_of_memory";
        case Code::expired: return "expired";
        case Code::cancelled: return "cancelled";
        case Code::closed: return "closed";
        case Code::worker_died: return "worker_died";
        case Code::not_run: return "not_run";
        case Code::not_begun: return "not_begun";
        case Code::interrupted: return "interrupted";
        case Code::device_lost: return "device_lost";
    }
    return "unknown";
}

// Memory that Python looks at without copying it.
struct Body {
    std::string bytes;
};

// A row of an output, which it keeps from going away.
struct Row {
    at::Tensor output;
    const char* bytes;
    size_t size;
};

inline void release_buffer(Py_buffer* buffer) {
    PyBuffer_Release(buffer);
    delete buffer;
}

// Larger bodies go to Python without another copy.
inline constexpr size_t copied_body_max = 65536;

inline py::object body_object(std::string&& bytes) {
    if (bytes.size() < copied_body_max) return py::bytes(bytes);
    const py::object body = py::cast(std::make_unique<Body>(Body{std::move(bytes)}));
    return py::memoryview(body);
}

// A result as Python sees it. Its requests have been given back to their lane.
struct Completion {
    py::list owners;   // of those that ended with this outcome
    py::list expired;  // owners of those that expired in the queue
    py::list stamps;   // (arrived_at, queued_at) in ns, one per entry of owners; native lane only
    py::list answers;  // (kind, status, head, body) per entry of owners; python lane only
    const char* code;
    std::string message;
    c10::IValue output, finished;
    int64_t started_at, staged_at, finished_at;
    uint32_t batch_size;  // of the batch that they were part of
    const char* release;  // why that batch left the queue
    bool was_alone;       // of a worker that died: nothing else can have been the cause
    // Of requests that front ends have made tensors of (bindings_rows.h): who counts them, the answers that have left, and
    // when the first of those had arrived; None, or empty, if there were none.
    py::object row_lane = py::none();
    py::list row_counts = py::list();
    int64_t row_arrived_at = 0;
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
    LostCount lost = std::make_shared<std::atomic<int>>(0);

    void on_ready(uint32_t) noexcept override {}  // the drain that follows takes what is there

    std::vector<Completion> drain() {
        std::vector<Completion> out;
        poller->run_ready();
        std::vector<std::shared_ptr<RowSource>> sources;
        CompletionNode* node = completions->drain();
        while (node != nullptr) {
            const std::unique_ptr<Result> result(static_cast<Result*>(node));
            node = node->next;
            out.push_back(to_completion(*result, sources));
        }
        for (const auto& source : sources) source->wake();
        return out;
    }

  private:
    // Cancelled requests were answered when they were cancelled; here only their memory comes back.
    static Completion to_completion(Result& result, std::vector<std::shared_ptr<RowSource>>& sources) {
        Completion completion{py::list(),
                              py::list(),
                              py::list(),
                              py::list(),
                              name_of(result.status.code),
                              std::move(result.status.message),
                              {},
                              {},
                              result.started_at,
                              result.staged_at,
                              result.finished_at,
                              result.batch_size,
                              name_of(result.release),
                              false};
        ProcessResult* of_process = nullptr;
        if (result.lane == Result::Lane::native) {
            auto& batch = static_cast<BatchResult&>(result);
            completion.output = std::move(batch.output);
            completion.finished = std::move(batch.finished);
        } else {
            of_process = static_cast<ProcessResult*>(&result);
            completion.was_alone = of_process->was_alone;
            for (AnswerPart& part : of_process->answers) {
                completion.answers.append(py::make_tuple(static_cast<int>(part.kind), part.status, py::bytes(part.head),
                                                         body_object(std::move(part.body))));
            }
            if (of_process->is_chunk) add_stream(completion, *of_process);
        }
        const bool is_ok = result.status.code == Code::ok;
        std::optional<RowDelivery> rows;
        for (size_t index = 0; index < result.requests.size(); ++index) {
            Request* request = result.requests[index];
            const State state = request->state.load(std::memory_order_acquire);
            const int64_t arrived_at = request->arrived_at, queued_at = request->queued_at.load();
            void*& buffer = of_process != nullptr ? static_cast<ProcessRequest*>(request)->buffer
                                                  : static_cast<TensorRequest*>(request)->buffer;
            auto* held = static_cast<Py_buffer*>(std::exchange(buffer, nullptr));
            FrontCall* call =
                of_process != nullptr ? nullptr : std::exchange(static_cast<TensorRequest*>(request)->call, nullptr);
            auto owner = py::reinterpret_steal<py::object>(static_cast<PyObject*>(result.pool->release(request)));
            if (held != nullptr) release_buffer(held);  // after the tensors that lie in it
            if (!owner) owner = py::none();             // of a front end, or its client has gone
            if (call != nullptr) {
                if (!rows) rows.emplace(completion.output, result.requests.size(), is_ok, result.finished_at);
                owner = rows->deliver(call, state, index, is_ok, result.started_at, sources);
            }
            if (state == State::expired) {
                if (!owner.is_none()) completion.expired.append(owner);
            } else {
                // A place per row of the output, so that row i stays owner i's; None for a dropped result.
                completion.owners.append(state == State::done ? owner : py::none());
                if (of_process == nullptr) {
                    completion.stamps.append(owner.is_none() ? py::object(py::none())
                                                             : py::object(py::make_tuple(arrived_at, queued_at)));
                }
            }
        }
        if (rows) {
            completion.row_lane = rows->lane()->owner();
            completion.row_counts = rows->counts();
            completion.row_arrived_at = rows->arrived_at();
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
    }
};

inline std::unique_ptr<Py_buffer, void (*)(Py_buffer*)> buffer_of(const py::handle& object) {
    auto view = std::make_unique<Py_buffer>();
    if (PyObject_GetBuffer(object.ptr(), view.get(), PyBUF_SIMPLE) != 0) throw py::error_already_set();
    return {view.release(), release_buffer};
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

// Whether there is a worker and less than `waiting_max` waits for it: the usual question about a request in one call.
template <class L>
bool has_room(const L& lane, int64_t waiting_max) {
    return static_cast<int64_t>(lane.queue_size()) < waiting_max && lane.ready_count() != 0;
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
    out["interrupted"] = s.interrupted.load();
    out["lost"] = s.lost.load();
    out["staging_fallback"] = s.staging_fallback.load();
    out["h2d"] = histogram(s.h2d);
    out["compute"] = histogram(s.compute);
    out["d2h"] = histogram(s.d2h);
    out["gap"] = histogram(s.gap);
    out["overlapped"] = s.overlapped.load();
    out["pageable_copies"] = s.pageable_copies.load();
    out["pinned_refused"] = s.pinned_refused.load();
    out["slots_grown"] = s.slots_grown.load();
    out["pinned_bytes"] = s.pinned_bytes.load();
    out["slot_bytes"] = s.slot_bytes.load();
    return out;
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

void bind_process_lane(py::module_& m);

}  // namespace pyserve
