// Completions: many workers push finished batches, one loop drains all of them at once.
//
// An intrusive list with one atomic head. A push links its node and publishes it with one compare-exchange; a
// drain takes the whole list with one exchange. A worker stalled anywhere in push has either published or not:
// it delays nobody else. (An array ring with several producers does not have this property: a producer stalled
// between claim and publish hides everything behind it.) It cannot overflow, since a node is owned by its batch.
//
// Every push writes the eventfd, one write per batch. Writing only when the list was empty would save a system
// call and lose the property above: the one that found it empty could stall before its write. A push may leave it out while
// the loop looks at the list (`wait_awake`): it has published before it asks, and the loop looks once more after it has said
// that it looks no longer, both sequentially consistent, so that one of them sees the other.
//
// Threads: push, any; drain and wait_awake, one.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <system_error>

#include "clock.h"
#include "probe.h"

namespace pyserve {

struct CompletionNode {
    CompletionNode* next = nullptr;
};

template <class Probe = NoProbe>
class Completions {
  public:
    Completions() : fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
        if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
    }
    ~Completions() { close(fd_); }
    Completions(const Completions&) = delete;
    Completions& operator=(const Completions&) = delete;

    // Readable whenever drain() may have something.
    int fd() const noexcept { return fd_; }

    void push(CompletionNode* node) noexcept {
        push_unsignalled(node);
        if (is_watched_.load(std::memory_order_seq_cst)) {
            signals_.fetch_add(1, std::memory_order_relaxed);
        } else {
            signal();
        }
    }

    // Waits awake, for `duration_ns` at most. Whether drain() has something.
    bool wait_awake(int64_t duration_ns) noexcept {
        const int64_t until = SteadyClock::now_ns() + duration_ns;
        is_watched_.store(true, std::memory_order_seq_cst);
        while (head_.load(std::memory_order_acquire) == nullptr && SteadyClock::now_ns() < until) {
            pause_thread();
        }
        is_watched_.store(false, std::memory_order_seq_cst);
        return head_.load(std::memory_order_seq_cst) != nullptr;
    }

    // For the loop thread itself, just before it drains.
    void push_unsignalled(CompletionNode* node) noexcept {
        CompletionNode* head = head_.load(std::memory_order_relaxed);
        do {
            node->next = head;
            Probe::at(Point::completions_before_push);
        } while (!head_.compare_exchange_weak(head, node, std::memory_order_seq_cst, std::memory_order_relaxed));
        Probe::at(Point::completions_after_push);
    }

    // Wakes the loop without a completion, for a change of a worker's state.
    void signal() noexcept {
        signals_.fetch_add(1, std::memory_order_relaxed);
        const uint64_t one = 1;
        // Fails only if the counter is about to overflow, and then the descriptor is readable already.
        [[maybe_unused]] const ssize_t written = write(fd_, &one, sizeof one);
    }

    // All finished nodes, oldest first, as a list linked by `next`; nullptr if none.
    CompletionNode* drain() noexcept {
        uint64_t count;
        // Before the exchange: a push after it writes again. EAGAIN means nothing was written since.
        [[maybe_unused]] const ssize_t got = read(fd_, &count, sizeof count);
        CompletionNode* newest = head_.exchange(nullptr, std::memory_order_acquire);
        CompletionNode* oldest = nullptr;
        while (newest != nullptr) {
            CompletionNode* next = newest->next;
            newest->next = oldest;
            oldest = newest;
            newest = next;
        }
        return oldest;
    }

    uint64_t signals() const noexcept { return signals_.load(std::memory_order_relaxed); }

  private:
    const int fd_;
    static void pause_thread() noexcept {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    alignas(64) std::atomic<CompletionNode*> head_{nullptr};
    std::atomic<uint64_t> signals_{0};
    std::atomic<bool> is_watched_{false};  // by wait_awake()
};

}  // namespace pyserve
