// Where a large JSON text may be cut, so that an interpreter can read it in pieces and turn to others between them; and
// arrays of nothing but numbers, read here.
//
// A plan only proposes. It knows strings, brackets and commas; whoever reads the pieces checks all of them, in order,
// and what stands between them. So a text that is no JSON ends in a piece that says so, never in a wrong value.
// Standard library only; no Python, so that it runs while others have the interpreter.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <utility>
#include <vector>

namespace pyserve {

enum class JsonStep : uint8_t {
    open = 0,     // begin: an array or object begins, the steps up to its `close` are what is in it
    run = 1,      // [begin, end): whole children of the one that is open, with the comma before them but for the first
    child = 2,    // [begin, end): as `run`, and all up to a child that begins at end; `open` or `numbers` follows
    numbers = 3,  // [begin, end): an array of numbers, the next of `JsonPlan::numbers`
    close = 4,    // [begin, end): its last children; its bracket stands at end
    stuck = 5,    // [begin, ...: from there on it is no JSON, or nested too deeply for a plan
};

struct JsonPlace {
    JsonStep step;
    int64_t begin, end;
};

// A regular array, row by row; doubles if one of its numbers has a fraction or an exponent, else int64.
struct JsonNumbers {
    std::vector<int64_t> shape;
    std::vector<int64_t> bits;
    bool is_float = false;
};

struct JsonPlan {
    std::vector<JsonPlace> places;  // none: read it in one piece
    std::vector<JsonNumbers> numbers;
};

inline constexpr size_t json_stack_max = 128;   // more than may be nested in a body
inline constexpr size_t numbers_rank_max = 16;  // as of `shape` in model-config.yaml
inline constexpr size_t number_size_max = 400;  // longer ones are left to the reader

// How deep arrays and objects are nested, whether it is JSON or not: strings end at each quote without a backslash.
inline int64_t json_depth(const char* text, size_t size) {
    int64_t depth = 0, deepest = 0;
    bool in_string = false;
    for (size_t at = 0; at < size; ++at) {
        const char each = text[at];
        if (each == '\\') {
            if (at + 1 < size && (text[at + 1] == '\\' || text[at + 1] == '"')) ++at;
        } else if (each == '"') {
            in_string = !in_string;
        } else if (!in_string && (each == '[' || each == '{')) {
            deepest = std::max(deepest, ++depth);
        } else if (!in_string && (each == ']' || each == '}')) {
            --depth;
        }
    }
    return deepest;
}

template <typename Char>
class JsonPlanner {
  public:
    // `piece`: characters, after which a comma is a cut.
    JsonPlanner(const Char* text, int64_t size, int64_t piece, bool takes_numbers)
        : text_(text), size_(size), piece_(piece), takes_numbers_(takes_numbers) {}

    JsonPlan plan() {
        int64_t at = skip_blanks(0);
        if (at == size_ || (text_[at] != '[' && text_[at] != '{')) return {};
        do {
            at = step(at);
        } while (at >= 0 && !frames_.empty() && at < size_);
        if (is_stuck_ || !frames_.empty()) stuck();
        return std::move(plan_);
    }

  private:
    struct Frame {
        int64_t open, from;  // where it begins, and what of it no step covers yet
        bool is_object, is_large;
    };

    // Looks at the character at `at`; returns where to go on, -1 for nowhere.
    int64_t step(int64_t at) {
        switch (text_[at]) {
            case '"': return after_string(at);
            case '[':
                if (takes_numbers_ && at >= numbers_from_) {
                    const int64_t end = read_numbers(at);
                    if (end >= 0) return end;
                }
                [[fallthrough]];
            case '{':
                if (frames_.size() == json_stack_max) return end_here();
                frames_.push_back({at, at + 1, text_[at] == '{', false});
                return at + 1;
            case ',':
                if (Frame& top = frames_.back(); at - top.from >= piece_) {
                    enlarge();
                    plan_.places.push_back({JsonStep::run, top.from, at});
                    top.from = at;
                }
                return at + 1;
            case ']':
            case '}': {
                const Frame top = frames_.back();
                if (top.is_object != (text_[at] == '}')) return end_here();
                if (top.is_large) plan_.places.push_back({JsonStep::close, top.from, at});
                frames_.pop_back();
                if (top.is_large && !frames_.empty()) frames_.back().from = at + 1;
                return at + 1;
            }
            default: return at + 1;
        }
    }

    int64_t end_here() {
        is_stuck_ = true;
        return -1;
    }

    int64_t after_string(int64_t at) {
        for (++at; at < size_; ++at) {
            if (text_[at] == '\\') {
                ++at;
            } else if (text_[at] == '"') {
                return at + 1;
            }
        }
        return end_here();
    }

    // All that are open get steps of their own.
    void enlarge() {
        for (size_t i = 0; i < frames_.size(); ++i) {
            if (frames_[i].is_large) continue;
            if (i > 0) plan_.places.push_back({JsonStep::child, frames_[i - 1].from, frames_[i].open});
            plan_.places.push_back({JsonStep::open, frames_[i].open, frames_[i].open});
            frames_[i].is_large = true;
        }
    }

    // Of a text that has no steps yet there is nothing to continue: it is read in one piece, as far as it goes.
    void stuck() {
        if (plan_.places.empty()) return;
        size_t large = frames_.size();
        while (large > 0 && !frames_[large - 1].is_large) --large;
        if (large > 0) plan_.places.push_back({JsonStep::stuck, frames_[large - 1].from, size_});
    }

    static bool is_blank(Char each) { return each == ' ' || each == '\n' || each == '\r' || each == '\t'; }
    static bool is_digit(Char each) { return each >= '0' && each <= '9'; }

    int64_t skip_blanks(int64_t at) const {
        while (at < size_ && is_blank(text_[at])) ++at;
        return at;
    }

    // An array of numbers from `begin` on: returns its end, and a step for it if it is long. -1 if it is none, or has
    // what Python's numbers are needed for; then no array that begins before the odd place is tried again.
    int64_t read_numbers(int64_t begin) {
        JsonNumbers found;
        std::array<int64_t, numbers_rank_max + 1> counts{}, sizes;
        sizes.fill(-1);
        size_t depth = 0, leaf = 0;
        int64_t at = begin;
        const auto fail = [&] {
            numbers_from_ = at + 1;
            return int64_t{-1};
        };
        while (true) {
            at = skip_blanks(at);
            if (at == size_) return fail();
            if (text_[at] == '[') {
                if (depth == numbers_rank_max || (leaf != 0 && depth == leaf)) return fail();
                counts[++depth] = 0;
                ++at;
                continue;
            }
            if (leaf == 0) leaf = depth;
            if (depth != leaf) return fail();
            const int64_t end = read_number(at, found);
            if (end < 0) return fail();
            at = end;
            ++counts[depth];
            for (at = skip_blanks(at); at < size_ && text_[at] == ']'; at = skip_blanks(at + 1)) {
                if (sizes[depth] < 0) sizes[depth] = counts[depth];
                if (sizes[depth] != counts[depth]) return fail();
                if (--depth == 0) return take(begin, at + 1, found, {sizes.begin() + 1, sizes.begin() + 1 + leaf});
                ++counts[depth];
            }
            if (at == size_ || text_[at] != ',') return fail();
            ++at;
        }
    }

    int64_t take(int64_t begin, int64_t end, JsonNumbers& found, std::vector<int64_t> shape) {
        if (end - begin < piece_) return end;
        enlarge();
        if (!frames_.empty()) {
            plan_.places.push_back({JsonStep::child, frames_.back().from, begin});
            frames_.back().from = end;
        }
        plan_.places.push_back({JsonStep::numbers, begin, end});
        found.shape = std::move(shape);
        plan_.numbers.push_back(std::move(found));
        return end;
    }

    // One number, added to `found`; returns its end, -1 for what is none or needs more than 64 bits.
    int64_t read_number(int64_t begin, JsonNumbers& found) const {
        int64_t at = begin;
        const bool is_negative = at < size_ && text_[at] == '-';
        if (is_negative) ++at;
        const int64_t digits = at;
        while (at < size_ && is_digit(text_[at])) ++at;
        if (at == digits || (text_[digits] == '0' && at > digits + 1)) return -1;
        const int64_t whole_end = at;
        if (at < size_ && text_[at] == '.') {
            const int64_t fraction = ++at;
            while (at < size_ && is_digit(text_[at])) ++at;
            if (at == fraction) return -1;
        }
        if (at < size_ && (text_[at] == 'e' || text_[at] == 'E')) {
            ++at;
            if (at < size_ && (text_[at] == '+' || text_[at] == '-')) ++at;
            const int64_t exponent = at;
            while (at < size_ && is_digit(text_[at])) ++at;
            if (at == exponent) return -1;
        }
        if (at == whole_end) return add_whole(digits, at, is_negative, found) ? at : -1;
        return add_float(begin, at, found) ? at : -1;
    }

    bool add_whole(int64_t begin, int64_t end, bool is_negative, JsonNumbers& found) const {
        if (end - begin > 18) return false;  // all of 18 digits fit
        int64_t value = 0;
        for (int64_t at = begin; at < end; ++at) value = value * 10 + (text_[at] - '0');
        if (is_negative) value = -value;
        found.bits.push_back(found.is_float ? bits_of(static_cast<double>(value)) : value);
        return true;
    }

    bool add_float(int64_t begin, int64_t end, JsonNumbers& found) const {
        std::array<char, number_size_max> token;
        if (static_cast<size_t>(end - begin) > token.size()) return false;
        for (int64_t at = begin; at < end; ++at) token[at - begin] = static_cast<char>(text_[at]);
        double value = 0;
        const char* token_end = token.data() + (end - begin);
        const auto result = std::from_chars(token.data(), token_end, value);
        // Too large or too small for it: what Python makes of that is left to Python.
        if (result.ec != std::errc() || result.ptr != token_end) return false;
        if (!found.is_float) {
            for (int64_t& each : found.bits) each = bits_of(static_cast<double>(each));
            found.is_float = true;
        }
        found.bits.push_back(bits_of(value));
        return true;
    }

    static int64_t bits_of(double value) {
        int64_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        return bits;
    }

    const Char* text_;
    int64_t size_, piece_;
    bool takes_numbers_;
    bool is_stuck_ = false;
    int64_t numbers_from_ = 0;
    std::vector<Frame> frames_;
    JsonPlan plan_;
};

}  // namespace pyserve
