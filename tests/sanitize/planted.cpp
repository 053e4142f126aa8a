// Faults on purpose, one per kind, linked only into the extension that is built for sanitizers. What is not found
// here would not be found in csrc/ either: same library, same flags, same preloaded runtime.
//
// test_planted_faults.py calls them by name through ctypes. `n` comes from outside, so that no compiler sees through.
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define PLANTED extern "C" __attribute__((visibility("default"), noinline))

// AddressSanitizer: reads behind the end of n bytes on the heap.
PLANTED int planted_heap_overflow(int n) {
    char* bytes = new char[static_cast<size_t>(n)];
    std::memset(bytes, 1, static_cast<size_t>(n));
    const int value = bytes[n];
    delete[] bytes;
    return value;
}

// AddressSanitizer: reads what was freed.
PLANTED int planted_use_after_free(int n) {
    volatile int* number = new int(n);
    delete number;
    return *number;
}

// UndefinedBehaviorSanitizer: n + INT32_MAX, signed.
PLANTED int planted_signed_overflow(int n) {
    volatile int32_t most = INT32_MAX;
    return most + n;
}

// UndefinedBehaviorSanitizer: an 8-byte number at an odd address.
PLANTED int planted_misaligned(int n) {
    alignas(8) static char bytes[32] = {};
    const auto* number = reinterpret_cast<const volatile uint64_t*>(bytes + n);
    return static_cast<int>(*number);
}

// LeakSanitizer: n bytes that nothing refers to any more.
PLANTED int planted_leak(int n) {
    volatile char* bytes = new char[static_cast<size_t>(n)];
    bytes[0] = 1;
    bytes = nullptr;
    return n;
}
