// In how many pieces a batch is run in one of several streams.
#include "row_pieces.h"

#include "harness.h"

using pyserve::RowPieces;

namespace {

constexpr int64_t ms = 1'000'000;
constexpr int64_t item = 1000;  // numbers of a row

}  // namespace

TEST(one_stream_runs_batches_whole) {
    RowPieces pieces(0);
    for (int64_t rows : {1, 2, 8, 64}) CHECK_EQ(pieces.rows_of(rows, rows * item, 1), rows);
}

TEST(streams_together_hold_what_one_would_for_the_largest_batch) {
    for (int64_t streams : {2, 3, 4, 8}) {
        RowPieces pieces(0);
        pieces.rows_of(8, 8 * item, streams);
        for (int64_t rows = 1; rows <= 8; ++rows) {
            const int64_t each = pieces.rows_of(rows, rows * item, streams);
            CHECK(each >= 1 && each <= rows);
            CHECK(each * streams <= 8 + streams - 1);
        }
        CHECK_EQ(pieces.rows_of(1, item, streams), 1);
    }
}

TEST(small_batches_are_not_divided) {
    RowPieces pieces(0);
    pieces.rows_of(8, 8 * 256 * item, 2);
    CHECK_EQ(pieces.rows_of(4, 4 * 256 * item, 2), 4);
    CHECK_EQ(pieces.rows_of(8, 8 * 16 * item, 2), 8);  // of short texts
    CHECK_EQ(pieces.rows_of(5, 5 * 256 * item, 2), 3);
    CHECK_EQ(pieces.rows_of(16, 16 * 256 * item, 2), 8);  // a larger one than there ever was
    CHECK_EQ(pieces.rows_of(8, 8 * 256 * item, 2), 8);
}

TEST(reading_the_weights_again_has_to_be_cheap) {
    RowPieces pieces(20 * (ms - 20'000));         // 1 ms for a piece
    CHECK_EQ(pieces.rows_of(8, 8 * item, 4), 2);  // nothing is known yet
    pieces.note(item, 50 * ms);
    CHECK_EQ(pieces.rows_of(8, 8 * item, 4), 2);
    pieces.note(2 * item, 16 * ms);  // 64 ms for 8, of which 2 would be read once more
    CHECK_EQ(pieces.rows_of(8, 8 * item, 4), 3);
    pieces.note(8 * item, 31 * ms);
    CHECK_EQ(pieces.rows_of(8, 8 * item, 4), 8);
    pieces.note(8 * item, 100 * ms);  // somebody else had the CPU
    CHECK_EQ(pieces.rows_of(8, 8 * item, 4), 8);
}

TEST(small_networks_run_batches_whole) {
    RowPieces pieces(1000);
    pieces.note(item, 10'000);
    CHECK_EQ(pieces.rows_of(8, 8 * item, 2), 8);
}

TEST(outputs_without_rows_are_never_put_together) {
    RowPieces pieces(0);
    CHECK_EQ(pieces.rows_of(8, 8 * item, 2), 4);
    pieces.keep_whole();
    CHECK_EQ(pieces.rows_of(8, 8 * item, 2), 8);
}

TEST(nothing_is_divided_that_has_no_numbers) {
    RowPieces pieces(0);
    CHECK_EQ(pieces.rows_of(4, 0, 2), 4);
    CHECK_EQ(pieces.rows_of(0, 0, 2), 0);
    pieces.note(0, 5);
    pieces.note(5, 0);
    CHECK_EQ(pieces.rows_of(4, 4, 2), 2);
}

TEST_MAIN
