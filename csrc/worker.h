// A native worker: one thread that takes batches, runs the model and completes them. Never touches Python.
//
//     starting ──> warming ──> ready ──> stopped
//                     └──> failed            (the warm-up raised; `error` says what)
//
// Its thread is started, joined and given up by the crew (crew.h), which shares it with the thread.
//
// Threads: construction, stop and what is const from the loop; the rest is its own thread's.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "batch_runner.h"
#include "batcher.h"
#include "completion.h"
#include "crew.h"
#include "device_probe.h"
#include "finish.h"
#include "guarded.h"
#include "pace.h"
#include "request.h"
#include "request_pool.h"
#include "result.h"
#include "runs.h"
#include "staging.h"
#include "stats.h"
#include "status.h"
#include "torch_model.h"
#include "warm_up.h"

namespace pyserve {

// One batch that came to an end, with one outcome for all its requests.
struct BatchResult : Result {
    BatchResult() : Result(Lane::native) {}

    c10::IValue output;    // of the whole batch, on the host; none unless status is ok
    c10::IValue finished;  // what LaneShared::finish made of it; none if that is left to the handler
};

// What all workers of a lane share, and keep alive: a worker that was given up may outlive its lane. Constant after
// construction, or thread-safe by itself.
struct LaneShared {
    explicit LaneShared(size_t capacity) : batcher(capacity) {}

    Inputs example;  // one item, each [1, ...]
    BatchingOptions batching;
    BatchReport batch_report;
    WarmUpOptions warm_up;
    WarmUpReport warm_up_report;
    Batcher<> batcher;
    std::shared_ptr<Completions<>> completions;
    std::shared_ptr<RequestPool> pool = std::make_shared<RequestPool>();
    LaneStats stats;
    Finish finish = Finish::none;  // set before there are workers
    int64_t finish_count = 0;
    std::atomic<int> intra_op_threads{1};
    std::atomic<int> workers{0};                   // that there are to be
    std::atomic<int64_t> staging_size{0};          // bytes of a slot, set from the largest batch
    std::map<std::string, std::vector<int>> cpus;  // by device; those that its workers keep to, constant by then

    // The largest number of requests that fits a device's memory, once that has been found out; 0 before. From the next
    // batches on the loop asks for no more, see NativeLane.
    uint32_t ceiling() const noexcept { return ceiling_.load(std::memory_order_relaxed); }
    void lower_ceiling(size_t size) noexcept {
        const auto wanted = static_cast<uint32_t>(std::max<size_t>(1, size));
        uint32_t seen = ceiling();
        while (seen == 0 || seen > wanted) {
            if (!ceiling_.compare_exchange_weak(seen, wanted, std::memory_order_relaxed)) continue;
            completions->signal();
            return;
        }
    }
    void forget_ceiling() noexcept { ceiling_.store(0, std::memory_order_relaxed); }

  private:
    std::atomic<uint32_t> ceiling_{0};
};

class Worker {
  public:
    // `model` is on the device that the worker is to use; the others there have it too.
    Worker(std::shared_ptr<LaneShared> shared, std::shared_ptr<TorchModel> model, uint32_t id);
    Worker(const Worker&) = delete;
    Worker& operator=(const Worker&) = delete;

    // The body of its thread.
    void run() noexcept;

    void stop() noexcept {
        stop_.store(true, std::memory_order_release);
        attention_.store(true, std::memory_order_release);
    }
    bool is_stopping() const noexcept { return stop_.load(std::memory_order_acquire); }

    uint32_t id() const { return id_; }
    at::Device device() const { return device_; }

    // Has it run `model`, which is warmed up between batches, from one of the next batches on. `number` is above that of
    // any offer before; one of those that was not taken yet is forgotten. Loop only, which then wakes it.
    // REQUIRES: device() is a CPU, and `model` is there.
    void offer(std::shared_ptr<TorchModel> model, uint32_t number);
    bool was_offered(uint32_t number) const;
    // Whether the offer of that number is still to be taken.
    bool is_considering(uint32_t number) const noexcept { return considered_.load(std::memory_order_acquire) < number; }
    // Why it continues with what it had, although there was the offer of that number; "" if it does not.
    std::string refusal(uint32_t number) const;

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
        // By the device's clock, if it has one, and without waits; 0 on a CPU.
        int64_t upload_ns = 0;
        int64_t on_device_ns = 0;  // computed and copied back
        Release release = Release::none;
        bool holds_permit = false;  // the last group of its take gives the permit back
        bool is_finished = false;   // staged.output is class_per_pixel's
    };

    // Another model on its way to be run, csrc/worker_exchange.cpp.
    struct Incoming {
        uint32_t number = 0;
        std::shared_ptr<TorchModel> loaded;
        std::unique_ptr<BatchRunner> runner;
        std::vector<WarmUpStep> steps;  // of its warm-up
        size_t warmed = 0;              // of these
        int64_t spent_ns = 0;           // on these
    };

    void take_model();
    Status warm_up();
    Status warm_up_example(std::vector<size_t> sizes);
    std::vector<WarmUpStep> warm_up_plan(const BatchRunner& runner, size_t known, size_t largest) const;
    Status warm_up_further(const std::vector<WarmUpStep>& plan, int64_t began_at);
    void warm_up_larger();
    Status warm_up(BatchRunner& runner, size_t size, const Inputs& item);
    Status warm_up_and_prepare(size_t size, const Inputs& item);
    template <class Body>
    Status run_warm_up(const Body& body);
    Inputs warm_up_item(size_t number) const;
    size_t fitting(size_t size) const;
    void heed_offer();
    bool prepare_exchange();
    Status warm_up_incoming();
    void exchange();
    void end_offer(const std::string& refusal);
    Next next_batch();
    std::string no_room_text(const std::string& cause) const;
    void serve();
    void apply_settings();
    bool step();
    void begin();
    void launch(Flight& flight);
    void fly(Flight& flight);
    void finish(Flight& flight);
    void finish_oldest();
    // On a device, csrc/worker_flow.cpp.
    enum class Wish : uint8_t { none, any, full };
    bool step_on_device();
    Wish wish_for_batch() const;
    bool await_oldest();
    void begin_on_device();
    void note_times(Flight& flight);
    Status judged(Status status);
    bool has_run_out_of_memory(c10::Device device) noexcept;
    void run_again(Flight& flight);
    void run_part(Flight& flight);
    static void release_cache() noexcept;
    void await_inputs(const std::vector<Request*>& requests) const;
    void shrink_output(Flight& flight) const;
    void finish_output(Flight& flight, BatchResult& result) const;
    void give_back(const Status& status) noexcept;
    bool has_lost_device() const noexcept { return DeviceLosses::of_process().is_lost(device_); }
    void end_on_lost_device();
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
    const at::Device device_;
    const uint32_t id_;
    std::atomic<bool> stop_{false};
    std::atomic<bool> attention_{false};  // stop_ was set, or there is an offer: it is not to sleep
    mutable std::mutex offer_mutex_;      // of the next four
    std::shared_ptr<TorchModel> offered_;
    uint32_t offered_number_ = 0;
    uint32_t refused_number_ = 0;
    std::string refusal_;
    std::atomic<uint32_t> considered_{0};  // the number of the last offer that was taken or refused
    std::atomic<WorkerState> state_{WorkerState::starting};
    Runs runs_;
    std::atomic<uint64_t> batches_{0};
    std::string error_;
    // Its own thread only. Every request that the worker holds is at any moment in one place, `take_` or `in_flight_`;
    // it leaves that place when the result that carries it is complete. So when memory runs out half-way, all of them
    // come back: see give_back.
    std::shared_ptr<TorchModel> loaded_;
    std::optional<Incoming> incoming_;
    Take take_;
    bool holds_permit_ = false;            // of what is in take_; later the last of its flights holds it
    size_t held_ = 0;                      // requests of the take that it runs, on a CPU
    std::shared_ptr<TorchModel> model_;    // `loaded_`, unless calls leave traces in it
    std::unique_ptr<BatchRunner> runner_;  // of `model_`
    int64_t memory_failures_ = 0;          // of the device's allocator, as of the last look
    bool is_half_changed_ = false;         // by a run that was interrupted; what it keeps is not to be used any more
    std::unique_ptr<Staging> staging_;
    std::vector<Flight> in_flight_;  // in order; at most one on a CPU
    Pace pace_;
    int64_t last_finished_at_ = 0;  // of batches on a device
    int64_t wishes_from_ = 0;       // no batch is asked for before, while the device has one
    int threads_ = 0;               // of these two the model was notified
    int workers_ = 0;
    int64_t staging_size_ = 0;
    size_t warmed_size_ = 0;   // the largest batch that the warm-up knew
    int64_t warm_row_ns_ = 0;  // of its last run that ended well
};

// As `guarded`, for what runs the model: it may be interrupted.
template <class Body>
Status Worker::forwarded(const Body& body) noexcept {
    Status status = guarded(body);
    if (!runs_.is_interrupted()) return status;
    runs_.forgive();
    is_half_changed_ = model_->has_state();
    shared_.stats.interrupted.fetch_add(1, std::memory_order_relaxed);
    return {Code::interrupted, {}};
}

}  // namespace pyserve
