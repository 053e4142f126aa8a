// Plain heads of HTTP requests: where in the bytes each part of one lies.
//
// Plain is what ordinary clients send, and nothing about which servers have ever disagreed: a known method, a path
// without percent-encoding, HTTP/1.1, one Host, at most one of each header that frames or means something, printable
// ASCII throughout. Whatever else a head may be, right or wrong, is left to pyserve/http1/head.py, which has all of the
// rules and all of the errors. So this refuses nothing, and what it takes must mean to it what it means there.
// Standard library only; no Python.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace pyserve {

inline constexpr size_t plain_head_size_max = UINT16_MAX;  // so that places take two bytes
inline constexpr size_t plain_fields_max = 128;

// A part of a head's bytes.
struct Span {
    uint16_t begin, size;

    std::string_view of(std::string_view head) const { return head.substr(begin, size); }
};

struct HeadField {
    Span name, value;
};

struct PlainHead {
    size_t method = 0;     // in `plain_methods`
    Span path{}, query{};  // the query without its '?'
    Span id{};             // of x-request-id, if it is one that a client may choose
    uint64_t length = 0;
    bool is_http11 = true;  // else HTTP/1.0
    bool keep_alive = true;
    bool has_timing = false;  // one of `timing_names` is there
    size_t count = 0;         // of fields
    std::array<HeadField, plain_fields_max> fields;
};

inline constexpr std::array<std::string_view, 7> plain_methods = {"GET",    "HEAD",    "POST", "PUT",
                                                                  "DELETE", "OPTIONS", "PATCH"};
inline constexpr std::array<std::string_view, 2> timing_names = {"x-request-timeout-ms", "x-server-timing"};

namespace plain {

// What a header is to a server; of those from `host` on a plain head has one at most, and none of `other`.
enum class Kind : uint8_t { any, timing, host, length, connection, id, type, json_size, other };

constexpr char lower(char each) { return each >= 'A' && each <= 'Z' ? static_cast<char>(each | 0x20) : each; }

// `name` is in lower case.
constexpr bool is_name(std::string_view text, std::string_view name) {
    return text.size() == name.size() && std::equal(text.begin(), text.end(), name.begin(),
                                                    [](char left, char right) { return lower(left) == right; });
}

constexpr bool is_digit(char each) { return each >= '0' && each <= '9'; }
constexpr bool is_letter(char each) { return lower(each) >= 'a' && lower(each) <= 'z'; }

// Of names: not '_', which some take for '-', nor the other signs of a token.
inline constexpr auto name_signs = [] {
    std::array<bool, 256> signs{};
    for (size_t each = 0; each < 128; ++each) {
        const char sign = static_cast<char>(each);
        signs[each] = is_letter(sign) || is_digit(sign) || sign == '-';
    }
    return signs;
}();
constexpr bool is_name_sign(char each) { return name_signs[static_cast<unsigned char>(each)]; }

// How many of the bytes are printable, or blanks, from the first one on.
inline size_t value_size(std::string_view bytes) {
    constexpr uint64_t each = ~uint64_t{0} / 255;  // 1 in every byte
    size_t at = 0;
    for (; at + sizeof(uint64_t) <= bytes.size(); at += sizeof(uint64_t)) {
        uint64_t eight = 0;
        std::memcpy(&eight, bytes.data() + at, sizeof(eight));
        // A byte below ' ', or above '~', sets the highest bit of one.
        const uint64_t below = (eight - each * 0x20) & ~eight;
        const uint64_t above = (eight + each) | eight;
        if (((below | above) & (each * 0x80)) != 0) break;
    }
    while (at < bytes.size() && bytes[at] >= ' ' && bytes[at] <= '~') ++at;
    return at;
}

constexpr bool is_target_sign(char each) { return each >= '!' && each <= '~' && each != '#'; }
constexpr bool is_id_sign(char each) {
    return is_letter(each) || is_digit(each) || each == '.' || each == '_' || each == ':' || each == '-';
}

constexpr Kind kind_of(std::string_view name) {
    switch (name.size()) {
        case 4: return is_name(name, "host") ? Kind::host : Kind::any;
        case 6: return is_name(name, "expect") ? Kind::other : Kind::any;
        case 7: return is_name(name, "upgrade") ? Kind::other : Kind::any;
        case 10: return is_name(name, "connection") ? Kind::connection : Kind::any;
        case 12:
            return is_name(name, "x-request-id") ? Kind::id : is_name(name, "content-type") ? Kind::type : Kind::any;
        case 14: return is_name(name, "content-length") ? Kind::length : Kind::any;
        case 15: return is_name(name, timing_names[1]) ? Kind::timing : Kind::any;
        case 16: return is_name(name, "proxy-connection") ? Kind::other : Kind::any;
        case 17: return is_name(name, "transfer-encoding") ? Kind::other : Kind::any;
        case 20: return is_name(name, timing_names[0]) ? Kind::timing : Kind::any;
        case 31: return is_name(name, "inference-header-content-length") ? Kind::json_size : Kind::any;
        default: return Kind::any;
    }
}

// A number of at most 15 digits.
constexpr bool read_length(std::string_view text, uint64_t& length) {
    if (text.empty() || text.size() > 15) return false;
    length = 0;
    for (const char each : text) {
        if (!is_digit(each)) return false;
        length = length * 10 + static_cast<uint64_t>(each - '0');
    }
    return true;
}

// 'name' or 'name:port', the name of letters, digits, dots and dashes.
constexpr bool is_host(std::string_view text) {
    const size_t colon = text.find(':');
    const std::string_view name = text.substr(0, colon);
    if (name.empty() || !std::all_of(name.begin(), name.end(), [](char each) {
            return is_letter(each) || is_digit(each) || each == '.' || each == '-';
        })) {
        return false;
    }
    if (colon == std::string_view::npos) return true;
    uint64_t port = 0;
    return text.size() - colon - 1 <= 5 && read_length(text.substr(colon + 1), port) && port <= UINT16_MAX;
}

constexpr bool is_id(std::string_view text) {
    return !text.empty() && text.size() <= 128 && std::all_of(text.begin(), text.end(), is_id_sign);
}

}  // namespace plain

// Reads heads one after the other.
class PlainHeadReader {
  public:
    // `head` ends with its blank line. Returns whether it is plain and has at most `fields_max` header lines; what
    // `found` holds is only then of any use.
    static bool read(std::string_view head, size_t fields_max, PlainHead& found) {
        if (head.size() > plain_head_size_max) return false;
        PlainHeadReader reader(head, found);
        return reader.read_line() && reader.read_fields(std::min(fields_max, plain_fields_max));
    }

  private:
    using Kind = plain::Kind;

    PlainHeadReader(std::string_view head, PlainHead& found) : head_(head), found_(found) {
        found.query = found.id = Span{};
        found.length = 0;
        found.has_timing = false;
        found.count = 0;
    }

    bool take(std::string_view text) {
        if (head_.substr(at_, text.size()) != text) return false;
        at_ += text.size();
        return true;
    }

    Span span(size_t begin, size_t end) const {
        return {static_cast<uint16_t>(begin), static_cast<uint16_t>(end - begin)};
    }

    bool read_line() {
        const size_t space = head_.substr(0, 8).find(' ');
        if (space == std::string_view::npos) return false;
        const auto method = std::find(plain_methods.begin(), plain_methods.end(), head_.substr(0, space));
        if (method == plain_methods.end()) return false;
        found_.method = static_cast<size_t>(method - plain_methods.begin());
        const size_t begin = at_ = space + 1;
        if (begin >= head_.size() || head_[begin] != '/') return false;
        size_t question = 0;
        for (; at_ < head_.size() && plain::is_target_sign(head_[at_]); ++at_) {
            if (question != 0) continue;
            if (head_[at_] == '%') return false;
            if (head_[at_] == '?') question = at_;
        }
        found_.path = span(begin, question != 0 ? question : at_);
        if (question != 0) found_.query = span(question + 1, at_);
        found_.is_http11 = take(" HTTP/1.1\r\n");
        found_.keep_alive = found_.is_http11;
        return found_.is_http11 || take(" HTTP/1.0\r\n");
    }

    // Up to the blank line, which has to be the end.
    bool read_fields(size_t fields_max) {
        while (!take("\r\n")) {
            if (found_.count == fields_max || !read_field(found_.fields[found_.count])) return false;
            ++found_.count;
        }
        return at_ == head_.size() && (seen_ & bit(Kind::host)) != 0;
    }

    bool read_field(HeadField& field) {
        const size_t begin = at_;
        while (at_ < head_.size() && plain::is_name_sign(head_[at_])) ++at_;
        field.name = span(begin, at_);
        if (at_ == begin || !take(":")) return false;
        while (at_ < head_.size() && head_[at_] == ' ') ++at_;
        const size_t value_begin = at_;
        at_ += plain::value_size(head_.substr(at_));
        size_t end = at_;
        while (end > value_begin && head_[end - 1] == ' ') --end;
        if (end == value_begin || !take("\r\n")) return false;
        field.value = span(value_begin, end);
        return note(plain::kind_of(field.name.of(head_)), field.value);
    }

    static constexpr unsigned bit(Kind kind) { return 1U << static_cast<unsigned>(kind); }

    // Whether a head with this header is still plain.
    bool note(Kind kind, Span place) {
        if (kind == Kind::any) return true;
        const std::string_view value = place.of(head_);
        if (kind == Kind::timing) {
            found_.has_timing = true;
            return true;
        }
        if (kind == Kind::other || (seen_ & bit(kind)) != 0) return false;
        seen_ |= bit(kind);
        switch (kind) {
            case Kind::host: return plain::is_host(value);
            case Kind::length:
                // White space behind it is looked at elsewhere.
                return head_[size_t{place.begin} + place.size] == '\r' && plain::read_length(value, found_.length);
            case Kind::connection:
                found_.keep_alive = plain::is_name(value, "keep-alive");
                return found_.keep_alive || plain::is_name(value, "close");
            case Kind::id:
                if (plain::is_id(value)) found_.id = place;
                return true;
            default: return true;
        }
    }

    std::string_view head_;
    PlainHead& found_;
    size_t at_ = 0;
    unsigned seen_ = 0;
};

// The value of the last field called `name`, which is in lower case; nullptr if there is none.
inline const HeadField* find_field(std::string_view head, const HeadField* fields, size_t count,
                                   std::string_view name) {
    while (count-- > 0) {
        if (plain::is_name(fields[count].name.of(head), name)) return &fields[count];
    }
    return nullptr;
}

}  // namespace pyserve
