// The sum that several processes share: it never passes its limit, whoever takes when, and whatever stands in a page.
#include "front_ledger.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "harness.h"

using harness::Random;
using harness::scaled;
using pyserve::ledger_page_size;
using pyserve::LedgerPage;
using pyserve::LedgerView;

namespace {

constexpr uint64_t size_max = 1000;

// Pages for `count` processes, all 0, shared with children.
class Pages {
  public:
    explicit Pages(size_t count)
        : count_(count), place_(mmap(nullptr, size(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) {
        CHECK(place_ != MAP_FAILED);
    }
    ~Pages() { munmap(place_, size()); }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;

    LedgerView of(size_t number) const { return {at(0), at(number), count_, number, size_max}; }
    LedgerPage& page(size_t number) const { return *reinterpret_cast<LedgerPage*>(at(number)); }

  private:
    size_t size() const { return count_ * ledger_page_size; }
    char* at(size_t number) const { return static_cast<char*>(place_) + number * ledger_page_size; }

    const size_t count_;
    void* const place_;
};

// Takes and gives back at random; `taken` has what all of them were granted. Returns whether anything was granted.
bool take_at_random(LedgerView view, uint64_t seed, uint64_t rounds, std::atomic<uint64_t>& taken) {
    Random random(seed);
    uint64_t held = 0;
    bool was_granted = false;
    for (uint64_t i = 0; i < rounds; ++i) {
        const uint64_t wanted = random.below(size_max + size_max / 2);
        if (wanted > held) {
            if (!view.hold(wanted)) continue;
            was_granted = true;
            CHECK(taken.fetch_add(wanted - held) + (wanted - held) <= size_max);
        } else {
            taken.fetch_sub(held - wanted);  // before: another one may have it as soon as it is given back
            CHECK(view.hold(wanted));
        }
        held = wanted;
    }
    taken.fetch_sub(held);
    view.charge(0);
    return was_granted;
}

}  // namespace

TEST(what_was_granted_never_passes_the_limit) {
    harness::for_each_seed(4, [](uint64_t seed) {
        constexpr size_t count = 3;
        const Pages pages(count);
        std::atomic<uint64_t> taken = 0;
        std::atomic<int> granted = 0;
        std::vector<std::thread> threads;
        for (size_t i = 0; i < count; ++i) {
            threads.emplace_back(
                [&, i] { granted += take_at_random(pages.of(i), seed * count + i, scaled(20'000), taken); });
        }
        for (std::thread& each : threads) each.join();
        CHECK_EQ(granted.load(), int{count});
        CHECK_EQ(taken.load(), uint64_t{0});
        CHECK_EQ(pages.of(0).free(), size_max);
    });
}

TEST(one_alone_may_have_all_that_the_others_leave) {
    const Pages pages(3);
    LedgerView first = pages.of(0), second = pages.of(1);
    CHECK(first.hold(size_max));
    CHECK(!second.hold(1));
    CHECK_EQ(second.held_by(1), uint64_t{0});
    CHECK(first.hold(size_max - 10));
    CHECK(second.hold(10));
    CHECK(!second.hold(11));
    CHECK_EQ(second.held_by(1), uint64_t{10});
    CHECK_EQ(first.free(), uint64_t{0});
    CHECK(!first.hold(UINT64_MAX));
    second.charge(size_max);  // was not asked; nobody else gets anything meanwhile
    CHECK(!first.hold(size_max - 9));
    CHECK(first.hold(5));
}

TEST(who_dies_leaves_its_number_for_others_to_clear) {
    const Pages pages(2);
    LedgerView rest = pages.of(0);
    const pid_t child = fork();
    if (child == 0) _exit(pages.of(1).hold(size_max) ? 0 : 1);
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(!rest.hold(1));
    pages.page(1).held.store(0);
    CHECK(rest.hold(size_max));
}

TEST(rubbish_counts_for_the_limit_at_most) {
    const Pages pages(3);
    LedgerView view = pages.of(0);
    for (const uint64_t rubbish : {UINT64_MAX, UINT64_MAX - size_max, size_max + 1, uint64_t{1} << 63}) {
        pages.page(1).held.store(rubbish);
        CHECK_EQ(view.others(), size_max);
        CHECK_EQ(view.free(), uint64_t{0});
        CHECK(!view.hold(1));
        pages.page(2).held.store(rubbish);
        CHECK_EQ(view.others(), 2 * size_max);
        pages.page(2).held.store(0);
    }
    pages.page(1).held.store(0);
    CHECK(view.hold(size_max));
}

TEST(who_finds_no_room_is_seen_for_as_long_as_it_says) {
    const Pages pages(3);
    LedgerView view = pages.of(0), other = pages.of(1);
    constexpr int64_t now = 1'000'000'000'000, second = 1'000'000'000;
    CHECK_EQ(view.wanting_count(now), size_t{0});
    other.want(now + second);
    CHECK_EQ(view.wanting_count(now), size_t{1});
    CHECK_EQ(view.busy_count(0, now), size_t{1});
    CHECK_EQ(other.wanting_count(now), size_t{0});
    CHECK_EQ(view.wanting_count(now + second), size_t{0});
    CHECK(pages.of(2).hold(5));
    CHECK_EQ(view.busy_count(4, now), size_t{2});
    CHECK_EQ(view.busy_count(5, now), size_t{1});
    for (const int64_t rubbish : {INT64_MAX, INT64_MIN, now + 3600 * second}) {
        other.want(rubbish);
        CHECK_EQ(view.wanting_count(now), size_t{0});
    }
}

TEST_MAIN
