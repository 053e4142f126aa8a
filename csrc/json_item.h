// JSON of one item: nested arrays of numbers, of exactly one kind and shape, as they lie in memory.
//
// It takes what it is sure of, and nothing else: whatever is odd about a text (a wrong shape, a number that does not
// fit, true, NaN, more digits than 64 bits hold) is left to the reader in Python, which has all of the rules and the
// words for what is wrong. What is taken becomes bit by bit what that reader makes of it (`handlers.json_numbers`).
// Standard library only; no Python.
#pragma once

#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace pyserve {

class JsonItem {
  public:
    // `kind` is a letter as Python's struct has them: f d, b h i q, B H I.
    JsonItem(char kind, std::vector<int64_t> shape) : kind_(kind), shape_(std::move(shape)) {
        uint64_t count = 1;
        for (const int64_t size : shape_) {
            if (size < 1 || count > count_max / static_cast<uint64_t>(size)) {
                throw std::invalid_argument("the shape of an item must have sizes from 1 on, and not too many numbers");
            }
            count *= static_cast<uint64_t>(size);
        }
        byte_count_ = count * size_of(kind);
    }

    uint64_t byte_count() const { return byte_count_; }

    // Whether all of `text` is such an item; `out` has room for byte_count() bytes, and is written in any case.
    bool read(std::string_view text, char* out) {
        if (read_at(text, 0, out) == 0) return false;
        skip_blanks();
        return at_ == text_.size();
    }
    // Where such an item ends that begins at `begin`, whatever follows it; 0 if there is none.
    size_t read_at(std::string_view text, size_t begin, char* out) {
        text_ = text;
        at_ = begin;
        out_ = out;
        return whole() ? at_ : 0;
    }

  private:
    static constexpr uint64_t count_max = uint64_t{1} << 40;
    static constexpr size_t digits_max = 18;  // all numbers of so many fit 64 bits
    static constexpr size_t token_max = 400;

    bool whole() {
        switch (kind_) {
            case 'f': return level<float>(0);
            case 'd': return level<double>(0);
            case 'b': return level<int8_t>(0);
            case 'h': return level<int16_t>(0);
            case 'i': return level<int32_t>(0);
            case 'q': return level<int64_t>(0);
            case 'B': return level<uint8_t>(0);
            case 'H': return level<uint16_t>(0);
            case 'I': return level<uint32_t>(0);
            default: return false;
        }
    }

    static uint64_t size_of(char kind) {
        switch (kind) {
            case 'b':
            case 'B': return 1;
            case 'h':
            case 'H': return 2;
            case 'f':
            case 'i':
            case 'I': return 4;
            case 'd':
            case 'q': return 8;
            default: throw std::invalid_argument("an item of this kind is not read here");
        }
    }

    char here() const { return at_ < text_.size() ? text_[at_] : '\0'; }
    void skip_blanks() {
        while (at_ < text_.size() &&
               (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t'))
            ++at_;
    }
    bool take(char sign) {
        skip_blanks();
        if (here() != sign) return false;
        ++at_;
        return true;
    }

    template <class T>
    bool level(size_t depth) {
        if (depth == shape_.size()) {
            skip_blanks();
            return number<T>();
        }
        if (!take('[')) return false;
        for (int64_t i = 0; i < shape_[depth]; ++i) {
            if (i > 0 && !take(',')) return false;
            if (!level<T>(depth + 1)) return false;
        }
        return take(']');
    }

    static bool is_digit(char each) { return each >= '0' && each <= '9'; }
    size_t digits() {
        const size_t begin = at_;
        while (is_digit(here())) ++at_;
        return at_ - begin;
    }

    template <class T>
    bool number() {
        const size_t begin = at_;
        const bool is_negative = here() == '-';
        if (is_negative) ++at_;
        const size_t first = at_, count = digits();
        if (count == 0 || (count > 1 && text_[first] == '0')) return false;
        bool is_float = false;
        if (here() == '.') {
            is_float = true;
            ++at_;
            if (digits() == 0) return false;
        }
        if (here() == 'e' || here() == 'E') {
            is_float = true;
            ++at_;
            if (here() == '+' || here() == '-') ++at_;
            if (digits() == 0) return false;
        }
        if (is_float) {
            if constexpr (std::is_floating_point_v<T>) return put_float<T>(begin);
            return false;
        }
        if (count > digits_max) return false;
        int64_t value = 0;
        for (size_t at = first; at < first + count; ++at) value = value * 10 + (text_[at] - '0');
        if (is_negative) value = -value;
        if constexpr (std::is_floating_point_v<T>) return put<T>(static_cast<double>(value));
        if constexpr (std::is_integral_v<T>) {
            if (value < static_cast<int64_t>(std::numeric_limits<T>::min()) ||
                value > static_cast<int64_t>(std::numeric_limits<T>::max()))
                return false;
            return put<T>(static_cast<T>(value));
        }
        return false;
    }

    template <class T>
    bool put_float(size_t begin) {
        double value = 0;
        if (at_ - begin > token_max) return false;
        const char* const end = text_.data() + at_;
        const auto result = std::from_chars(text_.data() + begin, end, value);
        // Too large or too small for it: what Python makes of that is left to Python.
        if (result.ec != std::errc() || result.ptr != end) return false;
        return put<T>(value);
    }

    // By way of double, as Python's own numbers take it.
    template <class T, class From>
    bool put(From value) {
        const T made = static_cast<T>(value);
        if constexpr (std::is_floating_point_v<T>) {
            if (!std::isfinite(made)) return false;
        }
        std::memcpy(out_, &made, sizeof made);
        out_ += sizeof made;
        return true;
    }

    const char kind_;
    const std::vector<int64_t> shape_;
    uint64_t byte_count_ = 0;
    std::string_view text_;
    size_t at_ = 0;
    char* out_ = nullptr;
};

}  // namespace pyserve
