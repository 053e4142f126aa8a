// When to wait awake: only for what is expected at once, and less and less where it does not come.
#include "lookout.h"

#include "harness.h"

using pyserve::Lookout;

TEST(nothing_is_waited_for_of_which_nothing_is_known) {
    Lookout lookout;
    CHECK_EQ(lookout.wait_ns(), 0);
}

TEST(what_takes_microseconds_is_waited_for_and_what_takes_longer_is_not) {
    Lookout quick, slow;
    for (int i = 0; i < 100; ++i) {
        quick.note_duration(20'000);
        slow.note_duration(1'000'000'000);
    }
    CHECK(quick.wait_ns() >= 20'000 && quick.wait_ns() <= Lookout::wait_max_ns);
    CHECK_EQ(slow.wait_ns(), 0);
    for (int i = 0; i < 100; ++i) slow.note_duration(20'000);
    CHECK(slow.wait_ns() > 0);
    for (int i = 0; i < 100; ++i) quick.note_duration(1'000'000'000);
    CHECK_EQ(quick.wait_ns(), 0);
}

TEST(in_vain_it_is_tried_less_and_less) {
    Lookout lookout;
    lookout.note_duration(20'000);
    uint32_t waited = 0;
    constexpr uint32_t rounds = 20'000;
    for (uint32_t i = 0; i < rounds; ++i) {
        if (lookout.wait_ns() == 0) continue;
        ++waited;
        lookout.note_wait(false);
    }
    CHECK(waited >= 10 && waited <= 12 + rounds / Lookout::left_out_max);
    while (lookout.wait_ns() == 0) harness::step();
    lookout.note_wait(true);
    CHECK(lookout.wait_ns() > 0);
}

TEST(odd_durations_do_no_harm) {
    Lookout lookout;
    for (const int64_t each : {int64_t{0}, int64_t{-5}, INT64_MAX, INT64_MIN}) lookout.note_duration(each);
    CHECK(lookout.wait_ns() >= 0 && lookout.wait_ns() <= Lookout::wait_max_ns);
}

TEST_MAIN
