// What is remembered of requests that look alike: their paths, how they ask and are answered, and the keys that they show.
//
// Of those that the engine's own process answers (bindings_fast.h), and of those that a front end does (bindings_fast_door.h).
// Without torch. Threads: loop thread only, with the GIL.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <time.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "http/fast_request.h"
#include "json_item.h"

namespace py = pybind11;

namespace pyserve {

inline timespec wall_time() {
    timespec now{};
    clock_gettime(CLOCK_REALTIME, &now);
    return now;
}

// What stands in an answer beside its numbers, for one second. The head: before the id, between it and the size, and
// behind that. The body: before the numbers, and behind them.
struct FastFrame {
    std::string output;     // the row's kind and sizes, see RowCut
    bool is_large = false;  // it would be compressed for clients that take that
    int64_t second = -1;
    std::string before, between, after, prefix, suffix;
};

// How a request asks, and is to be answered: the same of all that look alike.
class FastForm {
  public:
    // `told` is as of Python's fronts.fast_forms.FastForm.
    explicit FastForm(const py::object& told)
        : is_json(told.attr("is_json").cast<bool>()), writes_json(told.attr("writes_json").cast<bool>()),
          writes_flat(told.attr("writes_flat").cast<bool>()), adopts_answers(told.attr("adopts_answers").cast<bool>()),
          is_coded(told.attr("is_coded").cast<bool>()), frame_of_(told.attr("frame")) {}

    const FastFrame& frame(std::string_view output, bool is_large, int64_t second) {
        auto found = std::find_if(frames_.begin(), frames_.end(), [&](const FastFrame& each) {
            return each.is_large == is_large && each.output == output;
        });
        if (found != frames_.end() && found->second == second) return *found;
        auto [told, before, between, after, prefix, suffix] =
            frame_of_(py::bytes(output.data(), output.size()), is_large)
                .cast<std::tuple<int64_t, std::string, std::string, std::string, std::string, std::string>>();
        if (found == frames_.end()) {
            if (frames_.size() >= frames_max) frames_.clear();
            found = frames_.insert(frames_.end(), FastFrame{});
        }
        *found = {std::string(output), is_large,         told, std::move(before), std::move(between), std::move(after),
                  std::move(prefix),   std::move(suffix)};
        return *found;
    }

    const bool is_json;         // the body; else the bytes of an item
    const bool writes_json;     // the answer's numbers
    const bool writes_flat;     // all in one line
    const bool adopts_answers;  // endpoints would answer in the same words what the lane has run
    const bool is_coded;        // answers that are large are compressed
    bool is_left = false;       // answers are such that others make them

  private:
    static constexpr size_t frames_max = 16;

    const py::object frame_of_;
    std::vector<FastFrame> frames_;
};

// What a path is made of, whoever answers its requests.
struct FastPlace {
    size_t item_size = 0;          // bytes
    bool describes_items = false;  // JSON that describes it stands before an item's bytes
    // Gives the form of a content type and the accepted types, or of an item's description, and of the accepted codings; None
    // if a request has to go its usual way.
    py::object form_of;
    std::string log_head;  // of a line between the client and the time that it took
    std::optional<JsonItem> json;

    static FastPlace make(size_t item_size, bool describes_items, py::object form_of, std::string log_head, char kind,
                          std::vector<int64_t> shape, bool takes_json) {
        FastPlace place{item_size, describes_items, std::move(form_of), std::move(log_head), {}};
        if (takes_json) place.json.emplace(kind, std::move(shape));
        if (place.json && place.json->byte_count() != item_size) place.json.reset();
        return place;
    }
};

// One path.
class FastRoute {
  public:
    explicit FastRoute(FastPlace place)
        : item_size(place.item_size), describes_items(place.describes_items), log_head(std::move(place.log_head)),
          json(std::move(place.json)), form_of_(std::move(place.form_of)) {}
    virtual ~FastRoute() = default;
    FastRoute(const FastRoute&) = delete;
    FastRoute& operator=(const FastRoute&) = delete;

    static constexpr size_t known_size_max = 1024;  // of what is remembered

    // Of a request with this description, or "". nullptr if it has to go its usual way.
    std::shared_ptr<FastForm> form(const FastRequest& request, std::string_view description) {
        const auto text = [](std::string_view part) { return py::str(part.data(), part.size()); };
        key_.clear();
        if (describes_items) {
            key_.append(description).append("\n");
        } else {
            key_.append(request.content_type).append("\n").append(request.accept).append("\n");
        }
        key_.append(request.accept_encoding);
        if (const auto found = forms_.find(key_); found != forms_.end()) return found->second;
        const py::object codings = text(request.accept_encoding);
        const py::object told = describes_items ? form_of_(py::bytes(description.data(), description.size()), codings)
                                                : form_of_(text(request.content_type), text(request.accept), codings);
        std::shared_ptr<FastForm> form;
        if (!told.is_none()) form = std::make_shared<FastForm>(told);
        if (key_.size() <= known_size_max) {
            if (forms_.size() >= known_max) forms_.clear();
            forms_.emplace(key_, form);
        }
        return form;
    }

    const size_t item_size;
    const bool describes_items;
    const std::string log_head;
    std::optional<JsonItem> json;  // reads it, if it is taken at all

  private:
    static constexpr size_t known_max = 256;  // forms

    const py::object form_of_;
    std::unordered_map<std::string, std::shared_ptr<FastForm>> forms_;
    std::string key_;
};

// Keys that Python has let in, by the header as it came, until they expire or are exchanged.
class KnownKeys {
  public:
    // `until` is asked about a header, once: until when requests with it are let in, s since the epoch, or None. None in its
    // place lets all in. What was known is forgotten.
    void ask(py::object until) {
        until_ = std::move(until);
        known_.clear();
    }

    bool lets_in(std::string_view header) {
        if (until_.is_none()) return true;
        for (const Known& each : known_) {
            if (is_same(each.header, header)) return now() < each.until;
        }
        if (header.empty() || header.size() > FastRoute::known_size_max) return false;
        const py::object until = until_(py::str(header.data(), header.size()));
        if (until.is_none()) return false;
        if (known_.size() >= keys_max) known_.clear();
        known_.push_back({std::string(header), until.cast<double>()});
        return true;
    }

  private:
    static constexpr size_t keys_max = 16;  // ways to write a header with the key

    struct Known {
        std::string header;
        double until;
    };

    static double now() {
        constexpr double s_per_ns = 1e-9;
        const timespec now = wall_time();
        return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * s_per_ns;
    }
    // In a time that tells nothing of what they hold.
    static bool is_same(std::string_view left, std::string_view right) {
        if (left.size() != right.size()) return false;
        unsigned char different = 0;
        for (size_t at = 0; at < left.size(); ++at) different |= static_cast<unsigned char>(left[at] ^ right[at]);
        return different == 0;
    }

    py::object until_ = py::none();
    std::vector<Known> known_;
};

}  // namespace pyserve
