// Worker: another model takes the place of the one that it runs, between two batches.
//
//     offered ──> warmed up, one size after each batch ──> taken: the next batch runs on it
//                     └──> refused: it raised, or gave rows that are none; the worker continues with what it has
//
// Requests notice nothing but that a batch may wait for one run of the warm-up. The model that it had is let go of with
// the last worker that ran it.
#include <chrono>
#include <thread>
#include <utility>

#include "clock.h"
#include "worker.h"

namespace pyserve {
namespace {

// Without a permit for the next run of the warm-up, until it asks again.
constexpr std::chrono::milliseconds turn_wait{1};

// Why something failed; never "", which stands for nothing that did.
std::string text_of(const Status& status) {
    return status.message.empty() ? "it failed without a text" : status.message;
}

}  // namespace

void Worker::offer(std::shared_ptr<TorchModel> model, uint32_t number) {
    const std::lock_guard lock(offer_mutex_);
    offered_ = std::move(model);
    offered_number_ = number;
    attention_.store(true, std::memory_order_release);
}

bool Worker::was_offered(uint32_t number) const {
    const std::lock_guard lock(offer_mutex_);
    return number != 0 && offered_number_ == number;
}

std::string Worker::refusal(uint32_t number) const {
    const std::lock_guard lock(offer_mutex_);
    return refused_number_ == number ? refusal_ : std::string();
}

// Looks what was offered since it looked last.
void Worker::heed_offer() {
    if (!attention_.exchange(false, std::memory_order_acq_rel)) return;
    if (is_stopping()) attention_.store(true, std::memory_order_release);
    Incoming incoming;
    {
        const std::lock_guard lock(offer_mutex_);
        if (!offered_) return;
        incoming.loaded = std::exchange(offered_, {});
        incoming.number = offered_number_;
    }
    incoming_ = std::move(incoming);
    if (incoming_->loaded != loaded_) return;
    incoming_->steps.clear();  // an exchange that is taken back: there is nothing to do
    end_offer({});
}

// Continues with what was offered, by one run of the warm-up at most. False if it is not its turn to run anything.
// REQUIRES: there is something.
bool Worker::prepare_exchange() {
    if (!shared_.batcher.try_enter()) return false;
    const Status status = warm_up_incoming();
    shared_.batcher.leave();
    if (!status.ok()) {
        end_offer(status.code == Code::interrupted ? "a run of it did not come to an end" : text_of(status));
    } else if (incoming_->warmed == incoming_->steps.size()) {
        exchange();
    }
    return true;
}

// The example has to be answered at one row and in the largest batch; what else the warm-up has is run as far as there is
// time for it.
Status Worker::warm_up_incoming() {
    Incoming& incoming = *incoming_;
    if (!incoming.runner) {
        const Status status = guarded([&] {
            incoming.runner = std::make_unique<BatchRunner>(incoming.loaded->instance(), shared_.example,
                                                            shared_.batching, shared_.batch_report);
            if (shared_.example.empty()) return;
            const size_t largest = shared_.batcher.batch_size_max();
            for (const size_t size : incoming.runner->sizes(largest)) incoming.steps.push_back({{0, size}, never_ns});
            for (const WarmUpStep& step : warm_up_plan(*incoming.runner, /*known=*/0, largest)) {
                incoming.steps.push_back(step);
            }
        });
        if (!status.ok() || incoming.steps.empty()) return status;
    }
    const WarmUpStep& step = incoming.steps[incoming.warmed++];
    const auto [item, size] = step.run;
    const bool has_to_end_well = step.limit_ns == never_ns;
    if (!has_to_end_well && incoming.spent_ns + warm_row_ns_ * static_cast<int64_t>(size) > step.limit_ns) return {};
    const int64_t began_at = SteadyClock::now_ns();
    Status status;
    const Status prepared = guarded([&] { status = warm_up(*incoming.runner, size, warm_up_item(item)); });
    incoming.spent_ns += SteadyClock::now_ns() - began_at;
    if (!prepared.ok()) return prepared;
    return has_to_end_well || status.code == Code::interrupted ? status : Status();
}

// REQUIRES: no batch is in hand.
void Worker::exchange() {
    std::shared_ptr<TorchModel> former = std::exchange(loaded_, incoming_->loaded);
    const Status status = guarded([this] {
        if (loaded_->has_state()) {
            take_model();  // as it was before the warm-up
            return;
        }
        model_ = loaded_;
        runner_ = std::move(incoming_->runner);
    });
    if (!status.ok()) loaded_ = std::move(former);
    threads_ = 0;  // of which the other one has not been notified
    end_offer(status.ok() ? std::string() : text_of(status));
}

void Worker::end_offer(const std::string& refusal) {
    const uint32_t number = incoming_->number;
    guarded([this] { incoming_.reset(); });
    if (!refusal.empty()) {
        const std::lock_guard lock(offer_mutex_);
        refused_number_ = number;
        refusal_ = refusal;
    }
    considered_.store(number, std::memory_order_release);
    shared_.completions->signal();
}

// As the batcher's, on a CPU; a model that was offered is seen to meanwhile.
Next Worker::next_batch() {
    for (;;) {
        if (is_stopping()) return Next::closed;
        heed_offer();
        if (!incoming_) {
            const Next next = shared_.batcher.next_batch(take_, attention_, warmed_size_);
            const bool is_called = next == Next::closed && attention_.load(std::memory_order_acquire);
            if (!is_called || is_stopping()) return next;
            continue;
        }
        const bool has_run = prepare_exchange();
        int64_t wake_at = never_ns;
        const Next next = shared_.batcher.try_next(take_, wake_at);
        if (next != Next::nothing) return next;
        if (!has_run) std::this_thread::sleep_for(turn_wait);
    }
}

}  // namespace pyserve
