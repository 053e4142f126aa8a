// A native worker: one thread that takes batches, runs the model and completes them. Never touches Python.
//
//     starting ──> warming ──> ready ──> stopped
//                     └──> failed            (the warm-up raised; `error` says what)
//
// Threads: construction, stop and join from the loop; the rest is its own.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "batcher.h"
#include "completion.h"
#include "request.h"
#include "request_pool.h"
#include "result.h"
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

enum class WorkerState : uint8_t { starting, warming, ready, failed, stopped };

// What all workers of a lane share. Constant after construction, or thread-safe by itself.
struct LaneShared {
    std::shared_ptr<TorchModel> model;
    Inputs example;  // one item, each [1, ...]
    Batcher<>* batcher = nullptr;
    Completions<>* completions = nullptr;
    std::shared_ptr<RequestPool> pool = std::make_shared<RequestPool>();
    LaneStats stats;
    std::atomic<int> intra_op_threads{1};
    std::atomic<int64_t> staging_size{0};  // bytes of a slot, set from the largest batch
};

class Worker {
  public:
    Worker(LaneShared& shared, uint32_t id);
    ~Worker();  // stops and joins
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    void stop() noexcept { stop_.store(true, std::memory_order_release); }
    bool is_stopping() const noexcept { return stop_.load(std::memory_order_acquire); }

    uint32_t id() const { return id_; }
    WorkerState state() const noexcept { return state_.load(std::memory_order_acquire); }
    bool is_over() const noexcept {
        const WorkerState seen = state();
        return seen == WorkerState::failed || seen == WorkerState::stopped;
    }
    // REQUIRES: state() == failed.
    const std::string& error() const { return error_; }
    // When the batch that runs now began, ns; 0 when idle.
    int64_t running_since() const noexcept { return running_since_.load(std::memory_order_relaxed); }
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

    void main() noexcept;
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
    void drop(std::vector<Request*>& requests);
    void complete(Flight& flight);
    void push(std::unique_ptr<BatchResult> result);

    LaneShared& shared_;
    const uint32_t id_;
    std::atomic<bool> stop_{false};
    std::atomic<WorkerState> state_{WorkerState::starting};
    std::atomic<int64_t> running_since_{0};
    std::atomic<uint64_t> batches_{0};
    std::string error_;
    // Its own thread only. Every request that the worker holds is at any moment in one place, `take_` or `in_flight_`;
    // it leaves that place when the result that carries it is complete. So when memory runs out half-way, all of them
    // come back: see give_back.
    Take take_;
    bool holds_permit_ = false;          // of what is in take_; later the last of its flights holds it
    std::shared_ptr<TorchModel> model_;  // shared with the other workers, unless calls leave traces in it
    std::unique_ptr<Staging> staging_;
    std::vector<Flight> in_flight_;  // at most one on a CPU, two on an accelerator
    int threads_ = 0;
    int64_t staging_size_ = 0;
    std::thread thread_;  // last: starts when the rest is there
};

}  // namespace pyserve
