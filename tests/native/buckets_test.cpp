// The sizes that batches are filled up to.
#include "buckets.h"

#include <vector>

#include "harness.h"

using pyserve::bucket_below;
using pyserve::bucket_for;
using pyserve::buckets_of;
using pyserve::buckets_up_to;

namespace {

using Sizes = std::vector<size_t>;

}  // namespace

TEST(sizes_of_usual_limits) {
    CHECK(buckets_up_to(0) == Sizes({1}));
    CHECK(buckets_up_to(1) == Sizes({1}));
    CHECK(buckets_up_to(2) == Sizes({1, 2}));
    CHECK(buckets_up_to(3) == Sizes({1, 2, 3}));
    CHECK(buckets_up_to(8) == Sizes({1, 2, 4, 8}));
    CHECK(buckets_up_to(11) == Sizes({1, 2, 4, 8, 11}));
    CHECK(buckets_up_to(32) == Sizes({1, 2, 4, 8, 12, 16, 24, 32}));
    CHECK(buckets_up_to(100) == Sizes({1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 100}));
}

TEST(every_batch_fits_and_little_is_filling) {
    for (size_t largest = 1; largest <= 600; ++largest) {
        harness::step();
        const Sizes sizes = buckets_up_to(largest);
        CHECK_EQ(sizes.front(), size_t{1});
        CHECK_EQ(sizes.back(), largest);
        for (size_t i = 1; i < sizes.size(); ++i) CHECK(sizes[i - 1] < sizes[i]);
        for (size_t count = 1; count <= largest; ++count) {
            const size_t size = bucket_for(sizes, count);
            CHECK(size >= count);
            CHECK(size - count <= count);
            if (count > 8) CHECK(2 * (size - count) <= count);
        }
    }
}

TEST(the_largest_number_is_no_endless_loop) {
    const Sizes sizes = buckets_up_to(SIZE_MAX);
    CHECK_EQ(sizes.back(), SIZE_MAX);
    for (size_t i = 1; i < sizes.size(); ++i) CHECK(sizes[i - 1] < sizes[i]);
}

TEST(sizes_that_were_asked_for) {
    CHECK(buckets_of({16, 4, 4, 0, 64}, 32) == Sizes({4, 16, 32}));
    CHECK(buckets_of({1, 32}, 32) == Sizes({1, 32}));
    CHECK(buckets_of({}, 8) == Sizes({8}));
    CHECK(buckets_of({5}, 0) == Sizes({1}));
}

TEST(neighbours) {
    const Sizes sizes = {2, 4, 8};
    CHECK_EQ(bucket_for(sizes, 1), size_t{2});
    CHECK_EQ(bucket_for(sizes, 4), size_t{4});
    CHECK_EQ(bucket_for(sizes, 9), size_t{9});
    CHECK_EQ(bucket_below(sizes, 8), size_t{4});
    CHECK_EQ(bucket_below(sizes, 100), size_t{8});
    CHECK_EQ(bucket_below(sizes, 2), size_t{0});
}

TEST_MAIN
