// What is remembered of requests that look alike: how they ask and are answered, and the keys that they show.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <time.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "bindings_fast.h"

namespace py = pybind11;

namespace pyserve {
namespace {

constexpr size_t known_max = 256;  // forms of a route
constexpr size_t frames_max = 16;  // of a form
constexpr size_t keys_max = 16;    // ways to write a header with the key

double time_now() {
    timespec now{};
    clock_gettime(CLOCK_REALTIME, &now);
    constexpr double s_per_ns = 1e-9;
    return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * s_per_ns;
}

// In a time that tells nothing of what they hold.
bool is_same(std::string_view left, std::string_view right) {
    if (left.size() != right.size()) return false;
    unsigned char different = 0;
    for (size_t at = 0; at < left.size(); ++at) different |= static_cast<unsigned char>(left[at] ^ right[at]);
    return different == 0;
}

}  // namespace

FastForm::FastForm(const py::object& told)
    : is_json(told.attr("is_json").cast<bool>()), writes_json(told.attr("writes_json").cast<bool>()),
      writes_flat(told.attr("writes_flat").cast<bool>()), adopts_answers(told.attr("adopts_answers").cast<bool>()),
      is_coded(told.attr("is_coded").cast<bool>()), frame_of_(told.attr("frame")) {}

const FastFrame& FastForm::frame(const std::string& output, bool is_large, int64_t second) {
    auto found = std::find_if(frames_.begin(), frames_.end(), [&](const FastFrame& each) {
        return each.is_large == is_large && each.output == output;
    });
    if (found != frames_.end() && found->second == second) return *found;
    auto [told, before, between, after, prefix, suffix] =
        frame_of_(py::bytes(output), is_large)
            .cast<std::tuple<int64_t, std::string, std::string, std::string, std::string, std::string>>();
    if (found == frames_.end()) {
        if (frames_.size() >= frames_max) frames_.clear();
        found = frames_.insert(frames_.end(), FastFrame{});
    }
    *found = {
        output,           is_large, told, std::move(before), std::move(between), std::move(after), std::move(prefix),
        std::move(suffix)};
    return *found;
}

std::shared_ptr<FastForm> FastRoute::form(const FastRequest& request, std::string_view description) {
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

bool KnownKeys::lets_in(std::string_view header) {
    if (until_.is_none()) return true;
    for (const Known& each : known_) {
        if (is_same(each.header, header)) return time_now() < each.until;
    }
    if (header.empty() || header.size() > FastRoute::known_size_max) return false;
    const py::object until = until_(py::str(header.data(), header.size()));
    if (until.is_none()) return false;
    if (known_.size() >= keys_max) known_.clear();
    known_.push_back({std::string(header), until.cast<double>()});
    return true;
}

}  // namespace pyserve
