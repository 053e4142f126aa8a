// Completions: many pushers, one drainer that sleeps in poll(2).
#include "completion.h"

#include <poll.h>

#include <deque>
#include <thread>
#include <vector>

#include "harness.h"

using pyserve::CompletionNode;
using pyserve::Completions;

namespace {

struct Mark : CompletionNode {
    size_t pusher = 0;
    int64_t number = 0;
};

bool is_readable(int fd, int timeout_ms) {
    pollfd entry{fd, POLLIN, 0};
    return poll(&entry, 1, timeout_ms) == 1;
}

}  // namespace

TEST(a_drain_gives_the_oldest_first_and_quiets_the_descriptor) {
    Completions<> completions;
    CHECK(!is_readable(completions.fd(), 0));
    CHECK(completions.drain() == nullptr);
    Mark marks[3];
    for (Mark& mark : marks) completions.push(&mark);
    CHECK(is_readable(completions.fd(), 0));
    CompletionNode* node = completions.drain();
    for (Mark& mark : marks) {
        CHECK(node == &mark);
        node = node->next;
    }
    CHECK(node == nullptr);
    CHECK(!is_readable(completions.fd(), 0));
    CHECK_EQ(completions.signals(), uint64_t{3});
}

TEST(a_signal_alone_wakes_the_loop) {
    Completions<> completions;
    completions.signal();
    CHECK(is_readable(completions.fd(), 0));
    CHECK(completions.drain() == nullptr);
    CHECK(!is_readable(completions.fd(), 0));
}

// Several threads push; all of it comes, each thread's in order. `await` returns when there may be something.
template <class Await>
void push_from_many(Completions<>& completions, size_t pushers, int64_t count, Await await) {
    std::vector<std::deque<Mark>> marks(pushers);
    std::vector<std::thread> threads;
    for (size_t p = 0; p < pushers; ++p) {
        threads.emplace_back([&, p] {
            for (int64_t i = 0; i < count; ++i) {
                Mark& mark = marks[p].emplace_back();
                mark.pusher = p;
                mark.number = i;
                completions.push(&mark);
            }
        });
    }
    std::vector<int64_t> next(pushers, 0);
    for (int64_t got = 0; got < count * static_cast<int64_t>(pushers);) {
        await();
        for (CompletionNode* node = completions.drain(); node != nullptr; node = node->next) {
            const auto* mark = static_cast<const Mark*>(node);
            CHECK_EQ(mark->number, next[mark->pusher]);
            ++next[mark->pusher];
            ++got;
            harness::step();
        }
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(completions.drain() == nullptr);
    CHECK_EQ(completions.signals(), static_cast<uint64_t>(count) * pushers);
}

TEST(many_pushers_lose_nothing_keep_their_order_and_write_once_per_push) {
    Completions<> completions;
    push_from_many(completions, 4, harness::scaled(50'000), [&] { CHECK(is_readable(completions.fd(), -1)); });
}

TEST(one_who_waits_awake_is_not_written_to_and_loses_nothing) {
    Completions<> completions;
    CHECK(!completions.wait_awake(0) && !completions.wait_awake(1000));
    // Short waits end while somebody pushes: whoever comes too late for them has to write.
    push_from_many(completions, 3, harness::scaled(20'000), [&, round = int64_t{0}]() mutable {
        if (!completions.wait_awake(round++ % 3 * 500)) CHECK(is_readable(completions.fd(), -1));
    });
}

TEST(what_was_pushed_before_is_found_at_once) {
    Completions<> completions;
    Mark mark;
    completions.push(&mark);
    CHECK(completions.wait_awake(0) && completions.drain() == &mark);
}

TEST_MAIN
