// Pictures that come to an accelerator as bytes: there they become the numbers that a model takes, by the operations
// of handlers/pixels.py in the same order and precision, so that they are the same numbers.
//
// Threads: any; constant.
#pragma once

#include <array>
#include <vector>

#include "tensors.h"

namespace pyserve {

// (byte / 255 - mean) / std, per channel.
struct Normalization {
    std::array<float, 3> mean;
    std::array<float, 3> std;
};

class Pixels {
  public:
    Pixels(const Normalization& normalization, at::Device device);

    // Whether `input` is pictures as bytes [n, height, width, 3]. Numbers have three channels first, and another dtype.
    static bool are(const at::Tensor& input) {
        return input.scalar_type() == at::kByte && input.dim() == 4 && input.size(3) == 3;
    }

    // Bytes on the device -> fp32 [n, 3, height, width]. Only operators on the device: a graph may capture it.
    // REQUIRES: are(pixels).
    at::Tensor numbers(const at::Tensor& pixels, at::MemoryFormat format) const;

    // `inputs` with stand-ins, of the numbers' dtype and shape, where they are pixels.
    static std::vector<at::Tensor> described(const std::vector<at::Tensor>& inputs);

  private:
    at::Tensor divisor_;
    at::Tensor mean_;  // undefined if it changes nothing
    at::Tensor std_;   // undefined if it changes nothing
};

}  // namespace pyserve
