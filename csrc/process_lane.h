// The python lane of one served version: its queue, its worker processes and its requests.
//
// Threads: loop thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "batcher.h"
#include "completion.h"
#include "process_worker.h"

namespace pyserve {

struct ProcessWorkerRow {
    uint32_t id;
    ProcessState state;
    bool is_stopping;
    int64_t running_since;  // ns, 0 when idle
    uint64_t batches;
    bool died_in_rerun;
    std::string error;
};

class ProcessLane : public Watched {
  public:
    // `capacity`, a power of two, is the size of the ring: more than may ever wait.
    ProcessLane(std::shared_ptr<Completions<>> completions, std::shared_ptr<Poller> poller, size_t capacity);
    ~ProcessLane() override;
    ProcessLane(const ProcessLane&) = delete;
    ProcessLane& operator=(const ProcessLane&) = delete;

    // Queues one request; with rerun_flag among those that are run a second time, which is the caller's to do once.
    // nullptr when the ring is full even without its dead requests. `head`, and `body` up to
    // body_inline_max bytes, are copied; a larger body must stay where it is until the request is released.
    // REQUIRES: head.size() <= head_size_max and body.size() <= body_size_max.
    ProcessRequest* try_submit(std::string_view head, std::string_view body, uint32_t flags, void* owner,
                               int64_t arrived_at, int64_t deadline);

    // The request of a ticket, or nullptr if it has been freed.
    ProcessRequest* find(uint64_t ticket) { return shared_.pool->find(ticket); }

    // How many requests a worker was given together with this one, itself included; 0 if none has it.
    size_t batch_size_of(uint64_t ticket) const noexcept;

    // The client has gone. False if the request is over or not known.
    bool cancel(uint64_t ticket);

    void set_limits(const BatchLimits& limits);
    void set_intra_op_threads(int count) { shared_.intra_op_threads = count < 1 ? 1 : count; }
    // A worker that takes batches from now on. Duplicates the descriptors. Returns its id.
    uint32_t add_worker(int socket, int request_memory, int answer_memory, size_t in_flight_max);
    // It finishes what it has, then ends. Nothing happens if there is no such worker.
    void stop_worker(uint32_t id);
    // Forgets it. What it still has comes back as worker_died.
    void remove_worker(uint32_t id);
    // No more submits; the workers finish what is queued, then stop.
    void close();
    // Forgets all workers. What is still queued comes back as cancelled.
    void join();
    // Removes cancelled requests from the ring now.
    void purge();

    std::vector<ProcessWorkerRow> workers() const;
    // Workers that take batches now.
    size_t ready_count() const { return shared_.ready_count; }
    size_t queue_size() const { return batcher_.queue_size() + shared_.reruns.size(); }
    size_t capacity() const { return batcher_.capacity(); }
    uint32_t running() const { return batcher_.running(); }
    const LaneStats& stats() const { return shared_.stats; }
    const std::shared_ptr<ProcessPool>& pool() const { return shared_.pool; }

    void on_ready(uint32_t events) noexcept override;  // its timer

  private:
    // Gives workers what is queued; also batches ahead, if `ahead`.
    void feed(bool ahead = true) noexcept;
    void set_timer(int64_t at) noexcept;

    std::shared_ptr<Completions<>> completions_;
    std::shared_ptr<Poller> poller_;
    Batcher<> batcher_;
    ProcessLaneShared shared_;
    std::vector<std::unique_ptr<ProcessWorker>> workers_;
    int timer_ = -1;
    int64_t timer_at_ = never_ns;  // as it is set
    bool is_feeding_ = false;
    bool is_closed_ = false;
    uint32_t next_worker_id_ = 9000;  // TorchServe's first worker id is the port 9000
};

}  // namespace pyserve
