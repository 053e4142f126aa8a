#include "openvino_model.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "clock.h"
#include "interrupt.h"
#include "openvino_api.h"
#include "row_pieces.h"
#include "sizes_seen.h"

namespace pyserve {
namespace {

using openvino::Api;
using openvino::Owned;

// A run that is to end is noticed within this time.
constexpr int64_t look_ms = 50;
// How long the warm-up of a model that is to take another's place rests after each run, in runs: most of the CPUs' time is
// left to the requests that the other one answers meanwhile.
constexpr int rest_per_run = 2;
constexpr std::chrono::milliseconds rest_piece{5};

struct Kind {
    int type;
    at::ScalarType dtype;
};
constexpr Kind kinds[] = {
    {openvino::f32, at::kFloat},     {openvino::f64, at::kDouble}, {openvino::f16, at::kHalf},
    {openvino::bf16, at::kBFloat16}, {openvino::i64, at::kLong},   {openvino::i32, at::kInt},
    {openvino::i16, at::kShort},     {openvino::i8, at::kChar},    {openvino::u8, at::kByte},
    {openvino::boolean, at::kBool},
};

at::ScalarType dtype_of(int type) {
    for (const Kind& kind : kinds) {
        if (kind.type == type) return kind.dtype;
    }
    throw std::runtime_error("OpenVINO's type " + std::to_string(type) + " has no equal in torch");
}

int type_of(at::ScalarType dtype) {
    for (const Kind& kind : kinds) {
        if (kind.dtype == dtype) return kind.type;
    }
    throw std::invalid_argument(std::string("OpenVINO takes no tensors of ") + at::toString(dtype));
}

const char* hint_of(at::ScalarType precision) {
    if (precision == at::kBFloat16) return "bf16";
    return precision == at::kHalf ? "f16" : "f32";
}

// What an input has to be; without sizes, of any number of dimensions.
struct Taken {
    at::ScalarType dtype;
    std::optional<std::vector<openvino::Range>> sizes;
};

std::optional<std::vector<openvino::Range>> sizes_of(const Api& api, const openvino::Port* port) {
    openvino::PartialShape shape{};
    api.check(api.partial_shape_of(port, &shape), "OpenVINO's inputs");
    std::optional<std::vector<openvino::Range>> sizes;
    if (shape.rank.min == shape.rank.max) sizes.emplace(shape.sizes, shape.sizes + shape.rank.min);
    api.free_partial_shape(&shape);
    return sizes;
}

std::string text_of(const std::vector<openvino::Range>& sizes) {
    std::string text;
    for (const openvino::Range& size : sizes) {
        text += text.empty() ? "[" : ", ";
        text += size.min == size.max ? std::to_string(size.min) : "?";
    }
    return text + "]";
}

// OpenVINO itself does not look at the sizes of inputs with a free one, and reads what lies behind them.
void check_input(const Taken& taken, const at::Tensor& input) {
    if (input.scalar_type() != taken.dtype) {
        throw std::invalid_argument(std::string("the model takes ") + at::toString(taken.dtype) + ", got " +
                                    at::toString(input.scalar_type()));
    }
    if (!taken.sizes) return;
    bool fits = taken.sizes->size() == static_cast<size_t>(input.dim());
    for (size_t d = 0; fits && d < taken.sizes->size(); ++d) {
        const openvino::Range& range = (*taken.sizes)[d];
        const int64_t size = input.size(static_cast<int64_t>(d));
        fits = size >= range.min && (range.max < 0 || size <= range.max);
    }
    if (fits) return;
    std::ostringstream got;
    got << input.sizes();
    throw std::invalid_argument("the model takes " + text_of(*taken.sizes) + ", got " + got.str());
}

// The numbers of `tensor` in memory of torch's: the library writes over its own in the next run.
at::Tensor copy_of(const Api& api, const openvino::Tensor* tensor) {
    int type = 0;
    size_t size = 0;
    void* data = nullptr;
    openvino::Shape shape{};
    api.check(api.tensor_type(tensor, &type), "OpenVINO's output");
    api.check(api.byte_size(tensor, &size), "OpenVINO's output");
    api.check(api.shape_of(tensor, &shape), "OpenVINO's output");
    const std::vector<int64_t> sizes(shape.sizes, shape.sizes + shape.rank);
    api.free_shape(&shape);
    at::Tensor copy = at::empty(sizes, at::TensorOptions(dtype_of(type)));
    if (copy.nbytes() != size)
        throw std::runtime_error("OpenVINO's output is packed in a way that torch does not have");
    if (size == 0) return copy;
    api.check(api.data(tensor, &data), "OpenVINO's output");
    std::memcpy(copy.data_ptr(), data, size);
    return copy;
}

int64_t numbers_in(const std::vector<at::Tensor>& inputs) {
    int64_t count = 0;
    for (const at::Tensor& input : inputs) count += input.numel();
    return count;
}

// Of all inputs that share their first dimension; else 0.
int64_t rows_of(const std::vector<at::Tensor>& inputs) {
    if (inputs.empty() || inputs.front().dim() == 0) return 0;
    const int64_t rows = inputs.front().size(0);
    const bool all = std::all_of(inputs.begin(), inputs.end(),
                                 [&](const at::Tensor& input) { return input.dim() > 0 && input.size(0) == rows; });
    return all ? rows : 0;
}

// Of the .bin beside the .xml; 0 if it cannot be read.
int64_t weights_beside(const std::string& path) {
    std::error_code error;
    const auto size = std::filesystem::file_size(std::filesystem::path(path).replace_extension(".bin"), error);
    return error ? 0 : static_cast<int64_t>(size);
}

}  // namespace

// The model for one number of streams and threads each, and its requests. Any thread.
class OpenVinoModel::Compiled {
  public:
    Compiled(const Api& api, const ModelOptions& options, int streams, int threads)
        : streams(streams), threads(threads), api_(api), model_(nullptr, api.free_model) {
        const std::string stream_text = std::to_string(streams), thread_text = std::to_string(streams * threads);
        const openvino::Property properties[] = {
            {"NUM_STREAMS", stream_text.c_str()},
            {"INFERENCE_NUM_THREADS", thread_text.c_str()},
            {"INFERENCE_PRECISION_HINT", hint_of(options.precision)},
            // Models know nothing of each other, and would all keep to the same first CPUs.
            {"ENABLE_CPU_PINNING", "NO"},
        };
        openvino::CompiledModel* made = nullptr;
        api.check(api.core_compile(api.core(), options.path.c_str(), "CPU", std::size(properties), properties, &made),
                  "OpenVINO cannot use the model");
        model_.reset(made);
        size_t count = 0;
        api.check(api.inputs_size(made, &count), "OpenVINO's inputs");
        for (size_t i = 0; i < count; ++i) {
            openvino::Port* found = nullptr;
            int type = 0;
            api.check(api.input(made, i, &found), "OpenVINO's inputs");
            const Owned<openvino::Port> port(found, api.free_port);
            api.check(api.element_type_of(found, &type), "OpenVINO's inputs");
            inputs_.push_back({dtype_of(type), sizes_of(api, found)});
        }
        api.check(api.outputs_size(made, &outputs_), "OpenVINO's outputs");
    }

    const std::vector<Taken>& inputs() const { return inputs_; }

    std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs) {
        const Turn turn(*this);
        openvino::InferRequest* request = turn.request.get();
        for (size_t i = 0; i < inputs.size(); ++i) {
            const at::Tensor& input = inputs[i];
            openvino::Tensor* made = nullptr;
            std::vector<int64_t> sizes = input.sizes().vec();
            api_.check(api_.tensor_on(type_of(input.scalar_type()), {input.dim(), sizes.data()},
                                      const_cast<void*>(input.const_data_ptr()), &made),
                       "OpenVINO does not take the input");
            const Owned<openvino::Tensor> tensor(made, api_.free_tensor);
            api_.check(api_.set_input(request, i, made), "OpenVINO does not take the input");
        }
        api_.check(api_.start(request), "OpenVINO does not run the model");
        finish(request);
        std::vector<at::Tensor> outputs;
        for (size_t i = 0; i < outputs_; ++i) {
            openvino::Tensor* found = nullptr;
            api_.check(api_.get_output(request, i, &found), "OpenVINO's output");
            const Owned<openvino::Tensor> tensor(found, api_.free_tensor);
            outputs.push_back(copy_of(api_, found));
        }
        return outputs;
    }

    const int streams, threads;

  private:
    // A request for as long as it lives: one that is idle, or another one.
    struct Turn {
        explicit Turn(Compiled& of) : compiled(of), request(nullptr, of.api_.free_request) {
            {
                const std::lock_guard lock(of.mutex_);
                if (!of.idle_.empty()) {
                    request = std::move(of.idle_.back());
                    of.idle_.pop_back();
                    return;
                }
            }
            openvino::InferRequest* made = nullptr;
            of.api_.check(of.api_.create_request(of.model_.get(), &made), "OpenVINO has no room for another batch");
            request.reset(made);
        }
        ~Turn() {
            const std::lock_guard lock(compiled.mutex_);
            compiled.idle_.push_back(std::move(request));
        }
        Turn(const Turn&) = delete;
        Turn& operator=(const Turn&) = delete;

        Compiled& compiled;
        Owned<openvino::InferRequest> request;
    };

    // Waits for the end of a run. One that was interrupted ends behind the operator that it is in.
    void finish(openvino::InferRequest* request) const {
        const Runs* runs = Runs::current();
        bool is_cancelled = false;
        for (;;) {
            const int outcome = api_.wait_for(request, look_ms);
            if (outcome != openvino::not_ready) {
                if (runs != nullptr && runs->is_interrupted()) throw Interrupted();
                api_.check(outcome, "OpenVINO");
                return;
            }
            if (is_cancelled || runs == nullptr || !runs->is_interrupted()) continue;
            api_.cancel(request);
            is_cancelled = true;
        }
    }

    const Api& api_;
    Owned<openvino::CompiledModel> model_;
    std::vector<Taken> inputs_;
    size_t outputs_ = 0;
    std::mutex mutex_;
    std::vector<Owned<openvino::InferRequest>> idle_;  // freed before the model
};

// What the thread that compiles beside the requests needs, which may outlive the model.
struct OpenVinoModel::Shared : std::enable_shared_from_this<Shared> {
    Shared(const Api& api, const ModelOptions& options)
        : api(api), options(options), weights_size(weights_beside(options.path)), pieces(weights_size) {}

    // A batch, in pieces where streams share what memory it takes.
    std::vector<at::Tensor> run(Compiled& on, const std::vector<at::Tensor>& inputs) {
        const int64_t rows = rows_of(inputs), numbers = numbers_in(inputs);
        const int64_t each = rows == 0 ? 0 : pieces.rows_of(rows, numbers, on.streams);
        if (each == rows) return run_timed(on, inputs, numbers);
        std::vector<std::vector<at::Tensor>> parts;  // by output
        for (int64_t first = 0; first < rows; first += each) {
            const int64_t count = std::min(each, rows - first);
            std::vector<at::Tensor> piece;
            for (const at::Tensor& input : inputs) piece.push_back(input.narrow(0, first, count));
            std::vector<at::Tensor> outputs = run_timed(on, piece, numbers / rows * count);
            parts.resize(outputs.size());
            for (size_t i = 0; i < outputs.size(); ++i) {
                if (outputs[i].dim() == 0 || outputs[i].size(0) != count) {
                    pieces.keep_whole();
                    return run_timed(on, inputs, numbers);
                }
                parts[i].push_back(std::move(outputs[i]));
            }
        }
        // Of what was run just now it may be known better: then its kernels are made now, not by a later request.
        if (pieces.rows_of(rows, numbers, on.streams) == rows) return run_timed(on, inputs, numbers);
        std::vector<at::Tensor> outputs;
        for (const std::vector<at::Tensor>& part : parts) outputs.push_back(at::cat(part));
        return outputs;
    }

    std::vector<at::Tensor> run_timed(Compiled& on, const std::vector<at::Tensor>& inputs, int64_t numbers) {
        const int64_t began_at = SteadyClock::now_ns();
        std::vector<at::Tensor> outputs = on.run(inputs);
        pieces.note(numbers, SteadyClock::now_ns() - began_at);
        return outputs;
    }

    std::shared_ptr<Compiled> current() {
        const std::lock_guard lock(mutex);
        return compiled;
    }

    void compile(std::pair<int, int> streams_and_threads) {
        const auto [streams, threads] = streams_and_threads;
        auto made = std::make_shared<Compiled>(api, options, streams, threads);
        warm_up(*made);
        const std::lock_guard lock(mutex);
        if (!is_over) compiled.swap(made);  // the other one goes with the last batch that it runs
    }

    // Runs what has been run before, in every stream, so that requests do not wait for its kernels.
    void warm_up(Compiled& made) {
        const std::vector<Sizes> known = seen.all();
        if (known.empty()) return;
        const auto run_all = [&] {
            for (const Sizes& sizes : known) {
                if (is_over) return;
                const int64_t began_at = SteadyClock::now_ns();
                try {
                    std::vector<at::Tensor> inputs;
                    for (size_t i = 0; i < sizes.size(); ++i)
                        inputs.push_back(at::zeros(sizes[i], made.inputs()[i].dtype));
                    run(made, inputs);
                } catch (const std::exception&) {
                    return;  // requests will meet it too, and report it
                }
                rest(rest_per_run * (SteadyClock::now_ns() - began_at));
            }
        };
        std::vector<std::thread> others;
        for (int i = 1; i < made.streams; ++i) {
            try {
                others.emplace_back(run_all);
            } catch (const std::system_error&) {
                break;  // no thread to be had now: the others' kernels are made by requests
            }
        }
        run_all();
        for (std::thread& each : others) each.join();
    }

    // In pieces: nobody waits for it once the model goes.
    void rest(int64_t ns) const {
        const int64_t until = SteadyClock::now_ns() + ns;
        while (is_compiling && !is_over && SteadyClock::now_ns() < until) std::this_thread::sleep_for(rest_piece);
    }

    // From now on so many runs at once, of so many threads each; 0 leaves the runs as they are. Whether something else is
    // to be compiled. REQUIRES: the lock is held.
    bool wish(int runs_at_once, int threads) {
        if (runs_at_once > 0) runs = runs_at_once;
        // So many that all their threads are within the CPUs that models may use.
        const std::pair<int, int> before =
            std::exchange(wanted, std::pair(std::max(1, std::min(runs, options.runners_max / threads)), threads));
        return wanted != before;
    }

    // Compiles for what is wished, beside the runs.
    void compile_aside(int runs_at_once, int threads) {
        const std::lock_guard lock(mutex);
        if (!wish(runs_at_once, threads) || is_compiling || is_over) return;
        is_compiling = true;
        try {
            std::thread([self = shared_from_this()] { self->compile_wanted(); }).detach();
        } catch (const std::system_error&) {
            is_compiling = false;  // no thread to be had now
        }
    }

    // Until what is there is what is wanted.
    void compile_wanted() {
        std::unique_lock lock(mutex);
        while (!is_over && wanted != refused && wanted != std::pair(compiled->streams, compiled->threads)) {
            const std::pair<int, int> now = wanted;
            lock.unlock();
            bool is_done = true;
            try {
                compile(now);
            } catch (const std::exception&) {
                is_done = false;  // the one that is there continues to answer
            }
            lock.lock();
            if (!is_done) refused = now;
        }
        is_compiling = false;
    }

    const Api& api;
    const ModelOptions options;
    const int64_t weights_size;
    RowPieces pieces;
    std::mutex mutex;
    std::shared_ptr<Compiled> compiled;
    std::atomic<bool> is_compiling{false};  // beside the requests
    std::atomic<bool> is_over{false};
    SizesSeen seen;
    int runs = 1;                                     // at once, as far as is known
    std::pair<int, int> wanted{0, 1}, refused{0, 0};  // streams, threads of each
};

OpenVinoModel::OpenVinoModel(const ModelOptions& options, const std::vector<at::Tensor>& example)
    : TorchModel(options), shared_(std::make_shared<Shared>(Api::of(options.library), options)) {
    if (!options.device.is_cpu()) throw std::invalid_argument("pyserve uses OpenVINO on the CPU only");
    shared_->wish(options.workers, std::max(1, options.threads));
    shared_->compile(shared_->wanted);
    const size_t taken = shared_->compiled->inputs().size();
    if (!example.empty() && taken != example.size()) {
        throw std::invalid_argument("the model has " + std::to_string(taken) + " inputs as OpenVINO has it, not " +
                                    std::to_string(example.size()));
    }
    weights_size_ = shared_->weights_size;
}

OpenVinoModel::~OpenVinoModel() {
    std::shared_ptr<Compiled> last;  // freed behind the lock
    const std::lock_guard lock(shared_->mutex);
    shared_->is_over = true;
    last.swap(shared_->compiled);
}

c10::IValue OpenVinoModel::run(const std::vector<at::Tensor>& inputs) {
    const std::shared_ptr<Compiled> compiled = shared_->current();
    if (inputs.size() != compiled->inputs().size()) {
        throw std::invalid_argument("the model takes " + std::to_string(compiled->inputs().size()) + " inputs, got " +
                                    std::to_string(inputs.size()));
    }
    std::vector<at::Tensor> laid_out;
    for (size_t i = 0; i < inputs.size(); ++i) {
        laid_out.push_back(numbers_of(inputs[i]).contiguous());
        check_input(compiled->inputs()[i], laid_out.back());
    }
    shared_->seen.add(laid_out);
    std::vector<at::Tensor> outputs = shared_->run(*compiled, laid_out);
    if (outputs.size() == 1) return std::move(outputs.front());
    std::vector<c10::IValue> elements(std::make_move_iterator(outputs.begin()), std::make_move_iterator(outputs.end()));
    return c10::ivalue::Tuple::create(std::move(elements));
}

void OpenVinoModel::use_threads(int count, int workers) { shared_->compile_aside(workers, std::max(1, count)); }

void OpenVinoModel::prepare_threads(int count, int workers) {
    std::unique_lock lock(shared_->mutex);
    shared_->wish(workers, std::max(1, count));
    const std::pair<int, int> wanted = shared_->wanted;
    lock.unlock();
    if (streams_and_threads() != wanted) shared_->compile(wanted);
}

std::pair<int, int> OpenVinoModel::streams_and_threads() const {
    const std::shared_ptr<Compiled> compiled = shared_->current();
    return {compiled->streams, compiled->threads};
}

std::shared_ptr<TorchModel> OpenVinoModel::load_again(at::Device device) {
    ModelOptions options = options_;
    options.device = device;
    return std::make_shared<OpenVinoModel>(options, std::vector<at::Tensor>{});
}

}  // namespace pyserve
