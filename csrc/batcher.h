// Dynamic batcher: groups queued requests into batches for whichever worker is idle.
//
// Rules.
// - Work-conserving: an idle worker takes at once what is there, up to `batch_size_max` requests and
//   `batch_bytes_max` bytes of input. While every worker is busy requests gather in the ring, which is what makes
//   batches. Only when `batch_size_min` asks for it does an idle worker wait, and then until `batch_delay_max_ns`
//   after the first request was queued.
// - At most `running_max` batches run at once (workers beyond the CPU budget wait at this gate, with their
//   requests still in the ring, where they can be batched, cancelled or expire).
// - Workers that each compute on CPUs of their own share (`share_among`): one takes no more than its part of all that is
//   queued or runs, so that none of them computes for many what others would have computed at the same time. Never less
//   than `batch_size_min`, nor leaving fewer. Where a row costs as much in smaller batches (row_cost.h), one part more is
//   left for whichever worker ends first: it continues at once, while the clients of its last batch read and send again.
// - A request whose deadline has passed, or that was cancelled, is dropped while collecting, the first one too.
// - Settings may change at any time from any thread; a change applies from the next batch on.
//
// No mutex between push and a running batch. A worker sleeps only when the ring is empty, the gate is shut or a
// minimum asks it to wait; every push, every leave and every change of a setting wakes all who sleep for it.
// Before it sleeps it announces itself and then sleeps only if nothing was pushed and nothing was set since before
// its last look; so what came in between look and announcement is not slept through.
//
// Threads: push, purge and close, one thread (the loop); the rest, any.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "clock.h"
#include "probe.h"
#include "release_reason.h"
#include "request.h"
#include "ring.h"
#include "row_cost.h"
#include "waiter.h"

namespace pyserve {

struct BatchLimits {
    uint32_t batch_size_max = 1;
    uint32_t batch_size_min = 1;
    int64_t batch_delay_max_ns = 0;
    int64_t batch_bytes_max = INT64_MAX;
    uint32_t running_max = UINT32_MAX;
};

// What a worker takes from the ring in one go. Reused by its worker, so that taking does not allocate.
struct Take {
    std::vector<Request*> requests;   // state batched, in order of arrival
    std::vector<Request*> dropped;    // ended while queued: expired or cancelled
    Release release = Release::none;  // of `requests`

    void clear() {
        release = Release::none;
        requests.clear();
        dropped.clear();
    }
    bool empty() const { return requests.empty() && dropped.empty(); }
};

enum class Next {
    batch,    // there is a batch (perhaps only of dropped requests); the caller holds a run permit and must leave()
    nothing,  // nothing to take now
    larger,   // batches may be larger than the caller has run any; it holds a run permit and must leave()
    closed,   // closed and empty, or the worker was told to stop
};

// `Event` is the event count that workers sleep on; tests pass one of their own to schedule threads by hand.
template <class Clock = SteadyClock, class Probe = NoProbe, class Event = Waiter>
class Batcher {
  public:
    explicit Batcher(size_t capacity, uint64_t ring_start = 0) : ring_(capacity, ring_start) {}

    // --- loop thread ------------------------------------------------------------------------------------------

    // REQUIRES: request.state == queued and its fields are set. False when the ring is full (of which dead
    // requests may be a part: see purge).
    bool try_push(Request* request) noexcept {
        if (!try_push_unannounced(request)) return false;
        announce();
        return true;
    }

    // try_push in two halves, for a producer that has several requests: a sleeping worker may stay asleep until
    // `announce`, which must follow; one that is awake may take them at once.
    bool try_push_unannounced(Request* request) noexcept { return ring_.try_push(request); }
    void announce() noexcept { arrivals_.notify(); }

    // Takes dead requests (cancelled) out of the ring, keeping the order of the others, into `dropped`.
    // Between claim and push the ring looks empty to workers, which is not the end even if it is closed: see
    // closed_and_empty. They are woken afterwards.
    void purge(std::vector<Request*>& dropped) {
        // Allocated first: once claimed, nothing may throw, or requests would be lost.
        scratch_.resize(ring_.capacity());
        dropped.reserve(dropped.size() + ring_.capacity());
        purges_.fetch_add(1, std::memory_order_acq_rel);
        const size_t count = ring_.try_claim(scratch_.data(), scratch_.size());
        for (size_t i = 0; i < count; ++i) {
            Request* request = scratch_[i];
            // Cannot fail: this thread is the only producer and has just made room for all of them.
            if (request->state.load(std::memory_order_acquire) == State::queued)
                ring_.try_push(request);
            else
                dropped.push_back(request);
        }
        purges_.fetch_add(1, std::memory_order_acq_rel);
        arrivals_.notify();
    }

    // No more pushes. Workers finish what is queued and then see `closed`.
    void close() noexcept {
        closed_.store(true, std::memory_order_release);
        changes_.fetch_add(1, std::memory_order_acq_rel);
        wake_all();
    }

    // --- any thread -------------------------------------------------------------------------------------------

    void set_limits(const BatchLimits& limits) noexcept {
        batch_size_max_.store(std::max(1u, limits.batch_size_max), std::memory_order_relaxed);
        batch_size_min_.store(std::max(1u, limits.batch_size_min), std::memory_order_relaxed);
        // Half of the range, so that a time plus a delay does not overflow.
        batch_delay_max_ns_.store(std::clamp<int64_t>(limits.batch_delay_max_ns, 0, INT64_MAX / 2),
                                  std::memory_order_relaxed);
        batch_bytes_max_.store(std::max<int64_t>(0, limits.batch_bytes_max), std::memory_order_relaxed);
        running_max_.store(std::max(1u, limits.running_max), std::memory_order_release);
        changes_.fetch_add(1, std::memory_order_acq_rel);
        wake_all();
    }

    // After changing something a sleeping worker must see, such as its stop flag.
    void wake_all() noexcept {
        arrivals_.notify();
        permits_.notify();
    }

    size_t queue_size() const noexcept { return ring_.size(); }
    size_t capacity() const noexcept { return ring_.capacity(); }
    uint32_t running() const noexcept { return running_.load(std::memory_order_acquire); }
    // Never above the capacity: a batch that cannot gather would never be full.
    uint32_t batch_size_max() const noexcept {
        return static_cast<uint32_t>(
            std::min<size_t>(batch_size_max_.load(std::memory_order_relaxed), ring_.capacity()));
    }

    // --- workers ----------------------------------------------------------------------------------------------

    // One attempt, without sleeping. `wake_at` is set to when a window closes if that is why there is nothing.
    // `full_only` takes a batch only if it is full: for a worker that has one running already. `at_most` bounds it
    // further: for a worker that can take only so many now.
    Next try_next(Take& take, int64_t& wake_at, bool full_only = false, size_t at_most = SIZE_MAX) {
        wake_at = never_ns;
        take.clear();
        // Allocated first: with a permit or claimed requests in hand nothing may throw.
        const size_t room = std::min<size_t>(batch_size_max(), at_most);
        const size_t size_max = full_only ? room : std::min(room, part());
        take.requests.reserve(size_max);
        take.dropped.reserve(ring_.capacity());
        if (!try_enter()) return closed_and_empty() ? Next::closed : Next::nothing;
        Probe::at(Point::batcher_holding_permit);
        collect(take, size_max, wake_at, full_only, size_max < room);
        if (!take.empty()) {
            wake_at = never_ns;
            return Next::batch;
        }
        leave();
        return closed_and_empty() ? Next::closed : Next::nothing;
    }

    // Sleeps until there is a batch, or `stop` is set, or the batcher is closed and empty, or batches may have more than
    // `size_known` requests.
    Next next_batch(Take& take, const std::atomic<bool>& stop, size_t size_known = SIZE_MAX) {
        for (;;) {
            if (stop.load(std::memory_order_acquire)) return Next::closed;
            const News seen = news();  // before the look: what comes during it must not be missed
            if (batch_size_max() > size_known && try_enter()) return Next::larger;
            int64_t wake_at = never_ns;
            const Next next = try_next(take, wake_at);
            if (next != Next::nothing) return next;
            sleep(seen, wake_at, stop);
        }
    }

    // What is there is for so many workers from now on; 0: the first one takes as much as it may. A worker that shares says
    // what it `holds`: requests of its batch, until that is over; and what batches take, in ns.
    void share_among(uint32_t workers) noexcept { sharers_.store(workers, std::memory_order_relaxed); }
    void note_cost(size_t rows, int64_t ns) noexcept { cost_.note(rows, ns); }
    void hold(size_t count) noexcept { held_.fetch_add(count, std::memory_order_relaxed); }
    void let_go(size_t count) noexcept { held_.fetch_sub(count, std::memory_order_relaxed); }

    // A run permit for a batch from elsewhere. False if as many run as may.
    bool try_enter() noexcept {
        uint32_t running = running_.load(std::memory_order_relaxed);
        while (running < running_max_.load(std::memory_order_acquire)) {
            if (running_.compare_exchange_weak(running, running + 1, std::memory_order_acq_rel,
                                               std::memory_order_relaxed))
                return true;
        }
        return false;
    }

    // Gives back the run permit of a batch. REQUIRES: next_batch or try_next returned Next::batch before, or try_enter
    // true.
    void leave() noexcept {
        running_.fetch_sub(1, std::memory_order_acq_rel);
        permits_.notify();
    }

  private:
    // Equal at two moments: nothing was pushed and nothing was set in between.
    struct News {
        uint64_t pushed;
        uint32_t changes;
        bool operator==(const News&) const = default;
    };

    News news() const noexcept { return {ring_.pushed(), changes_.load(std::memory_order_acquire)}; }

    static constexpr uint32_t other_every = 32;

    // How many requests are one worker's part. What others hold may be late by a batch: a part is too small then.
    size_t part() noexcept {
        const size_t sharers =
            std::min(sharers_.load(std::memory_order_relaxed), running_max_.load(std::memory_order_relaxed));
        if (sharers == 0) return SIZE_MAX;
        const size_t queued = ring_.size(), there = queued + held_.load(std::memory_order_relaxed);
        const size_t whole = (there + sharers - 1) / sharers, with_reserve = (there + sharers) / (sharers + 1);
        const size_t size_min = batch_size_min_.load(std::memory_order_relaxed);
        if (size_min > 1) {
            // Fewer than the minimum would have to wait for others, perhaps for long.
            const size_t part = std::max(whole, size_min);
            return sharers > 1 && queued >= part + size_min ? part : SIZE_MAX;
        }
        const bool is_even = cost_.is_even(with_reserve, std::min<size_t>(whole, batch_size_max()));
        // Now and then the other way, so that what both cost stays known.
        const bool keeps_reserve = is_even != (parts_.fetch_add(1, std::memory_order_relaxed) % other_every == 0);
        if (!keeps_reserve && sharers == 1) return SIZE_MAX;
        return std::max<size_t>(1, keeps_reserve ? with_reserve : whole);
    }

    bool gate_is_open() const noexcept {
        return running_.load(std::memory_order_acquire) < running_max_.load(std::memory_order_acquire);
    }

    // The end: nothing is queued and nothing will be. A purge holds requests outside of the ring for a moment; a
    // ring seen empty counts only if no purge was under way or began meanwhile (odd: under way).
    bool closed_and_empty() const noexcept {
        if (!closed_.load(std::memory_order_acquire)) return false;
        const uint32_t purges = purges_.load(std::memory_order_acquire);
        return purges % 2 == 0 && ring_.size() == 0 && purges_.load(std::memory_order_acquire) == purges;
    }

    // Claims until the batch is full, the ring is empty or a limit is met. Dropped requests leave room for more.
    // Their number is bounded too, so that producers who cancel at once cannot keep a worker here for ever.
    void collect(Take& take, size_t size_max, int64_t& wake_at, bool full_only, bool is_part) {
        const int64_t bytes_max = batch_bytes_max_.load(std::memory_order_relaxed);
        const int64_t now = Clock::now_ns();
        int64_t bytes = 0;
        bool bytes_reached = false;
        take.requests.resize(size_max);
        size_t filled = 0;
        while (!bytes_reached) {
            Request** out = take.requests.data() + filled;
            const bool first = filled == 0;
            const size_t room = std::min(size_max - filled, ring_.capacity() - take.dropped.size());
            const size_t claimed = ring_.try_claim(out, room, [&](Request* const* seen, size_t count) {
                if (first && !is_ripe(seen, count, size_max, now, full_only, wake_at, take.release)) return size_t{0};
                return within_bytes(seen, count, bytes_max - bytes, first, bytes_reached);
            });
            if (claimed == 0) break;
            filled += keep_live(out, claimed, now, take.dropped, bytes);
        }
        take.requests.resize(filled);
        if (filled == 0)
            take.release = Release::none;
        else if (filled == size_max && !is_part)
            take.release = Release::full;
        else if (bytes_reached)
            take.release = Release::bytes;
    }

    // Whether a batch that begins with `seen` may leave now, and why. Sets `wake_at` if it may later.
    bool is_ripe(Request* const* seen, size_t count, size_t size_max, int64_t now, bool full_only, int64_t& wake_at,
                 Release& release) const noexcept {
        release = Release::full;
        if (full_only) return count >= size_max;
        const size_t size_min = std::min<size_t>(batch_size_min_.load(std::memory_order_relaxed), size_max);
        release = size_min > 1 ? Release::min_batch : Release::idle;
        if (count >= size_min) return true;
        release = Release::closing;
        if (closed_.load(std::memory_order_acquire)) return true;
        int64_t look_at =
            seen[0]->queued_at.load(std::memory_order_relaxed) + batch_delay_max_ns_.load(std::memory_order_relaxed);
        release = Release::delay;
        if (now >= look_at) return true;
        release = Release::deadline;
        // A request that expires inside the window must be dropped in time. Claims are from the front, so its
        // deadline ends the window for those before it.
        for (size_t i = 0; i < count; ++i) {
            look_at = std::min(look_at, seen[i]->deadline.load(std::memory_order_relaxed));
        }
        if (now >= look_at) return true;
        wake_at = look_at;
        return false;
    }

    static size_t within_bytes(Request* const* seen, size_t count, int64_t room, bool first, bool& reached) noexcept {
        reached = false;
        for (size_t i = 0; i < count; ++i) {
            room -= seen[i]->input_size.load(std::memory_order_relaxed);
            if (room >= 0 || (first && i == 0)) continue;
            reached = true;
            return i;
        }
        return count;
    }

    // Moves the claimed requests that may still run to the front of `out`. Returns how many there are.
    static size_t keep_live(Request** out, size_t claimed, int64_t now, std::vector<Request*>& dropped,
                            int64_t& bytes) {
        size_t kept = 0;
        for (size_t i = 0; i < claimed; ++i) {
            Request* request = out[i];
            const bool is_late = request->deadline.load(std::memory_order_relaxed) <= now;
            if (request->try_move(State::queued, is_late ? State::expired : State::batched) && !is_late) {
                bytes += request->input_size.load(std::memory_order_relaxed);
                out[kept++] = request;
            } else {
                dropped.push_back(request);
            }
        }
        return kept;
    }

    // Sleeps for what is missing: arrivals, or a permit. `seen` is from before the last look.
    void sleep(const News& seen, int64_t wake_at, const std::atomic<bool>& stop) noexcept {
        const bool for_permit = ring_.size() > 0 && !gate_is_open();
        Event& event = for_permit ? permits_ : arrivals_;
        const uint32_t key = event.prepare();
        Probe::at(Point::batcher_before_sleep);
        if (stop.load(std::memory_order_acquire) || !may_sleep(for_permit, seen, wake_at)) {
            event.cancel();
            return;
        }
        event.wait(key, wake_at);
        Probe::at(Point::batcher_after_wake);
    }

    // REQUIRES: the caller has announced itself, so that whatever changes from here on wakes it.
    bool may_sleep(bool for_permit, const News& seen, int64_t wake_at) const noexcept {
        if (closed_and_empty()) return false;
        if (for_permit) return !gate_is_open();
        // Without a window to wait for, requests mean that it was kept out by a gate that has opened since.
        return news() == seen && (wake_at != never_ns || ring_.size() == 0);
    }

    Ring<Request*, Probe> ring_;
    std::atomic<uint32_t> batch_size_max_{1};
    std::atomic<uint32_t> batch_size_min_{1};
    std::atomic<int64_t> batch_delay_max_ns_{0};
    std::atomic<int64_t> batch_bytes_max_{INT64_MAX};
    std::atomic<uint32_t> running_max_{UINT32_MAX};
    std::atomic<bool> closed_{false};
    std::atomic<uint32_t> changes_{0};  // of the settings above
    std::atomic<uint32_t> purges_{0};   // begun plus ended
    alignas(cache_line_size) std::atomic<uint32_t> running_{0};
    std::atomic<uint32_t> sharers_{0};
    std::atomic<size_t> held_{0};
    std::atomic<uint32_t> parts_{1};  // that were reckoned
    RowCost cost_;
    Event arrivals_;
    Event permits_;
    std::vector<Request*> scratch_;  // loop thread only
};

}  // namespace pyserve
