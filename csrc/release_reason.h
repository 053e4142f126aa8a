// Why a batch left the queue when it did.
#pragma once

#include <cstdint>

namespace pyserve {

enum class Release : uint8_t {
    none,       // it did not
    idle,       // a worker was idle and took what was there
    full,       // it held as many requests as it may
    bytes,      // one more request would have been too many bytes
    min_batch,  // the minimum was there
    delay,      // the minimum did not come within the delay
    deadline,   // the minimum did not come within a request's own time
    closing,    // no more could come
};

inline const char* name_of(Release release) {
    switch (release) {
        case Release::none: return "none";
        case Release::idle: return "idle";
        case Release::full: return "full";
        case Release::bytes: return "bytes";
        case Release::min_batch: return "min_batch";
        case Release::delay: return "delay";
        case Release::deadline: return "deadline";
        case Release::closing: return "closing";
    }
    return "unknown";
}

}  // namespace pyserve
