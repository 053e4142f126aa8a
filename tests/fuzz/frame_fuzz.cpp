// The libFuzzer target of the wire to worker processes: tests/native/frame_input.h says what is tried.
//
//   make -C tests/native BUILD=fuzz CXX=clang++-16 frame_fuzz
#include <cstddef>
#include <cstdint>

#include "frame_input.h"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
    harness::end = [] { std::abort(); };  // which libFuzzer notices, and keeps the input
    return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    frame_input::check({reinterpret_cast<const char*>(data), size});
    return 0;
}
