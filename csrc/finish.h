// The last steps of an answer where they are the handler's own and always the same: a worker takes them, in place of the
// event loop. The handler declares which; a batch that somebody wants the model's own output of is left as it is.
#pragma once

#include <ATen/core/ivalue.h>

#include <cstdint>
#include <optional>

#include "tensors.h"

namespace pyserve {

enum class Finish : uint8_t {
    none,
    ranked,   // scores [n, classes] -> the most probable classes, on the host
    classes,  // scores [n, classes, height, width] -> the most probable class of each pixel, where the scores are
};

// Scores [n, classes] on the host -> (probabilities, classes), both [n, k], the most probable first; k is `count`, or as
// many as there are. By the operators that the handler calls, so that equal numbers come in the same order. Nothing if
// `output` has another form, of which the handler has the words.
std::optional<c10::IValue> ranked(const c10::IValue& output, int64_t count);

// Scores [n, classes, height, width], alone or as "out" in a dict -> [n, height, width, 2]: class and probability.
// Nothing if `output` has another form.
std::optional<c10::IValue> class_per_pixel(const c10::IValue& output);

}  // namespace pyserve
