// Numbers as they lie in memory, as JSON: nested lists with an indent of 2, as Python's `json.dumps` writes them.
//
// NaN and infinities, for which JSON has no word, are left to whoever has one. Standard library only; no Python.
#pragma once

#include <charconv>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>

namespace pyserve {

// In the words of Python's `repr`: the fewest digits that give the same number again. False if it is not finite.
inline bool put_float(double value, std::string& out) {
    if (!std::isfinite(value)) return false;
    char text[32];
    const auto made = std::to_chars(text, text + sizeof text, value, std::chars_format::scientific);
    std::string_view all(text, static_cast<size_t>(made.ptr - text));
    if (all.front() == '-') {
        out += '-';
        all.remove_prefix(1);
    }
    const size_t mark = all.find('e');
    const std::string_view number = all.substr(0, mark);  // d or d.ddd
    int exponent = 0;
    const char* digits = all.data() + mark + (all[mark + 1] == '+' ? 2 : 1);
    std::from_chars(digits, all.data() + all.size(), exponent);
    if (exponent < -4 || exponent >= 16) {
        out += all;  // e+16, e-05, e+100: as there
        return true;
    }
    const char first = number.front();
    const std::string_view rest = number.size() > 2 ? number.substr(2) : std::string_view();
    if (exponent < 0) {
        out += "0.";
        out.append(static_cast<size_t>(-exponent - 1), '0');
        out += first;
        out += rest;
        return true;
    }
    const auto whole = static_cast<size_t>(exponent);  // digits of `rest` in front of the point
    out += first;
    out += rest.substr(0, whole);
    if (rest.size() < whole) out.append(whole - rest.size(), '0');
    out += '.';
    if (rest.size() > whole)
        out += rest.substr(whole);
    else
        out += '0';
    return true;
}

inline void put_integer(int64_t value, std::string& out) {
    char text[24];
    out.append(text, static_cast<size_t>(std::to_chars(text, text + sizeof text, value).ptr - text));
}

class JsonRow {
  public:
    // `kind` is a letter as Python's struct has them: f d, b h i q, B ?. `shape` has `rank` sizes.
    JsonRow(char kind, const int64_t* shape, size_t rank) : kind_(kind), shape_(shape), rank_(rank) {}

    // Adds the `size` bytes at `row` to `out`. False if they are not of that shape, nothing, or have no word; `out` is
    // then of no use. `is_flat`: only the numbers, separated by commas.
    bool write(const char* row, size_t size, std::string& out, bool is_flat = false) {
        uint64_t count = 1;
        for (size_t i = 0; i < rank_; ++i) {
            if (shape_[i] < 1) return false;
            count *= static_cast<uint64_t>(shape_[i]);
        }
        switch (kind_) {
            case 'f': return whole<float>(row, size, count, out, is_flat);
            case 'd': return whole<double>(row, size, count, out, is_flat);
            case 'b': return whole<int8_t>(row, size, count, out, is_flat);
            case 'h': return whole<int16_t>(row, size, count, out, is_flat);
            case 'i': return whole<int32_t>(row, size, count, out, is_flat);
            case 'q': return whole<int64_t>(row, size, count, out, is_flat);
            case 'B': return whole<uint8_t>(row, size, count, out, is_flat);
            case '?': return whole<bool>(row, size, count, out, is_flat);
            default: return false;
        }
    }

  private:
    template <class T>
    bool whole(const char* row, size_t size, uint64_t count, std::string& out, bool is_flat) {
        if (count * sizeof(T) != size) return false;
        if (!is_flat) return level<T>(0, row, out);
        for (uint64_t i = 0; i < count; ++i) {
            if (i > 0) out += ',';
            if (!number<T>(row, out)) return false;
        }
        return true;
    }

    template <class T>
    bool level(size_t depth, const char*& row, std::string& out) {
        if (depth == rank_) return number<T>(row, out);
        out += '[';
        for (int64_t i = 0; i < shape_[depth]; ++i) {
            if (i > 0) out += ',';
            out += '\n';
            out.append(2 * (depth + 1), ' ');
            if (!level<T>(depth + 1, row, out)) return false;
        }
        out += '\n';
        out.append(2 * depth, ' ');
        out += ']';
        return true;
    }

    template <class T>
    static bool number(const char*& row, std::string& out) {
        if constexpr (std::is_same_v<T, bool>) {
            out += *row++ != 0 ? "true" : "false";
            return true;
        } else {
            T value;
            std::memcpy(&value, row, sizeof value);
            row += sizeof value;
            if constexpr (std::is_floating_point_v<T>) return put_float(static_cast<double>(value), out);
            put_integer(static_cast<int64_t>(value), out);
            return true;
        }
    }

    const char kind_;
    const int64_t* const shape_;
    const size_t rank_;
};

}  // namespace pyserve
