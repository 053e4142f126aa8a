// Worker: its model, and the batches that it runs before the first request.
#include <ATen/DeviceAccelerator.h>

#include <algorithm>
#include <cstddef>
#include <exception>
#include <utility>
#include <vector>

#include "clock.h"
#include "device_probe.h"
#include "guarded.h"
#include "worker.h"

namespace pyserve {
namespace {

constexpr int64_t pause_max_ns = 1'000'000'000;  // of a worker that serves, for larger batches

// Of one run of a batch; gives it back.
struct Permit {
    explicit Permit(Batcher<>& lender) : batcher(lender) {}
    ~Permit() { batcher.leave(); }
    Permit(const Permit&) = delete;
    Permit& operator=(const Permit&) = delete;

    Batcher<>& batcher;
};

bool was_run(const WarmUpReport& report, const WarmUpReport::Run& run) {
    const auto runs = report.runs();
    const auto found = runs.find(run);
    return found != runs.end() && found->second.empty();
}

}  // namespace

// From here on it runs this one: shared with the other workers, or its own, as it was loaded.
void Worker::take_model() {
    std::shared_ptr<TorchModel> model = loaded_->instance();
    runner_ = std::make_unique<BatchRunner>(model, shared_.example, shared_.batching, shared_.batch_report);
    model_ = std::move(model);  // with its runner, or not at all
}

// What the first run of a shape costs would otherwise be paid by the first clients. The example's runs have to end well;
// the others are left out where they take too long or the model fails, and the report says so.
Status Worker::warm_up() {
    warm_row_ns_ = 0;
    warmed_size_ = shared_.batcher.batch_size_max();
    if (shared_.example.empty()) return {};
    const int64_t began_at = SteadyClock::now_ns();
    Status status = warm_up_example(runner_->sizes(warmed_size_));
    if (!status.ok()) return status;
    status = warm_up_further(warm_up_plan(*runner_, /*known=*/0, fitting(warmed_size_)), began_at);
    if (!status.ok()) return status;
    // What has failed until here, of this model or of others, says nothing of the batches to come.
    if (staging_->is_async()) has_run_out_of_memory(model_->device());
    return guarded([this] { staging_->equip(); });
}

// On an accelerator batches get as large as there is memory for.
Status Worker::warm_up_example(std::vector<size_t> sizes) {
    const Inputs example = warm_up_item(0);
    for (size_t i = 0; i < sizes.size() && !is_stopping(); ++i) {
        Status status = warm_up_and_prepare(sizes[i], example);
        if (status.code == Code::out_of_memory && staging_->is_async()) {
            at::accelerator::emptyCache();  // of pieces that are too small
            status = warm_up_and_prepare(sizes[i], example);
        }
        if (status.ok()) {
            shared_.warm_up_report.add({0, sizes[i]});
            continue;
        }
        // The largest is the first of an accelerator, one row the last.
        const bool is_between = staging_->is_async() && i > 0 && sizes[i] > 1;
        if (is_between && status.code == Code::model_error && !status.is_of_device) {
            runner_->pass_over(sizes[i], status.message);
            continue;
        }
        if (status.code != Code::out_of_memory || !staging_->is_async()) return status;
        const size_t smaller = runner_->size_below(sizes[i]);
        if (smaller == 0) return {Code::out_of_memory, no_room_text(status.message)};
        shared_.lower_ceiling(smaller);
        const bool is_next = i + 1 < sizes.size() && sizes[i + 1] >= smaller;
        if (!is_next) sizes.insert(sizes.begin() + static_cast<std::ptrdiff_t>(i) + 1, smaller);
    }
    return {};
}

// What to run after the example's `runner.sizes(largest)`: the other items, and the sizes between; what is likeliest to come
// first. Batches of up to `known` rows were run before; 0 at a worker's begin, when the example's have been run.
std::vector<WarmUpStep> Worker::warm_up_plan(const BatchRunner& runner, size_t known, size_t largest) const {
    const WarmUpOptions& options = shared_.warm_up;
    const bool is_first = known == 0;
    const int64_t sizes_limit_ns = is_first ? options.sizes_limit_ns : std::min(options.sizes_limit_ns, pause_max_ns);
    std::vector<WarmUpStep> steps;
    const auto add_step = [&](size_t item, size_t size, int64_t limit_ns) {
        const WarmUpReport::Run run{item, size};
        const auto is_same = [&](const WarmUpStep& step) { return step.run == run; };
        if (std::none_of(steps.begin(), steps.end(), is_same)) steps.push_back({run, limit_ns});
    };
    std::vector<size_t> example_sizes;  // those were run
    if (is_first || !model_->device().is_cpu()) example_sizes = runner.sizes(largest);
    const auto add_example = [&](size_t size) {
        const bool has_run = std::find(example_sizes.begin(), example_sizes.end(), size) != example_sizes.end();
        if (!has_run) add_step(0, size, sizes_limit_ns);
    };
    add_example(largest);
    for (size_t item = 1; item <= options.items.size(); ++item) {
        if (is_first) add_step(item, 1, options.items_limit_ns);
        add_step(item, largest, is_first ? options.items_limit_ns : sizes_limit_ns);
    }
    for (const size_t size : runner.sizes_up_to(largest)) {
        if (size <= known) continue;
        add_example(size);
        for (size_t item = 1; item <= options.items.size(); ++item) add_step(item, size, sizes_limit_ns);
    }
    return steps;
}

// As much of `plan` as there is time for. Fails only where the thread is interrupted or the device is lost.
Status Worker::warm_up_further(const std::vector<WarmUpStep>& plan, int64_t began_at) {
    // OpenVINO's threads and kernels are the model's, and none of a worker's own: what one has run was run for all. One that
    // joins others, whose requests wait for the same CPUs meanwhile, need not do it again.
    const bool is_shared = model_->options().backend == Backend::openvino && !loaded_->has_state();
    std::vector<size_t> failed;  // items of which the model does not take one row
    for (const WarmUpStep& step : plan) {
        if (is_stopping()) break;
        if (is_shared && was_run(shared_.warm_up_report, step.run)) continue;
        const auto [item, size] = step.run;
        if (std::find(failed.begin(), failed.end(), item) != failed.end()) continue;
        const int64_t expected_ns = SteadyClock::now_ns() - began_at + warm_row_ns_ * static_cast<int64_t>(size);
        if (expected_ns > step.limit_ns) {
            shared_.warm_up_report.leave_out(step.run, "it would have taken too long");
            continue;
        }
        const Status status = judged(warm_up(*runner_, size, warm_up_item(item)));
        if (status.ok()) {
            shared_.warm_up_report.add(step.run);
            continue;
        }
        shared_.warm_up_report.leave_out(step.run, status.message.empty() ? "it was ended" : status.message);
        if (status.code == Code::interrupted || status.code == Code::device_lost) return status;
        if (status.code == Code::out_of_memory && staging_->is_async()) at::accelerator::emptyCache();
        if (size == 1) failed.push_back(item);
    }
    return {};
}

// Batches may be larger than before: what that costs at first is paid here, between two batches, while others run those
// that wait. What fails is found again with the requests that are at fault. REQUIRES: the caller holds a run permit of
// the batcher, and nothing is in flight; the permit is given back.
void Worker::warm_up_larger() {
    const Permit permit(shared_.batcher);
    const size_t known = warmed_size_;
    warmed_size_ = std::max(known, static_cast<size_t>(shared_.batcher.batch_size_max()));
    guarded([&] {
        apply_settings();
        // Its state is made by requests now.
        if (shared_.example.empty() || shared_.warm_up.sizes_limit_ns == 0 || model_->has_state()) return;
        renew_model();
        if (staging_->is_async()) {
            std::vector<size_t> sizes = runner_->sizes(warmed_size_);
            std::erase_if(sizes, [&](size_t size) { return size <= known; });
            judged(warm_up_example(std::move(sizes)));
        }
        warm_up_further(warm_up_plan(*runner_, known, fitting(warmed_size_)), SteadyClock::now_ns());
        if (staging_->is_async() && !has_lost_device()) staging_->equip();
    });
}

// `size`, as far as it has room.
size_t Worker::fitting(size_t size) const {
    const size_t ceiling = shared_.ceiling();
    return ceiling == 0 ? size : std::min(size, ceiling);
}

// A copy of its own: a model that changes its input in place would change every worker's.
Inputs Worker::warm_up_item(size_t number) const {
    const Inputs& item = number == 0 ? shared_.example : shared_.warm_up.items[number - 1];
    Inputs copy;
    for (const at::Tensor& input : item) copy.push_back(input.clone());
    return copy;
}

template <class Body>
Status Worker::run_warm_up(const Body& body) {
    runs_.begin(SteadyClock::now_ns());
    const Status status = forwarded([&] {
        const Staging::ComputeScope scope(*staging_);
        body();
    });
    runs_.end();
    return status;
}

// A batch of `size` rows that are all `item`.
Status Worker::warm_up(BatchRunner& runner, size_t size, const Inputs& item) {
    const std::vector<const Inputs*> items(size, &item);
    const int64_t began_at = SteadyClock::now_ns();
    Staged staged;
    const Status status = run_warm_up([&] {
        staged = staging_->gather(items);
        staged.output = runner.call(staged.inputs);
        check_rows(staged.output, size);
        staging_->fetch(staged);
        staging_->wait(staged);
        staging_->collect(staged);
    });
    if (status.ok()) {
        warm_row_ns_ = (SteadyClock::now_ns() - began_at) / static_cast<int64_t>(size);
    } else if (status.code != Code::out_of_memory) {
        leak(std::move(staged));  // the device may be lost
    }
    return status;
}

// And its size is one that batches run with from now on.
Status Worker::warm_up_and_prepare(size_t size, const Inputs& item) {
    const Status status = warm_up(*runner_, size, item);
    if (!status.ok()) return status;
    return run_warm_up([&] { runner_->prepare(size); });
}

std::string Worker::no_room_text(const std::string& cause) const {
    std::string text = "not even one row has room on " + model_->device().str();
    try {
        const auto [free, total] = at::accelerator::getMemoryInfo(model_->device().index());
        text += ", of whose " + std::to_string(total >> 20) + " MB " + std::to_string(free >> 20) + " MB are free";
    } catch (const std::exception&) {
        // A device that does not say.
    }
    return text + ": " + cause;
}

}  // namespace pyserve
