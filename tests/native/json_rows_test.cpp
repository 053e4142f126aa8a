// Numbers as JSON: in the words of Python, each read back as the same number, and nothing for what has no word.
#include "json_rows.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "harness.h"

using harness::Random;
using pyserve::JsonRow;
using pyserve::put_float;

namespace {

std::string text_of(double value) {
    std::string out;
    return put_float(value, out) ? out : "";
}

template <class T>
std::string json(char kind, const std::vector<int64_t>& shape, const std::vector<T>& values) {
    std::string out;
    const auto* row = reinterpret_cast<const char*>(values.data());
    return JsonRow(kind, shape.data(), shape.size()).write(row, values.size() * sizeof(T), out) ? out : "";
}

}  // namespace

TEST(floats_are_spelled_as_python_spells_them) {
    const std::vector<std::pair<double, std::string>> known = {
        {0.0, "0.0"},
        {-0.0, "-0.0"},
        {1.0, "1.0"},
        {-1.5, "-1.5"},
        {100.0, "100.0"},
        {0.1, "0.1"},
        {0.0001, "0.0001"},
        {0.00001, "1e-05"},
        {1.25e-05, "1.25e-05"},
        {1e-7, "1e-07"},
        {1e15, "1000000000000000.0"},
        {1e16, "1e+16"},
        {1.5e16, "1.5e+16"},
        {9999999999999998.0, "9999999999999998.0"},
        {123456789012345680.0, "1.2345678901234568e+17"},
        {1e100, "1e+100"},
        {5e-324, "5e-324"},
        {1.7976931348623157e308, "1.7976931348623157e+308"},
        {static_cast<double>(0.1F), "0.10000000149011612"},
        {12345.678, "12345.678"},
        {0.012, "0.012"},
        {1234567.0, "1234567.0"},
        {120.0, "120.0"},
    };
    for (const auto& [value, text] : known) CHECK(text_of(value) == text);
    for (const double none : {NAN, INFINITY, -INFINITY}) CHECK(text_of(none).empty());
}

TEST(each_float_is_read_back_as_it_was) {
    harness::for_each_seed(20000, [](uint64_t seed) {
        Random random(seed);
        const auto value = std::bit_cast<double>(random.next());
        if (!std::isfinite(value)) return;
        const std::string text = text_of(value);
        CHECK(std::strtod(text.c_str(), nullptr) == value);
        CHECK(text.find_first_of(".e") != std::string::npos);
    });
}

TEST(lists_are_nested_and_indented) {
    CHECK(json<int64_t>('q', {2, 1}, {1, -2}) == "[\n  [\n    1\n  ],\n  [\n    -2\n  ]\n]");
    CHECK(json<float>('f', {2}, {1, 2}) == "[\n  1.0,\n  2.0\n]");
    CHECK(json<uint8_t>('B', {}, {255}) == "255");
    CHECK(json<int8_t>('b', {1}, {-128}) == "[\n  -128\n]");
    CHECK(json<uint8_t>('?', {2}, {0, 1}) == "[\n  false,\n  true\n]");
    CHECK(json<int64_t>('q', {}, {std::numeric_limits<int64_t>::min()}) == "-9223372036854775808");
}

TEST(what_is_of_another_size_or_has_no_word_is_refused) {
    CHECK(json<float>('f', {3}, {1, 2}).empty() && json<float>('f', {0}, {}).empty());
    CHECK(json<double>('d', {2}, {1, NAN}).empty() && json<float>('x', {1}, {1}).empty());
}

TEST_MAIN
