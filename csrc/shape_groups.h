// Which requests of a take fit one tensor.
#pragma once

#include <cstddef>
#include <vector>

#include "request_pool.h"

namespace pyserve {

inline bool same_kind(const Inputs& left, const Inputs& right) {
    if (left.size() != right.size()) return false;
    for (size_t i = 0; i < left.size(); ++i) {
        if (left[i].scalar_type() != right[i].scalar_type() || left[i].sizes() != right[i].sizes()) return false;
        if (left[i].device() != right[i].device()) return false;
    }
    return true;
}

// Splits requests into groups that fit one tensor, keeping the order inside a group.
inline std::vector<std::vector<Request*>> group_by_shape(const std::vector<Request*>& requests) {
    std::vector<std::vector<Request*>> groups;
    for (Request* request : requests) {
        bool placed = false;
        for (auto& group : groups) {
            if (!same_kind(inputs_of(group.front()), inputs_of(request))) continue;
            group.push_back(request);
            placed = true;
            break;
        }
        if (!placed) groups.push_back({request});
    }
    return groups;
}

}  // namespace pyserve
