// When the next batch for a device is taken.
#include "pace.h"

#include "harness.h"

using pyserve::Pace;

namespace {

constexpr int64_t ms = 1'000'000;

}  // namespace

TEST(what_is_not_known_yet_is_taken_at_once) {
    Pace pace;
    pace.launched(8, 100 * ms, ms);
    CHECK(pace.take_at() <= 100 * ms);
}

TEST(a_batch_is_taken_when_it_will_be_ready_as_the_device_ends) {
    Pace pace;
    pace.launched(8, 0, 2 * ms);
    pace.finished(8, 50 * ms, ms, 40 * ms, 0);
    pace.launched(8, 100 * ms, 2 * ms);
    // Goes up for 1 ms, is computed for 40; the next one takes 3 to be there, and half of that to spare.
    CHECK_EQ(pace.take_at(), (100 + 1 + 40) * ms - 3 * ms - 3 * ms / 2);
}

TEST(batches_follow_one_another) {
    Pace pace;
    pace.finished(8, ms, 0, 40 * ms, 0);
    pace.finished(2, ms, 0, 10 * ms, 0);
    pace.launched(8, 100 * ms, 0);
    pace.launched(2, 101 * ms, 0);
    CHECK_EQ(pace.take_at(), 150 * ms);
    pace.finished(8, 145 * ms, 0, 40 * ms, 2);  // later than was expected
    CHECK_EQ(pace.take_at(), 155 * ms);
    pace.finished(2, 155 * ms, 0, 10 * ms, 0);
    CHECK(pace.take_at() <= 0);
}

TEST(what_batches_take_is_followed_and_does_not_jump) {
    Pace pace;
    pace.finished(8, ms, 0, 40 * ms, 0);
    pace.finished(8, ms, 0, 80 * ms, 0);
    pace.launched(8, 100 * ms, 0);
    CHECK_EQ(pace.take_at(), 150 * ms);
    pace.finished(8, 200 * ms, 0, 8'000 * ms, 0);  // once, for whatever reason
    pace.launched(8, 300 * ms, 0);
    CHECK(pace.take_at() < 370 * ms);
}

TEST(ever_new_sizes_take_no_more_memory) {
    Pace pace;
    for (size_t rows = 1; rows < 20'000; ++rows) pace.finished(rows, ms, 0, ms, 0);
    CHECK(pace.size() <= 4096);
}

TEST_MAIN
