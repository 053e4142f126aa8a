#include "batch_runner.h"

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <utility>

#include "buckets.h"
#include "comparison.h"
#include "example_rows.h"
#include "guarded.h"
#include "interrupt.h"

namespace pyserve {
namespace {

// Rows to compare with, where none were given.
constexpr size_t rows_count = 8;
// Batches that are tried for each size before it is believed that filling them up changes nothing.
constexpr size_t padding_trials = 2;
// Up to here a batch that is not filled up is compared at every size.
constexpr size_t small_size = 4;
// Choosing kernels, and memory that libraries keep, would not go into a graph.
constexpr int runs_before_recording = 2;

// The cause in what torch says, without the places in the code.
std::string cause_of(const std::string& text) {
    const std::string mark = "RuntimeError: ";
    const size_t at = text.rfind(mark);
    const size_t from = at == std::string::npos ? 0 : at + mark.size();
    return text.substr(from, text.find('\n', from) - from);
}

c10::IValue first_rows(const c10::IValue& output, size_t rows) {
    return map_tensors(output, [rows](const at::Tensor& tensor) {
        return tensor.dim() > 0 && static_cast<size_t>(tensor.size(0)) > rows
                   ? tensor.narrow(0, 0, static_cast<int64_t>(rows))
                   : tensor;
    });
}

// What is no tensor in a recorded output would be the first batch's for ever.
bool has_plain_values(const c10::IValue& output) {
    if (output.isTensor() || output.isTensorList()) return false;
    if (output.isTuple()) {
        const auto& elements = output.toTupleRef().elements();
        return std::any_of(elements.begin(), elements.end(), has_plain_values);
    }
    if (output.isList()) {
        const auto list = output.toListRef();
        return std::any_of(list.begin(), list.end(), has_plain_values);
    }
    if (output.isGenericDict()) {
        for (const auto& entry : output.toGenericDict()) {
            if (has_plain_values(entry.value())) return true;
        }
        return false;
    }
    return !output.isNone();
}

bool is_row_wise(const c10::IValue& output, size_t rows) {
    const std::vector<at::Tensor> tensors = tensors_of(output);
    return std::all_of(tensors.begin(), tensors.end(), [rows](const at::Tensor& tensor) {
        return tensor.dim() > 0 && static_cast<size_t>(tensor.size(0)) == rows;
    });
}

// Puts a batch of at most as many rows into `to`; what is left there becomes copies of its last row, which the model takes
// as surely as that one.
void fill(const Inputs& batch, const Inputs& to) {
    for (size_t i = 0; i < to.size(); ++i) {
        const int64_t rows = batch[i].size(0), size = to[i].size(0);
        to[i].narrow(0, 0, rows).copy_(batch[i], /*non_blocking=*/true);
        if (rows == size) continue;
        const at::Tensor rest = to[i].narrow(0, rows, size - rows);
        rest.copy_(batch[i].narrow(0, rows - 1, 1).expand_as(rest), /*non_blocking=*/true);
    }
}

// The same memory in tensors of their own: a model may change the shape of its input in place, or its storage.
Inputs aliases_of(const Inputs& inputs) {
    Inputs aliases;
    aliases.reserve(inputs.size());
    for (const at::Tensor& each : inputs) aliases.push_back(each.alias());
    return aliases;
}

// The first `rows` of what the graph leaves in `output`, in memory of their own.
c10::IValue replayed(DeviceGraph& graph, const c10::IValue& output, size_t rows) {
    graph.replay();
    return map_tensors(first_rows(output, rows), [](const at::Tensor& tensor) { return tensor.clone(); });
}

// Has cuDNN try its kernels once for each size of a batch; torch knows this for the whole process only. Once a model's
// inputs come in sizes of their own, whose trials would be paid by their requests, for none any more.
void try_kernels(bool has_other_sizes) {
    static std::atomic<bool> is_over{false};
    if (has_other_sizes && is_over.exchange(true)) return;
    at::globalContext().setBenchmarkCuDNN(!is_over);
}

bool was_interrupted() {
    const Runs* runs = Runs::current();
    return runs != nullptr && runs->is_interrupted();
}

std::string no_room(size_t size) {
    return "no room for a graph of " + std::to_string(size) + " rows, or for trying it";
}

int64_t reserved_size(at::Device device) {
    try {
        const auto [free, total] = at::accelerator::getMemoryInfo(device.index());
        return static_cast<int64_t>(total - free);
    } catch (const std::exception&) {
        return 0;  // a device that does not say
    }
}

}  // namespace

BatchRunner::BatchRunner(std::shared_ptr<TorchModel> model, Inputs example, const BatchingOptions& options,
                         BatchReport& report)
    : model_(std::move(model)), example_(std::move(example)), options_(options), report_(report) {
    if (model_->device().is_cpu() || example_.empty()) return;
    if (!options.no_padding.empty()) report.forbid_padding(options.no_padding);
    if (!options.no_graphs.empty()) report.forbid_graphs(options.no_graphs);
    // It picks one of its runners for each call, which waits for what that one ran last.
    if (model_->options().backend != Backend::torchscript) report.forbid_graphs("a compiled package is not recorded");
    if (model_->has_state()) {
        const std::string reason = "calls leave traces in the model: " + model_->state();
        report.forbid_padding(reason);
        report.forbid_graphs(reason);
    }
    if (model_->has_forks()) report.forbid_graphs("parts of the model run in threads of their own (torch.jit.fork)");
    if (report.replays_graphs()) pool_ = make_graph_pool(model_->device().type());
    if (pool_ == nullptr)
        report.forbid_graphs("this build of torch, or of pyserve, has none for " + model_->device().str());
    if (model_->device().is_cuda()) try_kernels(/*has_other_sizes=*/false);
    is_plain_ = false;
}

std::vector<size_t> BatchRunner::sizes_up_to(size_t largest) const {
    return options_.sizes.empty() ? buckets_up_to(largest) : buckets_of(options_.sizes, largest);
}

std::vector<size_t> BatchRunner::sizes(size_t largest) const {
    if (is_plain_) return largest > 1 ? std::vector<size_t>{1, largest} : std::vector<size_t>{1};
    std::vector<size_t> all = sizes_up_to(largest);
    if (!report_.pads() && !report_.replays_graphs()) all = {1, largest};
    all.erase(std::unique(all.begin(), all.end()), all.end());
    std::reverse(all.begin(), all.end());
    return all;
}

size_t BatchRunner::size_below(size_t size) const {
    if (size <= 1) return 0;
    const size_t below = bucket_below(sizes_up_to(size), size);
    return below == 0 ? size / 2 : below;
}

void BatchRunner::pass_over(size_t size, const std::string& cause) {
    report_.forbid_padding("the model fails for batches of " + std::to_string(size) + " rows: " + cause_of(cause));
}

void BatchRunner::prepare(size_t size) {
    if (is_plain_) return;
    try {
        prepare_with_room(size);
    } catch (const c10::OutOfMemoryError&) {
        // The model's call had room. What it is compared with needs more, and a graph keeps what it needs.
        report_.note_graphs(no_room(size));
        at::accelerator::emptyCache();
    }
}

void BatchRunner::prepare_with_room(size_t size) {
    const auto place = std::lower_bound(prepared_.begin(), prepared_.end(), size, is_smaller);
    if (place != prepared_.end() && place->size == size) return;
    read_rows();
    Prepared prepared;
    prepared.size = size;
    prepared.inputs = static_rows(size);
    if (size > 1 && report_.pads()) {
        const std::string reason = tried_padding(size);
        if (!reason.empty()) report_.forbid_padding(reason);
    }
    if (pool_ != nullptr && report_.replays_graphs()) record(prepared);
    prepared_.insert(place, std::move(prepared));
    report_.add_size(size);
}

c10::IValue BatchRunner::run(const Inputs& inputs) {
    if (is_plain_) return model_->run(inputs);
    if (!is_like_example(inputs)) {
        report_.count(Eager::kind);
        if (model_->device().is_cuda()) try_kernels(/*has_other_sizes=*/true);
        return model_->run(inputs);
    }
    const auto rows = static_cast<size_t>(inputs.front().size(0));
    const auto found = std::lower_bound(prepared_.begin(), prepared_.end(), rows, is_smaller);
    const bool replays = report_.replays_graphs();
    const bool fits = found != prepared_.end() && (found->size == rows || report_.pads());
    if (fits && found->size != rows) report_.padded_rows.fetch_add(found->size - rows, std::memory_order_relaxed);
    if (fits && replays && found->graph != nullptr) {
        report_.replays.fetch_add(1, std::memory_order_relaxed);
        fill(inputs, found->inputs);
        return replayed(*found->graph, found->output, rows);
    }
    report_.count(replays ? Eager::size : Eager::off);
    if (!fits || found->size == rows) return model_->run(inputs);
    fill(inputs, found->inputs);
    return map_tensors(first_rows(model_->run(aliases_of(found->inputs)), rows), [&](const at::Tensor& tensor) {
        // A model may give its input back, or a view of it; the next batch is written there.
        const bool is_input = std::any_of(found->inputs.begin(), found->inputs.end(), [&](const at::Tensor& input) {
            return input.storage().data() == tensor.storage().data();
        });
        return is_input ? tensor.clone() : tensor;
    });
}

bool BatchRunner::is_like_example(const Inputs& inputs) const {
    if (inputs.size() != example_.size()) return false;
    for (size_t i = 0; i < inputs.size(); ++i) {
        if (inputs[i].scalar_type() != example_[i].scalar_type()) return false;
        if (inputs[i].sizes().slice(1) != example_[i].sizes().slice(1)) return false;
    }
    return true;
}

// Of `size` rows. What was recorded with less keeps the memory that it was recorded with.
Inputs BatchRunner::static_rows(size_t size) {
    const auto rows = static_cast<int64_t>(size);
    if (static_.empty() || static_.front().size(0) < rows) {
        Inputs larger;
        for (const at::Tensor& each : example_) {
            std::vector<int64_t> shape = each.sizes().vec();
            shape[0] = rows;
            larger.push_back(at::empty(shape, each.options().device(model_->device())));
        }
        static_ = std::move(larger);
    }
    Inputs views;
    for (const at::Tensor& each : static_) views.push_back(each.narrow(0, 0, rows));
    return views;
}

void BatchRunner::read_rows() {
    if (!rows_.empty()) return;
    const bool are_usable =
        !options_.rows.empty() && std::all_of(options_.rows.begin(), options_.rows.end(),
                                              [this](const Inputs& row) { return is_like_example(row); });
    const std::vector<Inputs> made = are_usable ? options_.rows : rows_like(example_, rows_count);
    if (are_alike(made)) {
        report_.forbid_padding(
            "the example's numbers do not allow to make rows that differ, so nothing shows whether they "
            "influence each other");
    }
    std::vector<Inputs> on_device(made.size());
    for (size_t row = 0; row < made.size(); ++row) {
        for (const at::Tensor& each : made[row]) on_device[row].push_back(each.to(model_->device()));
    }
    rows_ = std::move(on_device);
}

// A batch of rows that differ, of memory of its own; another one for each `first`.
Inputs BatchRunner::mixed(size_t size, size_t first) const {
    Inputs batch;
    for (size_t i = 0; i < example_.size(); ++i) {
        std::vector<at::Tensor> parts;
        for (size_t row = 0; row < size; ++row) parts.push_back(rows_[(first + row) % rows_.size()][i]);
        batch.push_back(at::cat(parts));
    }
    return batch;
}

// As why_not_padded. A model may take some numbers of rows and not others: that is no reason not to serve it.
std::string BatchRunner::tried_padding(size_t size) {
    try {
        return why_not_padded(size);
    } catch (const c10::OutOfMemoryError&) {
        throw;
    } catch (const c10::AcceleratorError&) {
        throw;
    } catch (const std::exception& error) {
        if (was_interrupted()) throw Interrupted();
        // Raises if it is the device that is wrong.
        at::accelerator::synchronizeDevice(model_->device().index());
        return "the model fails for batches that were tried for it: " + cause_of(error.what());
    }
}

// What filling up would change, in words; "" if it changes nothing.
std::string BatchRunner::why_not_padded(size_t size) {
    // The fewest that are filled up to it: one, if there is no smaller size.
    const size_t rows = bucket_below(sizes_up_to(size), size) + 1;
    const double rounding = model_->rounding();
    for (size_t first = 0; first < padding_trials; ++first) {
        const Inputs batch = mixed(size, first);
        Inputs filled = mixed(size, first), alone;
        for (const at::Tensor& each : batch) alone.push_back(each.narrow(0, 0, static_cast<int64_t>(rows)));
        fill(alone, filled);
        const c10::IValue among_others = first_rows(call(mixed(size, first)), rows);
        const c10::IValue output = call(filled);
        if (!is_row_wise(output, size)) return "the model's answer has no row per item";
        const c10::IValue among_copies = first_rows(output, rows);
        if (!(strict_difference(among_others, among_copies) <= rounding)) {
            return "a row's answer changes with the other rows of its batch, or from call to call";
        }
        // A batch of this size never runs again, and its kernels would have to be chosen first: not at every size.
        if (!prepared_.empty() && size > small_size) continue;
        for (at::Tensor& each : alone) each = each.clone();
        if (!(strict_difference(call(alone), among_copies) <= rounding)) {
            return "a batch of " + std::to_string(rows) + " rows has other answers when it is filled up to " +
                   std::to_string(size);
        }
    }
    return "";
}

// Gives `prepared` a graph, or the report the reason why there is none.
void BatchRunner::record(Prepared& prepared) {
    const int64_t before = reserved_size(model_->device());
    fill(mixed(prepared.size, 0), prepared.inputs);
    for (int run = 0; run < runs_before_recording; ++run) call(aliases_of(prepared.inputs));
    if (!try_to_record(prepared)) return;
    const std::string reason = why_not_replayed(prepared);
    if (!reason.empty()) {
        report_.forbid_graphs(reason);
        prepared.graph.reset();
        return;
    }
    const int64_t taken = reserved_size(model_->device()) - before;
    report_.graph_size.fetch_add(static_cast<uint64_t>(std::max<int64_t>(taken, 0)), std::memory_order_relaxed);
}

bool BatchRunner::try_to_record(Prepared& prepared) {
    at::accelerator::synchronizeDevice(model_->device().index());
    std::unique_ptr<DeviceGraph> graph = pool_->make();
    c10::IValue output;
    const Status status = guarded([&] {
        graph->begin();
        output = call(aliases_of(prepared.inputs));
        graph->end();
    });
    if (!status.ok()) {
        graph->abandon();
        output = {};
        if (was_interrupted()) throw Interrupted();
        // Raises if it is the device that is wrong.
        at::accelerator::synchronizeDevice(model_->device().index());
        if (status.code == Code::out_of_memory) {
            report_.note_graphs(no_room(prepared.size));
        } else {
            report_.forbid_graphs("the model cannot be recorded: " + cause_of(status.message));
        }
        return false;
    }
    prepared.graph = std::move(graph);
    prepared.output = std::move(output);
    return true;
}

// What tells the graph's answers from the model's, in words; "" if nothing does.
std::string BatchRunner::why_not_replayed(const Prepared& prepared) {
    if (has_plain_values(prepared.output)) return "the model's answer holds what is no tensor";
    for (const at::Tensor& each : tensors_of(prepared.output)) {
        if (each.device() != model_->device()) return "a part of the model's answer is not on the device";
    }
    // Other rows than those it was recorded with, and those at last: a graph may keep what an earlier call left behind.
    for (const size_t first : {1, 2, 5, 0}) {
        const Inputs batch = mixed(prepared.size, first);
        const c10::IValue expected = call(mixed(prepared.size, first)), again = call(mixed(prepared.size, first));
        const double rounding = model_->rounding();
        if (!(strict_difference(expected, again) <= rounding)) return "the model's answers differ from call to call";
        fill(batch, prepared.inputs);
        const c10::IValue got = replayed(*prepared.graph, prepared.output, prepared.size);
        if (!(strict_difference(expected, got) <= rounding)) return "a graph of it gives other answers than its calls";
    }
    return "";
}

}  // namespace pyserve
