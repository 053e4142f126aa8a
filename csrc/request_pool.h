// The requests of the native lane.
#pragma once

#include "pool.h"
#include "staging.h"

namespace pyserve {

// `inputs` and `owner` belong to the loop thread; workers only read `inputs`.
struct TensorRequest : Request {
    Inputs inputs;
    void* owner = nullptr;   // a Python object, opaque here
    void* buffer = nullptr;  // of Python's, what `inputs` lie in; nullptr if they have memory of their own

    void clear() { inputs.clear(); }
};

using RequestPool = Pool<TensorRequest>;

}  // namespace pyserve
