// Requests that need nothing of a server but the model's answer: a plain head (head.h), all of the body, nothing behind
// it, and no header that asks for more.
//
// It refuses nothing: what it does not take goes the way of all requests. Standard library only; no Python.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

#include "http/head.h"

namespace pyserve {

struct FastLimits {
    size_t head_size_max = 0;  // bytes, with the blank line
    size_t line_size_max = 0;  // of the request line
    size_t fields_max = 0;     // header lines
    uint64_t body_size_max = 0;
    bool takes_ids = true;  // a client's x-request-id is kept
};

struct FastRequest {
    std::string_view path, body;
    std::string_view id;                    // the client's; "" if the server has to make one
    std::string_view content_type, accept;  // the last ones; "" without
    std::string_view json_size;             // of Inference-Header-Content-Length, as it stands there; "" without
    std::string_view accept_encoding, authorization;  // the only ones; "" without
    size_t head_size = 0;
};

class FastRequestReader {
  public:
    explicit FastRequestReader(const FastLimits& limits)
        // A head no longer than a line may be has no line that is too long.
        : limits_(limits), head_size_max_(std::min(limits.head_size_max, limits.line_size_max)) {}

    // Whether `data` is one such request. `found` refers to `data`.
    bool read(std::string_view data, FastRequest& found) {
        constexpr std::string_view blank_line = "\r\n\r\n";
        if (data.size() < 5 || data.substr(0, 5) != "POST ") return false;
        const size_t end = data.substr(0, head_size_max_).find(blank_line);
        if (end == std::string_view::npos) return false;
        found.head_size = end + blank_line.size();
        const std::string_view head = data.substr(0, found.head_size);
        if (!PlainHeadReader::read(head, limits_.fields_max, head_)) return false;
        found.body = data.substr(found.head_size);
        if (!head_.is_http11 || !head_.keep_alive || head_.has_timing || head_.query.begin != 0) return false;
        if (head_.length == 0 || head_.length != found.body.size() || head_.length > limits_.body_size_max)
            return false;
        found.path = head_.path.of(head);
        found.id = limits_.takes_ids ? head_.id.of(head) : std::string_view();
        return read_fields(head, found);
    }

  private:
    bool read_fields(std::string_view head, FastRequest& found) const {
        found.content_type = found.accept = found.json_size = found.accept_encoding = found.authorization = {};
        for (size_t at = 0; at < head_.count; ++at) {
            const std::string_view name = head_.fields[at].name.of(head), value = head_.fields[at].value.of(head);
            if (plain::is_name(name, "content-type")) found.content_type = value;
            if (plain::is_name(name, "accept")) found.accept = value;
            if (plain::is_name(name, "inference-header-content-length")) found.json_size = value;
            if (plain::is_name(name, "content-encoding")) return false;
            if (plain::is_name(name, "accept-encoding") && !note_once(found.accept_encoding, value)) return false;
            if (plain::is_name(name, "authorization") && !note_once(found.authorization, value)) return false;
        }
        return true;
    }

    static bool note_once(std::string_view& place, std::string_view value) {
        return std::exchange(place, value).empty();  // no value is
    }

    const FastLimits limits_;
    const size_t head_size_max_;
    PlainHead head_;
};

}  // namespace pyserve
