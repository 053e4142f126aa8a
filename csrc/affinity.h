// CPUs that a thread keeps to.
#pragma once

#include <sched.h>

#include <vector>

namespace pyserve {

// From here on the calling thread, and those that it starts, run on `cpus` only. Without effect if there are none, or
// if none of them is allowed to this process any more.
inline void keep_to(const std::vector<int>& cpus) noexcept {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int cpu : cpus) {
        if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
    }
    if (CPU_COUNT(&set) > 0) sched_setaffinity(0, sizeof(set), &set);
}

}  // namespace pyserve
