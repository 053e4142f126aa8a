// What torch, the models and the machine throw, as a Status.
#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <new>
#include <string>

#include "status.h"

namespace pyserve {

// What drivers of all makes give for memory: cudaErrorMemoryAllocation and hipErrorOutOfMemory.
inline constexpr int driver_out_of_memory = 2;

// Whether a text says that memory ran out. TorchScript turns every exception of an operator into std::runtime_error, and
// libraries of a device raise plain errors for memory that they allocate by themselves: only the text tells then. These
// are the words of torch's allocators, and of the drivers and libraries below it.
inline bool is_out_of_memory(const std::string& text) {
    for (const char* words : {
             " out of memory. Tried to allocate",
             "can't allocate memory: you tried to allocate",
             "error: out of memory",    // CUDA and HIP, also for pinned memory
             "_STATUS_ALLOC_FAILED",    // cuBLAS, cuDNN, cuSOLVER, cuSPARSE, cuFFT
             "UR_RESULT_ERROR_OUT_OF",  // of device or host memory, of resources
         }) {
        if (text.find(words) != std::string::npos) return true;
    }
    return false;
}

inline Status failed(const std::string& text) {
    return is_out_of_memory(text) ? Status::out_of_memory(text) : Status::model_error(text);
}

// Runs `body` and turns whatever it throws into a Status, by type where there is one.
template <class Body>
Status guarded(const Body& body) noexcept {
    try {
        try {
            body();
            return {};
        } catch (const c10::OutOfMemoryError& error) {
            return Status::out_of_memory(error.what_without_backtrace());
        } catch (const std::bad_alloc&) {
            return Status::out_of_memory("the host has no memory left");
        } catch (const c10::AcceleratorError& error) {
            if (error.get_error_code() == driver_out_of_memory) {
                return Status::out_of_memory(error.what_without_backtrace());
            }
            Status status = failed(error.what_without_backtrace());
            status.is_of_device = status.code != Code::out_of_memory;
            return status;
        } catch (const c10::Error& error) {
            return failed(error.what_without_backtrace());
        } catch (const std::exception& error) {
            return failed(error.what());
        } catch (...) {
            return Status::model_error("an exception of an unknown type");
        }
    } catch (...) {
        return {Code::out_of_memory, {}};  // building the text above failed
    }
}

}  // namespace pyserve
