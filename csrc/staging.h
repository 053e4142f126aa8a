// Staging: the inputs of a batch's requests become one batch on the device, its outputs come back to the host.
//
// On an accelerator the requests are gathered straight into a pinned buffer and copied on a stream of their own,
// so that batch k+1 is copied while batch k runs; a buffer is filled again only after the event behind its last
// copy has fired. Without one, the same code gathers into a plain buffer, and a batch of one is not copied at
// all unless its numbers lie at an odd address. Everything goes through PyTorch's device-generic interfaces
// (c10::Stream, c10::Event, the host allocator), so one source serves the CPU build and CUDA, ROCm or XPU builds and
// needs none of their headers.
//
// Threads: one worker's own.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/ivalue.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace pyserve {

using Inputs = std::vector<at::Tensor>;  // of one request, each [1, ...]

// A batch between gather and fetch.
struct Staged {
    Inputs inputs;                    // on the device, each [n, ...]
    c10::IValue output;               // on the device, then on the host
    std::optional<c10::Event> ready;  // accelerator: fires when `output` is on the host
    bool is_fallback = false;         // did not fit the slot; gathered into memory of its own
};

class Staging {
  public:
    // `slot_size` bytes hold the inputs of the largest batch expected; a larger one falls back to plain memory.
    Staging(at::Device device, int64_t slot_size);

    bool is_async() const { return compute_stream_.has_value(); }

    // REQUIRES: `items` is not empty and all its members have inputs of equal shapes and dtypes.
    Staged gather(const std::vector<const Inputs*>& items);

    // Starts the way back: outputs become host tensors that share no memory with the slot or with a request.
    void fetch(Staged& staged);

    // Waits until the outputs are there.
    static void wait(Staged& staged);

    // Makes the compute stream current while it lives; nothing on a CPU.
    class ComputeScope {
      public:
        explicit ComputeScope(const Staging& staging);
        ~ComputeScope();
        ComputeScope(const ComputeScope&) = delete;
        ComputeScope& operator=(const ComputeScope&) = delete;

      private:
        std::optional<c10::Stream> previous_;
    };

  private:
    struct Slot {
        at::Tensor bytes;                  // pinned on an accelerator, [slot_size] uint8
        std::optional<c10::Event> copied;  // the last copy out of `bytes`
    };

    at::Tensor take_bytes(Slot& slot, int64_t& used, int64_t size, bool& is_fallback) const;
    at::Tensor to_device(const at::Tensor& host);

    const at::Device device_;
    std::optional<c10::Stream> copy_stream_;
    std::optional<c10::Stream> compute_stream_;
    std::array<Slot, 2> slots_;
    size_t next_slot_ = 0;
};

}  // namespace pyserve
