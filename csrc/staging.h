// Staging: the inputs of a batch's requests become one batch on the device, its outputs come back to the host.
//
//     requests ──memcpy──> slot, pinned ──up──> slot, device ──compute──> outputs ──back──> slot, pinned ──> plain memory
//
// On an accelerator there are three streams, so that batch k+1 goes up and batch k-1 comes back while batch k is computed.
// A batch holds a slot from `gather` until its outputs have been collected; a slot has memory and events of its own, made
// once and used again, so that between two batches nothing is allocated. It is used again only when the device has done
// with it: a batch that was collected is over, and for one that failed half-way the next one waits (`settle`).
// Outputs leave pinned memory before anybody else sees them. So memory that came from the device's libraries is freed by
// the worker only, and a slow reader of an answer holds none of it.
//
// Without an accelerator the same calls gather into a plain buffer, and a batch of one is not copied at all unless its
// numbers lie at an odd address. Everything goes through PyTorch's device-generic interfaces (c10::Stream, c10::Event, the
// host allocator), so one source serves the CPU build and CUDA, ROCm or XPU builds and needs none of their headers.
//
// Threads: one worker's own.
#pragma once

#include <ATen/core/ivalue.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>
#include <c10/core/StreamGuard.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "stats.h"
#include "tensors.h"

namespace pyserve {

using Inputs = std::vector<at::Tensor>;  // of one request, each [1, ...]

// What a batch took on the device, by its own clock; seconds.
struct DeviceTimes {
    double upload = 0;
    double compute = 0;
    double fetch = 0;
    std::optional<double> gap;  // between the end of the batch before and this one's begin
};

// Memory and events of one batch on its way. Its worker's only.
struct Slot {
    at::Tensor in;         // [capacity] uint8, pinned if the host allows
    at::Tensor on_device;  // [capacity] uint8
    at::Tensor out;        // uint8, as `in`; as large as the outputs were so far
    bool is_in_pinned = false;
    bool is_out_pinned = false;
    uint64_t generation = 0;  // of the size that it was made for
    bool is_taken = false;
    bool is_dirty = false;  // the device may still work with it
    // Recorded again for each batch. The first two of each stage are only for timing.
    c10::Event upload_begin, uploaded, compute_begin, computed, ready;

    Slot(at::DeviceType type, c10::EventFlag flag)
        : upload_begin(type, flag), uploaded(type, flag), compute_begin(type, flag), computed(type, flag),
          ready(type, flag) {}
};

struct GiveBack {
    void operator()(Slot* slot) const noexcept { slot->is_taken = false; }
};

// A batch between gather and collect. Letting it go gives its slot back.
struct Staged {
    std::unique_ptr<Slot, GiveBack> slot;  // none on a CPU
    Inputs inputs;                         // on the device, each [n, ...]
    c10::IValue output;                    // on the device; on the host after collect
    std::vector<at::Tensor> leaving;       // the tensors of `output` that are on the device, in order, dense
    std::vector<at::Tensor> fetched;       // where they go to
    std::optional<DeviceTimes> times;      // after collect, where the device has a clock
    bool is_fallback = false;              // did not fit the slot
};

class Staging {
  public:
    // `size` bytes hold the inputs of the largest batch expected; for a larger one a slot grows. `lowered` is the dtype of
    // outputs that are to be float on the host, unless it is float itself. The default stream is for models whose parts
    // run in threads of their own, see TorchModel::has_forks.
    Staging(at::Device device, int64_t size, LaneStats& stats, at::ScalarType lowered = at::kFloat,
            bool computes_on_default_stream = false);
    ~Staging();
    Staging(const Staging&) = delete;
    Staging& operator=(const Staging&) = delete;

    bool is_async() const { return compute_.has_value(); }
    // Whether `gather` has a slot for another batch.
    bool has_room() const;
    // From the next use of each slot on; the streams stay. Batches may be on their way.
    void resize(int64_t size);

    // Inputs that are on the device already are joined there; a ComputeScope has to live.
    // REQUIRES: has_room(), `items` is not empty and all its members have inputs of equal shapes and dtypes.
    Staged gather(const std::vector<const Inputs*>& items);
    // Starts the way back of `staged.output`. Without an accelerator this is all of it. REQUIRES: a ComputeScope lives.
    void fetch(Staged& staged);
    // Whether the outputs are on the host.
    static bool is_ready(const Staged& staged) { return !staged.slot || staged.slot->ready.query(); }
    // Waits until they are, or until `is_enough` says so between two looks. True if they are.
    bool wait(const Staged& staged, const std::function<bool()>& is_enough = {}) const;
    // The outputs become host tensors of plain memory that share none with the slot or with a request, and the slot is
    // free. REQUIRES: they are ready.
    void collect(Staged& staged);
    // Gives every slot as much memory as any has needed so far: after the warm-up, so that none is allocated later.
    // One that the device has no memory for is given up, but for the last.
    void equip();

    // Makes the compute stream current while it lives; nothing on a CPU.
    class ComputeScope {
      public:
        explicit ComputeScope(const Staging& staging) : guard_(staging.compute_) {}

      private:
        c10::OptionalStreamGuard guard_;
    };

  private:
    Staged gather_on_host(const std::vector<const Inputs*>& items);
    void fetch_on_host(Staged& staged) const;
    at::Tensor joined(const std::vector<const Inputs*>& items, size_t position) const;
    void upload(Slot& slot, int64_t from, int64_t to);
    Slot& take();
    void settle(Slot& slot);
    void make_room(Slot& slot, int64_t size);
    void make_out_room(Slot& slot, int64_t size);
    void drop(Slot& slot);
    void give_back_pinned();
    at::Tensor host_bytes(int64_t size, bool& is_pinned);
    void free_host_bytes(at::Tensor& bytes, bool is_pinned);
    at::Tensor plain_copy(const at::Tensor& tensor) const;
    void measure(Staged& staged);
    bool wait_until(const std::function<bool()>& is_over, const std::function<bool()>& is_enough = {}) const;

    const at::Device device_;
    LaneStats& stats_;
    const at::ScalarType lowered_;
    int64_t size_;
    uint64_t generation_ = 0;
    bool gives_back_ = false;  // pinned memory of a larger size was let go of, and is still in torch's cache
    std::optional<c10::Stream> up_, compute_, back_;
    bool has_clock_ = false;
    std::optional<c10::Event> last_computed_;  // of the batch that was collected last
    at::Tensor host_;                          // without an accelerator: what batches are gathered into
    std::vector<std::unique_ptr<Slot>> slots_;
    size_t next_slot_ = 0;
    int64_t out_size_ = 0;  // of the largest outputs since the size was set
};

}  // namespace pyserve
