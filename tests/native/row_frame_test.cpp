// What rows' frames and those of their answers hold: what a front end writes is what the engine reads, and of what an engine
// writes only what it can mean is read.
#include "row_frame.h"

#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "frame_input.h"
#include "harness.h"

using harness::Random;
using pyserve::RowHead;
using pyserve::RowOrigin;
using pyserve::RowOutput;
using pyserve::write_row_head;

namespace {

bool reads(const std::string& text) {
    const frame_input::Exact exact(text);
    RowOutput output;
    return output.read(exact.view());
}

std::string text_of(const RowOutput& output) {
    std::string text(1, output.kind());
    for (size_t i = 0; i < output.rank(); ++i) text += (i > 0 ? "," : "") + std::to_string(output.shape()[i]);
    return text;
}

}  // namespace

TEST(a_rows_head_is_its_numbers_and_then_its_texts) {
    std::string head = "what was there before";
    const RowOrigin origin{.arrived_at = 3, .wire_size = 4, .listener = 5, .is_http11 = 1};
    write_row_head({.generation = 1, .route = 2}, origin, "id", "127.0.0.1:1", "POST / HTTP/1.1\r\n\r\n", head);
    uint64_t numbers[4];
    CHECK(head.size() > sizeof numbers);
    std::memcpy(numbers, head.data(), sizeof numbers);
    for (uint64_t i = 0; i < 4; ++i) CHECK(numbers[i] == i + 1);
    CHECK(head[32] == 5 && head[33] == 1);
    CHECK(head.substr(34) == "id\n127.0.0.1:1\nPOST / HTTP/1.1\r\n\r\n");
}

TEST(an_output_is_a_kind_and_sizes) {
    RowOutput output;
    CHECK(output.read("f16") && output.kind() == 'f' && output.rank() == 1 && output.shape()[0] == 16);
    CHECK(output.count() == 16 && output.byte_count() == 64);
    CHECK(output.read("q3,224") && output.rank() == 2 && output.count() == 672 && output.byte_count() == 5376);
    CHECK(output.read("?") && output.rank() == 0 && output.count() == 1 && output.byte_count() == 1);
    CHECK(output.read("h0,5") && output.count() == 0 && output.byte_count() == 0);
    CHECK(output.read("d1,2,3,4,5,6,7,8") && output.rank() == 8);
}

TEST(what_is_odd_is_no_output) {
    for (const char* text :
         {"", "x4", "4", "f-1", "f1,", "f,1", "f,", "f1,,2", "f 1", "f01", "f1.0", "f+1", "d1,2,3,4,5,6,7,8,9",
          "f1099511627777", "f1048576,1048577", "f9999999999999", "f18446744073709551617", "e4", "H4"}) {
        CHECK(!reads(text));
    }
    CHECK(!reads("f" + std::string(100, '1')) && !reads(std::string("f\0", 2)));
}

TEST(whatever_is_read_is_what_was_written) {
    harness::for_each_seed(20000, [](uint64_t seed) {
        Random random(seed);
        constexpr std::string_view signs = "fdbhiqB?xH0123456789,,-";
        std::string text;
        for (uint64_t i = random.below(24); i > 0; --i) text += signs[random.below(signs.size())];
        const frame_input::Exact exact(text);
        RowOutput output;
        if (!output.read(exact.view())) return;
        CHECK(text_of(output) == text);
        uint64_t count = 1;
        for (size_t i = 0; i < output.rank(); ++i) count *= static_cast<uint64_t>(output.shape()[i]);
        CHECK(output.count() == count && output.byte_count() == count * output.number_size());
    });
}

TEST_MAIN
