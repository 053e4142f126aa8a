// A native worker: one thread that takes batches, runs the model and completes them. Never touches Python.
//
//     starting ──> warming ──> ready ──> stopped
//                     └──> failed            (the warm-up raised; `error` says what)
//
// Its thread is started, joined and given up by the crew (crew.h), which shares it with the thread.
//
// Threads: construction, stop and what is const from the loop; the rest is its own thread's.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "batcher.h"
#include "completion.h"
#include "crew.h"
#include "request.h"
#include "request_pool.h"
#include "result.h"
#include "runs.h"
#include "staging.h"
#include "stats.h"
#include "status.h"
#include "torch_model.h"

namespace pyserve {

// One batch that came to an end, with one outcome for all its requests.
struct BatchResult : Result {
    BatchResult() : Result(Lane::native) {}

    c10::IValue output;  // of the whole batch, on the host; none unless status is ok
};

// What all workers of a lane share, and keep alive: a worker that was given up may outlive its lane. Constant after
// construction, or thread-safe by itself.
struct LaneShared {
    explicit LaneShared(size_t capacity) : batcher(capacity) {}

    std::shared_ptr<TorchModel> model;
    Inputs example;  // one item, each [1, ...]
    Batcher<> batcher;
    std::shared_ptr<Completions<>> completions;
    std::shared_ptr<RequestPool> pool = std::make_shared<RequestPool>();
    LaneStats stats;
    std::atomic<int> intra_op_threads{1};
    std::atomic<int64_t> staging_size{0};  // bytes of a slot, set from the largest batch
};

class Worker {
  public:
    Worker(std::shared_ptr<LaneShared> shared, uint32_t id);
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    // The body of its thread.
    void run() noexcept;

    void stop() noexcept { stop_.store(true, std::memory_order_release); }
    bool is_stopping() const noexcept { return stop_.load(std::memory_order_acquire); }

    uint32_t id() const { return id_; }
    WorkerState state() const noexcept { return state_.load(std::memory_order_acquire); }
    // REQUIRES: state() == failed.
    const std::string& error() const { return error_; }
    // When the oldest batch that runs now began, ns; 0 when idle. A run of the warm-up counts too.
    int64_t running_since() const noexcept { return runs_.since(); }
    // Makes the batch that began then fail, if it runs and calls an operator.
    bool interrupt(int64_t since) noexcept { return runs_.interrupt(since); }
    // The kernel's number of its thread; 0 when it has none.
    int thread() noexcept { return runs_.thread(); }
    uint64_t batches() const noexcept { return batches_.load(std::memory_order_relaxed); }

  private:
    // A group of requests of one shape on its way through the model.
    struct Flight {
        std::vector<Request*> requests;
        Staged staged;
        Status status;
        int64_t started_at = 0;
        int64_t staged_at = 0;
        Release release = Release::none;
        bool holds_permit = false;  // the last group of its take gives the permit back
    };

    Status warm_up();
    void serve();
    bool has_settings() const;
    void apply_settings();
    bool step();
    void begin();
    void launch(Flight& flight);
    void finish(Flight& flight);
    void run_singly(Flight& flight);
    void give_back(const Status& status) noexcept;
    void leave(bool& holds_permit) noexcept;
    void end_run() noexcept;
    template <class Body>
    Status forwarded(const Body& body) noexcept;
    void renew_model();
    void drop(std::vector<Request*>& requests);
    void complete(Flight& flight);
    void push(std::unique_ptr<BatchResult> result);

    const std::shared_ptr<LaneShared> keeps_;
    LaneShared& shared_;
    const uint32_t id_;
    std::atomic<bool> stop_{false};
    std::atomic<WorkerState> state_{WorkerState::starting};
    Runs runs_;
    std::atomic<uint64_t> batches_{0};
    std::string error_;
    // Its own thread only. Every request that the worker holds is at any moment in one place, `take_` or `in_flight_`;
    // it leaves that place when the result that carries it is complete. So when memory runs out half-way, all of them
    // come back: see give_back.
    Take take_;
    bool holds_permit_ = false;          // of what is in take_; later the last of its flights holds it
    std::shared_ptr<TorchModel> model_;  // shared with the other workers, unless calls leave traces in it
    bool is_half_changed_ = false;       // by a run that was interrupted; what it keeps is not to be used any more
    std::unique_ptr<Staging> staging_;
    std::vector<Flight> in_flight_;  // at most one on a CPU, two on an accelerator
    int threads_ = 0;
    int64_t staging_size_ = 0;
};

}  // namespace pyserve
