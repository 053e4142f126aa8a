// The native lane of one served version: its queue, its workers and its requests.
//
// Threads: loop thread only, but for what the workers do inside.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "batcher.h"
#include "completion.h"
#include "crew.h"
#include "input_rules.h"
#include "worker.h"

namespace pyserve {

struct WorkerRow {
    uint32_t id;
    at::Device device;
    WorkerState state;
    bool is_stopping;
    bool is_lost;
    int64_t running_since;  // ns, 0 when idle
    uint64_t batches;
    std::string error;
};

// How far the last exchange of models is.
struct ExchangeState {
    size_t pending = 0;   // workers that still run the model before
    std::string refusal;  // why one of them continues with it; "" if none does
};

class Lane {
  public:
    // `capacity`, a power of two, is the size of the ring: more than may ever wait, see try_submit.
    // `example` is one item, each input [1, ...]; empty means no warm-up. `lost` counts the lost threads of all lanes.
    Lane(std::shared_ptr<Completions<>> completions, std::shared_ptr<TorchModel> model, Inputs example, size_t capacity,
         LostCount lost = std::make_shared<std::atomic<int>>(0));
    ~Lane();  // joins
    Lane(const Lane&) = delete;
    Lane& operator=(const Lane&) = delete;

    // Queues one request. nullptr when the ring is full even without its dead requests. Nobody is woken for it before
    // `announce`, so that one wake-up serves all requests of one turn of the loop.
    // `made` is recorded behind what makes inputs that are on a device.
    // REQUIRES: every input is on one device, that takes_from() is true of, with dim() >= 1 and size(0) == 1.
    TensorRequest* try_submit(Inputs inputs, void* owner, int64_t arrived_at, int64_t deadline,
                              bool wants_output = false, std::optional<c10::Event> made = {});
    void announce() { shared_->batcher.announce(); }

    // What the program was compiled for; try_submit does not look at it.
    void set_input_rules(std::vector<InputRule> rules) { input_rules_ = std::move(rules); }
    const std::vector<InputRule>& input_rules() const { return input_rules_; }

    // REQUIRES: there have been no workers yet.
    void set_finish(Finish finish, int64_t count) {
        shared_->finish = finish;
        shared_->finish_count = count;
    }

    // Whether inputs may lie on `device`: the host, or where the model is. A worker elsewhere fetches them from there.
    bool takes_from(at::Device device) const;
    // Where the model is, for people.
    std::string places() const;

    // What its workers may do on an accelerator. REQUIRES: none has been started.
    void set_batching(BatchingOptions options) { shared_->batching = std::move(options); }
    const BatchReport& batch_report() const { return shared_->batch_report; }

    // What its workers run beside the example before requests. REQUIRES: none has been started.
    void set_warm_up(WarmUpOptions options) { shared_->warm_up = std::move(options); }
    const WarmUpReport& warm_up_report() const { return shared_->warm_up_report; }

    // The request of a ticket, or nullptr if it has been freed.
    TensorRequest* find(uint64_t ticket) { return shared_->pool->find(ticket); }

    void set_limits(const BatchLimits& limits);
    void set_intra_op_threads(int count);
    // Workers of `device` keep to these CPUs. REQUIRES: there are no workers yet.
    void set_cpus(const std::string& device, std::vector<int> cpus) { shared_->cpus[device] = std::move(cpus); }
    // The same model, loaded once on each device that workers are to use. Workers that there are keep what they have.
    // REQUIRES: not empty.
    void set_models(std::vector<std::shared_ptr<TorchModel>> models) {
        models_ = std::move(models);
        offered_.reset();
    }
    // Another model for the same requests: workers that there are, or come, take it between two batches, once they have
    // warmed it up. All requests are answered, by one model or the other. `set_models` ends the exchange: new workers
    // begin with it; until then they begin with the one before, which may be offered again to take the exchange back.
    // REQUIRES: both are on a CPU.
    void exchange_model(std::shared_ptr<TorchModel> model);
    ExchangeState exchange_state() const;
    // Grows or shrinks. A worker that is stopped finishes its batch first; a new one gets the device with the
    // fewest workers.
    void set_workers(size_t count);
    // Joins workers that are over. Failed ones stay listed until set_workers.
    void reap();
    // When the oldest batch that runs now began, ns, those of lost workers left out; 0 if none runs.
    int64_t running_since() const;
    // Makes the batch fail that a worker began at `since`, if it still runs and calls an operator; to be repeated. False
    // if it has ended.
    bool interrupt(uint32_t id, int64_t since);
    // Gives a worker up whose batch does not come to an end: it counts no more, keeps its batch, and ends by itself if
    // it ever comes back. set_workers starts another. False if it has ended meanwhile.
    bool lose(uint32_t id);
    // No more submits; the workers finish what is queued, then stop.
    void close();
    // Stops and joins all; blocks until their batches are done, but for those of lost workers, which are abandoned. What
    // is still queued comes back as cancelled.
    void join();
    // The largest batch that fits a device's memory; 0 while nothing has shown one.
    uint32_t ceiling() const { return shared_->ceiling(); }
    // Larger ones are tried again.
    void forget_ceiling() { shared_->forget_ceiling(); }
    // Removes cancelled requests from the ring now.
    void purge();

    std::vector<WorkerRow> workers() const;
    // Workers that take batches now.
    size_t ready_count() const;
    // Workers that were given up and have not come back.
    size_t lost_count() const { return crew_.lost(); }
    size_t queue_size() const { return shared_->batcher.queue_size(); }
    size_t capacity() const { return shared_->batcher.capacity(); }
    // Batches, those of lost workers left out.
    uint32_t running() const;
    const LaneStats& stats() const { return shared_->stats; }
    bool takes_as_pixels(const at::Tensor& input) const {
        return !models_.empty() && models_.front()->takes_as_pixels(input);
    }
    // One item, each input [1, ...].
    const Inputs& example() const { return shared_->example; }

  private:
    void lend_permits();
    const std::shared_ptr<TorchModel>& least_used() const;

    const std::shared_ptr<LaneShared> shared_;
    std::vector<std::shared_ptr<TorchModel>> models_;  // one for each device
    std::shared_ptr<TorchModel> offered_;              // of an exchange that is under way
    uint32_t exchanges_ = 0;
    Crew<Worker> crew_;
    BatchLimits limits_;  // as set; the batcher's have the permits that lost workers hold on top
    size_t lent_ = 0;     // of such permits
    std::vector<InputRule> input_rules_;
    uint32_t next_worker_id_ = 9000;  // TorchServe's first worker id is the port 9000
};

}  // namespace pyserve
