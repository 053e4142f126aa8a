// A tiny test harness: registration, checks with file and line, seeds that replay, a watchdog.
//
// The first failed check ends the program: it may come from any thread, and there is nothing to unwind to.
// Random tests take their seeds from `for_each_seed`; PYSERVE_TEST_SEED=n replays one. There is no time limit: the
// watchdog turns a hang into a message, and counts steps (watchdog.h).
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "watchdog.h"

// How much of the work of a random test is done, in percent; builds with a sanitizer do less. The environment's
// PYSERVE_TEST_SCALE is a factor on top, for a run that has a night.
#ifndef PYSERVE_TEST_SCALE
#define PYSERVE_TEST_SCALE 100
#endif

namespace harness {

struct Test {
    const char* name;
    void (*run)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

inline std::atomic<uint64_t> current_seed{0};  // 0: the test is not random
inline std::atomic<const char*> current_test{""};
inline std::atomic<int> passed{0};
inline void (*end)() = [] { std::_Exit(1); };  // after a failure

// Not inlined: checks are everywhere, and this is what would make them slow to compile.
[[noreturn, gnu::noinline, gnu::cold]] inline void fail(const char* file, int line, const char* text) {
    std::fflush(stdout);
    std::fprintf(stderr, "%s:%d: %s: %s\n", file, line, current_test.load(), text);
    if (const uint64_t seed = current_seed.load(); seed != 0) {
        const std::string number = std::to_string(seed);
        std::fprintf(stderr, "seed %s; replay with PYSERVE_TEST_SEED=%s\n", number.c_str(), number.c_str());
    }
    std::fprintf(stderr, "%d passed, 1 failed\n", passed.load());
    std::fflush(stderr);
    end();
    std::abort();
}

[[noreturn, gnu::noinline, gnu::cold]] inline void fail_unequal(const char* file, int line, const char* text,
                                                                const std::string& left, const std::string& right) {
    fail(file, line, (std::string(text) + ": " + left + " != " + right).c_str());
}

template <class Left, class Right>
void check_equal(const char* file, int line, const char* text, Left left, Right right) {
    static_assert(std::is_arithmetic_v<Left> && std::is_arithmetic_v<Right>, "values that can be printed");
    if (left != right) fail_unequal(file, line, text, std::to_string(left), std::to_string(right));
}

struct Registration {
    Registration(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

inline int64_t scale_factor() {
    static const int64_t factor = [] {
        const char* given = std::getenv("PYSERVE_TEST_SCALE");
        const int64_t number = given != nullptr ? std::strtoll(given, nullptr, 10) : 1;
        return number > 0 ? number : 1;
    }();
    return factor;
}

inline int64_t scaled(int64_t count) {
    const int64_t part = count * PYSERVE_TEST_SCALE / 100 * scale_factor();
    return part > 0 ? part : 1;
}

// splitmix64: one word of state, so that thousands of seeds cost nothing to start.
class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = (state_ += 0x9e3779b97f4a7c15);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }
    size_t below(size_t bound) { return static_cast<size_t>(next() % bound); }
    int64_t between(int64_t low, int64_t high) {
        return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
    }
    bool chance(unsigned percent) { return next() % 100 < percent; }
    template <class T>
    const T& pick(const std::vector<T>& from) {
        return from[below(from.size())];
    }

  private:
    uint64_t state_;
};

// Where this run's seeds begin: new ones each time, for more ground covered.
inline uint64_t first_seed() {
    static const auto first = static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count());
    return first;
}

// Runs `body(seed)` for `count` seeds (scaled), or for the one of PYSERVE_TEST_SEED.
template <class Body>
void for_each_seed(int64_t count, const Body& body) {
    const char* given = std::getenv("PYSERVE_TEST_SEED");
    const uint64_t first = given != nullptr ? std::strtoull(given, nullptr, 10) : first_seed();
    const int64_t runs = given != nullptr ? 1 : scaled(count);
    for (int64_t i = 0; i < runs; ++i) {
        current_seed = first + static_cast<uint64_t>(i);
        body(current_seed.load());
        step();
    }
    current_seed = 0;
}

inline int run_all(int argc, char** argv) {
    std::printf("seeds from %llu\n", static_cast<unsigned long long>(first_seed()));
    const Watchdog watchdog([](const char* problem) { fail(__FILE__, __LINE__, problem); });
    for (const Test& test : tests()) {
        if (argc > 1 && std::string_view(test.name).find(argv[1]) == std::string_view::npos) continue;
        current_test = test.name;
        step();
        const auto start = std::chrono::steady_clock::now();
        test.run();
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        std::printf("ok %s (%.2f s)\n", test.name, took.count());
        std::fflush(stdout);
        ++passed;
    }
    std::printf("%d passed, 0 failed\n", passed.load());
    return passed.load() > 0 ? 0 : 1;
}

}  // namespace harness

#define TEST(name)                                                          \
    static void name();                                                     \
    static const harness::Registration registration_of_##name(#name, name); \
    static void name()

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) harness::fail(__FILE__, __LINE__, "failed: " #condition); \
    } while (false)

#define CHECK_EQ(left, right) harness::check_equal(__FILE__, __LINE__, #left " == " #right, left, right)

#define TEST_MAIN \
    int main(int argc, char** argv) { return harness::run_all(argc, argv); }
