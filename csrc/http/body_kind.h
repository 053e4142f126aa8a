// Whether bytes that a model would take for numbers may be something to be read: as pyserve/body_kind.py and
// pyserve/tensor_types.py have it, to the byte. Standard library only; no Python.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string_view>

namespace pyserve {
namespace body_kind {

inline unsigned char byte_at(std::string_view body, size_t at) { return static_cast<unsigned char>(body[at]); }

inline bool is_ascii(std::string_view body) {
    return std::all_of(body.begin(), body.end(), [](char each) { return static_cast<unsigned char>(each) < 0x80; });
}

// UTF-8 as Python reads it: no surrogates, nothing that is longer than it need be, nothing above U+10FFFF.
inline bool is_utf8(std::string_view body) {
    const auto continues = [&](size_t at, unsigned char from, unsigned char to) {
        return at < body.size() && byte_at(body, at) >= from && byte_at(body, at) <= to;
    };
    for (size_t at = 0; at < body.size();) {
        const unsigned char first = byte_at(body, at++);
        if (first < 0x80) continue;
        size_t more = 0;
        unsigned char from = 0x80, to = 0xbf;
        if (first >= 0xc2 && first <= 0xdf) {
            more = 1;
        } else if (first >= 0xe0 && first <= 0xef) {
            more = 2;
            if (first == 0xe0) from = 0xa0;
            if (first == 0xed) to = 0x9f;
        } else if (first >= 0xf0 && first <= 0xf4) {
            more = 3;
            if (first == 0xf0) from = 0x90;
            if (first == 0xf4) to = 0x8f;
        } else {
            return false;
        }
        for (; more > 0; --more, from = 0x80, to = 0xbf) {
            if (!continues(at++, from, to)) return false;
        }
    }
    return true;
}

}  // namespace body_kind

// As `body_kind.may_have_kind`. REQUIRES: it is not empty.
inline bool may_have_kind(std::string_view body) {
    using namespace body_kind;
    constexpr std::string_view beginnings("\x1f\x89\xff\xfe\xef\xfd\x28\x93[{\" \t\r\nGPRBOfI%");
    constexpr std::string_view high_first("[{\" \t\r\n\xfe");
    constexpr size_t text_size_min = 32, zeros_max = 4;
    if (beginnings.find(body.front()) != std::string_view::npos || is_ascii(body)) return true;
    if (body.substr(0, 8).substr(std::min<size_t>(4, body.size())) == "ftyp") return true;
    if (body.front() == '\0') {
        const std::string_view start = body.substr(0, zeros_max);
        const size_t at = start.find_first_not_of('\0');
        if (at != std::string_view::npos && high_first.find(start[at]) != std::string_view::npos) return true;
    }
    return body.size() >= text_size_min && is_utf8(body);
}

// As `tensor_types.may_be_read`: JSON, a file, or text; sent as plain bytes, only a list and a file of numpy's.
inline bool may_be_read(std::string_view content_type, std::string_view body) {
    if (body.empty() || (body.front() == '[' && body.back() == ']') || body.starts_with("\x93NUMPY")) return true;
    return content_type != "application/octet-stream" && may_have_kind(body);
}

}  // namespace pyserve
