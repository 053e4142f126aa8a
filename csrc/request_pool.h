// The requests of the native lane.
#pragma once

#include "pool.h"
#include "staging.h"

namespace pyserve {

struct FrontCall;

// `inputs` and `owner` belong to the loop thread; workers only read `inputs`.
struct TensorRequest : Request {
    Inputs inputs;
    void* owner = nullptr;      // a Python object, opaque here
    void* buffer = nullptr;     // of Python's, what `inputs` lie in; nullptr if they have memory of their own
    FrontCall* call = nullptr;  // of a front end, which then stands in place of an owner (bindings_rows.h)
    bool wants_output = false;  // the model's own, not what a Finish makes of it

    std::optional<c10::Event> made;  // behind what makes `inputs` that lie on a device

    void clear() {
        inputs.clear();
        made.reset();
    }
};

inline const Inputs& inputs_of(const Request* request) { return static_cast<const TensorRequest*>(request)->inputs; }

using RequestPool = Pool<TensorRequest>;

}  // namespace pyserve
