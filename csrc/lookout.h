// Whether to wait awake for an answer. To sleep and be woken takes longer than a small model's run, and if a request is alone
// nothing else waits for the thread meanwhile.
//
// Only what is expected within microseconds is waited for, never longer than that, and never without a request under way. Where
// it does not come in time, as on a busy machine, the next ones are waited for asleep: one, two, four, ...
//
// Threads: one.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pyserve {

class Lookout {
  public:
    static constexpr int64_t usual_max_ns = 100'000;
    static constexpr int64_t wait_max_ns = 150'000;
    static constexpr uint32_t left_out_max = 1024;

    // How long a request took that was alone, from its arrival until its batch had ended.
    void note_duration(int64_t duration_ns) {
        constexpr int64_t weight = 8;
        const int64_t seen = std::clamp<int64_t>(duration_ns, 1, 2 * usual_max_ns);
        usual_ns_ = usual_ns_ == 0 ? seen : usual_ns_ + (seen - usual_ns_) / weight;
    }

    // How long to wait awake for the one that has just been given to a worker; 0 for not at all.
    int64_t wait_ns() {
        if (usual_ns_ == 0 || usual_ns_ > usual_max_ns) return 0;
        if (left_out_ > 0) {
            --left_out_;
            return 0;
        }
        return std::min(2 * usual_ns_, wait_max_ns);
    }

    // Whether it came meanwhile.
    void note_wait(bool has_come) {
        pause_ = has_come ? 0 : std::clamp<uint32_t>(2 * pause_, 1, left_out_max);
        left_out_ = pause_;
    }

  private:
    int64_t usual_ns_ = 0;
    uint32_t left_out_ = 0, pause_ = 0;
};

}  // namespace pyserve
