// What the frames of requests that cross as tensors hold, and those of their answers (front_ring.h). Standard library only;
// no Python.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include "http/head.h"

namespace pyserve {

// What becomes of an output's row: an answer's whole body, what follows on JSON that describes it, or JSON. A front end says
// so in a frame's flags.
enum class RowForm : uint16_t { bytes, described, text };

// What a row's frame begins with; the head that Python reads follows.
struct RowHead {
    uint64_t generation;  // of the table that `route` is a place in
    uint64_t route;
};
static_assert(sizeof(RowHead) == 16);

// What follows on that, as of `wire.RequestWriter.row_head`: then, with newlines between them, the request's id, its client,
// and its head as it came.
struct RowOrigin {
    uint64_t arrived_at;  // ns
    uint64_t wire_size;   // of the request
    uint8_t listener;
    uint8_t is_http11;
};

// The head of a row's frame, in place of what `out` had.
inline void write_row_head(const RowHead& row, const RowOrigin& origin, std::string_view id, std::string_view client,
                           std::string_view head, std::string& out) {
    const auto add = [&out](const auto& number) {
        static_assert(std::is_trivially_copyable_v<std::remove_reference_t<decltype(number)>>);
        out.append(reinterpret_cast<const char*>(&number), sizeof number);
    };
    out.clear();
    add(row);
    add(origin.arrived_at);  // one by one: there is nothing between them
    add(origin.wire_size);
    add(origin.listener);
    add(origin.is_http11);
    out.append(id).append("\n").append(client).append("\n").append(head);
}

// What the head of a row's answer says of it: "f16", "q3,224", "f". As Python's `fronts.outputs.Output`; of what is odd
// about one nothing is said.
class RowOutput {
  public:
    static constexpr size_t text_size_max = 64;
    static constexpr size_t rank_max = 8;

    bool read(std::string_view text) {
        rank_ = 0;
        count_ = 1;
        if (text.empty() || text.size() > text_size_max) return false;
        kind_ = text.front();
        if (number_size() == 0) return false;
        for (text.remove_prefix(1); !text.empty();) {
            const size_t comma = text.find(',');
            if (rank_ == rank_max || comma + 1 == text.size() || !read_size(text.substr(0, comma))) return false;
            text.remove_prefix(comma == std::string_view::npos ? text.size() : comma + 1);
        }
        return true;
    }

    char kind() const { return kind_; }
    const int64_t* shape() const { return shape_.data(); }
    size_t rank() const { return rank_; }
    uint64_t count() const { return count_; }  // of numbers
    uint64_t byte_count() const { return count_ * number_size(); }

    size_t number_size() const {
        switch (kind_) {
            case 'b':
            case 'B':
            case '?': return 1;
            case 'h': return 2;
            case 'f':
            case 'i': return 4;
            case 'd':
            case 'q': return 8;
            default: return 0;
        }
    }

  private:
    static constexpr uint64_t count_max = uint64_t{1} << 40;

    bool read_size(std::string_view text) {
        uint64_t size = 0;
        if (text.empty() || text.size() > 12 || (text.size() > 1 && text.front() == '0')) return false;
        for (const char each : text) {
            if (!plain::is_digit(each)) return false;
            size = size * 10 + static_cast<uint64_t>(each - '0');
        }
        if (size != 0 && count_ > count_max / size) return false;
        shape_[rank_++] = static_cast<int64_t>(size);
        count_ *= size;
        return true;
    }

    char kind_ = '\0';
    std::array<int64_t, rank_max> shape_{};
    size_t rank_ = 0;
    uint64_t count_ = 1;
};

}  // namespace pyserve
