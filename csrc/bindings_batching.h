// What Python says and asks about batches on accelerators.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "bindings.h"

namespace pyserve {

inline void set_batching(Lane& lane, std::string no_padding, std::string no_graphs, std::vector<size_t> sizes,
                         std::vector<Inputs> rows) {
    for (const Inputs& row : rows) {
        if (row.size() != lane.example().size()) throw py::value_error("a row must have as many inputs as the example");
    }
    lane.set_batching({std::move(no_padding), std::move(no_graphs), std::move(sizes), std::move(rows)});
}

// Times in seconds.
inline void set_warm_up(Lane& lane, std::vector<Inputs> items, double items_limit_s, double sizes_limit_s) {
    for (const Inputs& item : items) {
        if (item.size() != lane.example().size()) {
            throw py::value_error("an item must have as many inputs as the example");
        }
        for (const at::Tensor& input : item) {
            if (input.dim() < 1 || input.size(0) != 1) throw py::value_error("each input of an item must be [1, ...]");
        }
    }
    constexpr double ns_per_s = 1e9;
    const auto to_ns = [](double seconds) { return static_cast<int64_t>(seconds * ns_per_s); };
    lane.set_warm_up({std::move(items), to_ns(items_limit_s), to_ns(sizes_limit_s)});
}

// (item, rows, why it was left out; "" if it was run), in order; item 0 is the example.
inline py::list warm_up_runs(const Lane& lane) {
    py::list out;
    for (const auto& [run, cause] : lane.warm_up_report().runs()) {
        out.append(py::make_tuple(run.first, run.second, cause));
    }
    return out;
}

inline py::dict native_stats(const Lane& lane) {
    py::dict out = stats(lane);
    const BatchReport& report = lane.batch_report();
    py::dict eager;
    for (size_t i = 0; i < eager_names.size(); ++i) eager[eager_names[i]] = report.eager[i].load();
    out["graph_replays"] = report.replays.load();
    out["graph_bytes"] = report.graph_size.load();
    out["eager_runs"] = std::move(eager);
    out["padded_rows"] = report.padded_rows.load();
    out["buckets"] = report.sizes();
    out["graph_note"] = report.graph_note();
    out["padding_note"] = report.padding_note();
    return out;
}

inline py::dict batching_notes(const Lane& lane) {
    const BatchReport& report = lane.batch_report();
    py::dict out;
    out["graphs"] = report.graph_note();
    out["padding"] = report.padding_note();
    out["sizes"] = report.sizes();
    return out;
}

}  // namespace pyserve
