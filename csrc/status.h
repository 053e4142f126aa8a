// Outcome of an operation on the data path. Exceptions are for construction and the Python border only.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace pyserve {

enum class Code : uint8_t {
    ok = 0,
    model_error = 1,    // the model raised for this input
    out_of_memory = 2,  // of the host or of a device
    expired = 3,        // its deadline passed before it ran; it never ran
    cancelled = 4,      // its client went away, or it was answered already; the result is dropped
    closed = 5,         // the lane was closed before it ran
    worker_died = 6,    // the process that ran it ended
    not_run = 7,        // the process that was to run it ended before it came to it
    not_begun = 8,      // it ended while it made the batch ready: the handler was not called
    interrupted = 9,    // it ran for too long
    device_lost = 10,   // the device that ran it, or was to, answers nobody any more
};

struct Status {
    Code code = Code::ok;
    std::string message;
    bool is_of_device = false;  // a driver raised it: the device may be of no use any more

    bool ok() const noexcept { return code == Code::ok; }
    static Status model_error(std::string text) { return {Code::model_error, std::move(text), false}; }
    static Status out_of_memory(std::string text) { return {Code::out_of_memory, std::move(text), false}; }
};

}  // namespace pyserve
