// How one worker runs batches of its model.
//
// On a CPU each batch is the model's call and nothing else. On an accelerator:
//
//     rows ──> filled up to the next size that was warmed up ──> a graph of that size is replayed, or the model is called
//
// Both are shown to change nothing before they are used (`prepare`). What cannot be shown is left out, and the report says
// why.
//
// Threads: one worker's own, but for the report, which all workers of a lane share.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "batch_report.h"
#include "device_graph.h"
#include "staging.h"
#include "torch_model.h"

namespace pyserve {

// What was decided when the model was loaded. Constant once workers run.
struct BatchingOptions {
    std::string no_padding;     // why batches are never filled up; "" if they may be
    std::string no_graphs;      // the same of graphs
    std::vector<size_t> sizes;  // to run batches with; empty for those of buckets.h
    std::vector<Inputs> rows;   // items made to disagree, on the host, each [1, ...]; left out if not like the example
};

class BatchRunner {
  public:
    // `example` is one item, each [1, ...]; empty if there is none, and then nothing is filled up or recorded.
    BatchRunner(std::shared_ptr<TorchModel> model, Inputs example, const BatchingOptions& options, BatchReport& report);

    // What to run before the first request, in this order, when batches have up to `largest` rows. TorchScript's
    // executor specialises per shape, and the first run of a shape compiles kernels. The largest comes first on an
    // accelerator: the others then find room in the memory that it took.
    std::vector<size_t> sizes(size_t largest) const;

    // Sizes up to `largest`, in order, that stand for all between them: what the first run of a size costs is paid at
    // these.
    std::vector<size_t> sizes_up_to(size_t largest) const;

    // The next smaller size to try when one of `size` rows has no room; 0 if there is none.
    size_t size_below(size_t size) const;

    // The model's call for `inputs` as they are. Device and stream as in run().
    c10::IValue call(const Inputs& inputs) { return model_->run(inputs); }

    // From now on batches of up to `size` rows run with that many, unless there is no room for it. REQUIRES: as many have
    // been called with `call`. Device and stream as in run(). Throws what the model throws.
    void prepare(size_t size);
    // Instead of that, of a size that the model fails for; larger and smaller ones are served.
    void pass_over(size_t size, const std::string& cause);

    // `inputs` are on the model's device, each [n, ...], and the stream that computes is current. The answer has n rows
    // in memory that later runs leave alone.
    c10::IValue run(const Inputs& inputs);

  private:
    // A size that has been warmed up.
    struct Prepared {
        size_t size = 0;
        Inputs inputs;                       // what is run: each [size, ...], of the memory of `static_`
        std::unique_ptr<DeviceGraph> graph;  // nullptr: the model is called
        c10::IValue output;                  // where the graph leaves its answer
    };

    static bool is_smaller(const Prepared& each, size_t size) { return each.size < size; }

    void prepare_with_room(size_t size);
    bool is_like_example(const Inputs& inputs) const;
    Inputs static_rows(size_t size);
    void read_rows();
    Inputs mixed(size_t size, size_t first) const;
    std::string tried_padding(size_t size);
    std::string why_not_padded(size_t size);
    void record(Prepared& prepared);
    bool try_to_record(Prepared& prepared);
    std::string why_not_replayed(const Prepared& prepared);

    const std::shared_ptr<TorchModel> model_;
    const Inputs example_;
    const BatchingOptions& options_;
    BatchReport& report_;
    bool is_plain_ = true;             // each batch is a call of the model
    std::vector<Inputs> rows_;         // on the device; batches to compare are made of them
    Inputs static_;                    // on the device, where what is filled up or replayed begins
    std::unique_ptr<GraphPool> pool_;  // outlives the graphs
    std::vector<Prepared> prepared_;   // in order of size
};

}  // namespace pyserve
