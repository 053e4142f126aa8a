// Faults in words, for processes that a test cannot call: from the environment when the device is loaded, and from a
// file that is looked for while the device is used.
//
//     SIMDEV_START="memory bytes=8000000; random seed=3 max_us=500"
//     SIMDEV_FAULTS=/tmp/faults     with lines such as "break device=0 at=20 pid=4711"
//
// A process that may take the file (it has its pid, or no pid is given) renames it to `.taken`, so that only one does.
#pragma once

#include <fstream>
#include <sstream>

#include "memory.h"

namespace simdev {

// A word and its numbers.
struct Command {
    std::string word;
    std::map<std::string, std::string> given;

    explicit Command(const std::string& line) {
        std::istringstream text(line);
        text >> word;
        for (std::string pair; text >> pair;) given[pair.substr(0, pair.find('='))] = pair.substr(pair.find('=') + 1);
    }
    int64_t number(const char* name, int64_t otherwise) const {
        const auto at = given.find(name);
        return at == given.end() ? otherwise : std::stoll(at->second);
    }
    template <typename Run>
    void each_device(Run run) const {
        const int64_t only = number("device", -1);
        for (int device = 0; device < device_count_max; ++device) {
            if (only < 0 || only == device) run(state_of(device));
        }
    }
};

inline void obey(const std::string& line) {
    const Command command(line);
    const std::string& word = command.word;
    const int64_t at = command.number("at", 0), count = command.number("count", 1), bytes = command.number("bytes", 0);
    if (word == "break") {
        command.each_device([&](DeviceState& state) { state.breaking_operator.set(at); });
    } else if (word == "hang") {
        command.each_device([&](DeviceState& state) { state.hanging_operator.set(at); });
    } else if (word == "release") {
        command.each_device([&](DeviceState& state) { state.hang.release(state.hanging_operator); });
    } else if (word == "fail_allocation") {
        command.each_device([&](DeviceState& state) { state.failing_allocations.set(at, count); });
    } else if (word == "fail_launch") {
        command.each_device([&](DeviceState& state) { state.failing_launches.set(at, count); });
    } else if (word == "fail_pinned") {
        failing_pinned.set(at, count);
    } else if (word == "memory") {
        command.each_device([&](DeviceState& state) { state.memory_max = bytes; });
    } else if (word == "pinned") {
        pinned_max = bytes;
    } else if (word == "strict_free") {
        strict_free = command.number("on", 1) != 0;
    } else if (word == "delay") {
        const auto kind = command.given.find("kind");
        TORCH_CHECK(kind != command.given.end(), "simdev: delay kind=... us=...");
        command.each_device(
            [&](DeviceState& state) { state.delay_us[kind_of(kind->second)] = command.number("us", 0); });
    } else if (word == "random") {
        chance.set(static_cast<uint64_t>(command.number("seed", 1)), command.number("max_us", 1000));
    } else if (word == "reset") {
        reset_faults();
    } else {
        TORCH_CHECK(word.empty() || word[0] == '#', "simdev: no fault is called ", word);
    }
}

inline void obey_all(std::istream& text, char between) {
    for (std::string line; std::getline(text, line, between);) obey(line);
}

inline void obey_environment() {
    const char* text = std::getenv("SIMDEV_START");
    if (text == nullptr) return;
    std::istringstream lines(text);
    obey_all(lines, ';');
}

inline bool is_for_this_process(const std::string& path) {
    std::ifstream text(path);
    bool is_ours = text.good();
    for (std::string line; std::getline(text, line);) {
        const int64_t pid = Command(line).number("pid", getpid());
        is_ours = is_ours && pid == getpid();
    }
    return is_ours;
}

inline void start_fault_file() {
    static std::atomic<bool> has_begun{false};
    const char* path = std::getenv("SIMDEV_FAULTS");
    if (path == nullptr || has_begun.exchange(true)) return;
    std::thread([path = std::string(path)] {
        for (;; std::this_thread::sleep_for(std::chrono::milliseconds(10))) {
            if (!is_for_this_process(path) || std::rename(path.c_str(), (path + ".taken").c_str()) != 0) continue;
            std::ifstream text(path + ".taken");
            obey_all(text, '\n');
        }
    }).detach();
}

}  // namespace simdev
