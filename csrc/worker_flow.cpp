// The way of batches on a device: two on it at any time, so that one is copied while the other is computed.
//
// The next batch is taken when the device is about to end the one that it has, whatever its size (pace.h); earlier, and
// also a third, if there is a full one, which cannot grow. The groups of one take are launched one after the other as far
// as there are slots, and finished in order.
#include <algorithm>
#include <utility>

#include "clock.h"
#include "guarded.h"
#include "shape_groups.h"
#include "worker.h"

namespace pyserve {
namespace {

constexpr double ns_per_second = 1e9;
constexpr size_t flights_max = 3;
constexpr int64_t refusal_ns = 200'000;  // without a batch that could be taken: until the next try

int64_t to_ns(double seconds) { return static_cast<int64_t>(seconds * ns_per_second); }

}  // namespace

// Takes a batch, or finishes one, or waits for either. False when there is nothing more to do.
bool Worker::step_on_device() {
    Next next = Next::nothing;
    if (in_flight_.empty()) {
        next = shared_.batcher.next_batch(take_, stop_, warmed_size_);
        if (next == Next::larger) {
            warm_up_larger();
            return true;
        }
    } else if (const Wish wish = wish_for_batch(); wish != Wish::none) {
        int64_t wake_at = never_ns;
        next = shared_.batcher.try_next(take_, wake_at, wish == Wish::full);
        // Too few for now, or another worker was first.
        if (next != Next::batch) wishes_from_ = SteadyClock::now_ns() + refusal_ns;
    }
    if (next == Next::batch) {
        holds_permit_ = true;
        apply_settings();
        begin_on_device();
        return true;
    }
    if (in_flight_.empty()) return next != Next::closed;
    if (!await_oldest()) return true;
    finish_oldest();
    return true;
}

// Whether a batch should be taken now although the device has one.
Worker::Wish Worker::wish_for_batch() const {
    if (is_stopping() || in_flight_.size() >= flights_max || !staging_->has_room()) return Wish::none;
    const size_t waiting = shared_.batcher.queue_size();
    if (waiting == 0 || shared_.batcher.batch_size_max() > warmed_size_) return Wish::none;
    const int64_t now = SteadyClock::now_ns();
    if (now < wishes_from_) return Wish::none;
    if (waiting >= shared_.batcher.batch_size_max()) return Wish::full;
    if (in_flight_.size() > 1 || now < pace_.take_at()) return Wish::none;
    return Wish::any;
}

// Waits until the oldest batch is over or another one is to be taken. True if it is over.
bool Worker::await_oldest() {
    Flight& oldest = in_flight_.front();
    if (!oldest.status.ok() || !oldest.staged.slot) return true;
    bool is_over = true;
    const Status status =
        guarded([&] { is_over = staging_->wait(oldest.staged, [this] { return wish_for_batch() != Wish::none; }); });
    if (!status.ok()) oldest.status = status;
    return is_over || !status.ok();
}

// REQUIRES: the batch has been collected.
void Worker::note_times(Flight& flight) {
    const int64_t now = SteadyClock::now_ns();
    const int64_t before = std::exchange(last_finished_at_, now);
    LaneStats& stats = shared_.stats;
    DeviceTimes times;
    if (flight.staged.times) {
        times = *flight.staged.times;
        stats.h2d.observe(times.upload);
        stats.d2h.observe(times.fetch);
        // Not while nobody waited.
        const int64_t queued_at = flight.requests.front()->queued_at.load(std::memory_order_relaxed);
        if (times.gap && before != 0 && queued_at < before) stats.gap.observe(*times.gap);
    } else {
        times.compute = static_cast<double>(now - std::max(flight.staged_at, before)) / ns_per_second;
    }
    stats.compute.observe(times.compute);
    flight.on_device_ns = to_ns(times.compute + times.fetch);
    flight.upload_ns = to_ns(times.upload);
    const size_t next_rows = in_flight_.size() > 1 ? in_flight_[1].requests.size() : 0;
    pace_.finished(flight.requests.size(), now, flight.upload_ns, to_ns(times.compute), next_rows);
}

void Worker::begin_on_device() {
    if (!take_.dropped.empty()) drop(take_.dropped);
    auto groups = group_by_shape(take_.requests);
    if (groups.empty()) {
        leave(holds_permit_);
        return;
    }
    size_t next = in_flight_.size();
    in_flight_.reserve(next + groups.size());
    take_.requests.clear();
    for (auto& group : groups) {
        Flight& flight = in_flight_.emplace_back();
        flight.requests = std::move(group);
        flight.release = take_.release;
    }
    in_flight_.back().holds_permit = std::exchange(holds_permit_, false);
    while (next < in_flight_.size()) {
        if (next > 0 && !staging_->has_room()) {
            finish_oldest();
            --next;
            continue;
        }
        Flight& flight = in_flight_[next];
        flight.started_at = SteadyClock::now_ns();
        if (next == 0) runs_.begin(flight.started_at);
        launch(flight);
        // It was the oldest batch that took too long, and this one that was about to call an operator.
        if (flight.status.code == Code::interrupted && next > 0) {
            flight.staged = {};
            for (; next > 0; --next) finish_oldest();
            in_flight_[0].started_at = SteadyClock::now_ns();
            runs_.begin(in_flight_[0].started_at);
            fly(in_flight_[0]);
        }
        if (next > 0) shared_.stats.overlapped.fetch_add(1, std::memory_order_relaxed);
        ++next;
    }
}

}  // namespace pyserve
