// When a worker takes another batch for a device that has one to work on.
//
// Late enough for the batch to grow, since a request that is taken waits for the device anyway, and a batch of many takes
// little longer than one of few; early enough to be there when the device ends. So the time that a batch of so many rows
// took is remembered, and what it takes to make one ready. What is not known yet counts as nothing: then one is taken at
// once.
//
// Threads: one worker's own.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <unordered_map>

namespace pyserve {

class Pace {
  public:
    // A batch was given to the device, for which the host needed `host_ns`.
    void launched(size_t rows, int64_t now, int64_t host_ns) {
        host_ns_ = mean(host_ns_, host_ns);
        ends_at_ = std::max(ends_at_, now + upload_ns_) + expected(rows);
    }
    // The oldest batch is over. `next_rows` are those of the one that the device has begun meanwhile, 0 without one.
    void finished(size_t rows, int64_t now, int64_t upload_ns, int64_t compute_ns, size_t next_rows) {
        upload_ns_ = mean(upload_ns_, upload_ns);
        if (compute_ns_.size() >= sizes_max) compute_ns_.clear();
        int64_t& known = compute_ns_[rows];
        known = mean(known, compute_ns);
        ends_at_ = next_rows == 0 ? 0 : now + expected(next_rows);
    }
    // From when on a batch should be taken that is to follow without a gap, ns.
    int64_t take_at() const {
        const int64_t lead = host_ns_ + upload_ns_;
        return ends_at_ - lead - lead / 2;  // the next one may be larger
    }
    // How many numbers of rows it knows.
    size_t size() const { return compute_ns_.size(); }

  private:
    static constexpr size_t sizes_max = 4096;

    // The first value as it is, later ones a quarter, and of one that is far off no more than of its double.
    static int64_t mean(int64_t known, int64_t next) {
        return known == 0 ? next : known + (std::min(next, 2 * known) - known) / 4;
    }

    int64_t expected(size_t rows) const {
        const auto found = compute_ns_.find(rows);
        return found == compute_ns_.end() ? 0 : found->second;
    }

    std::unordered_map<size_t, int64_t> compute_ns_;  // by rows
    int64_t host_ns_ = 0;
    int64_t upload_ns_ = 0;
    int64_t ends_at_ = 0;  // when the device will have done with what it was given
};

}  // namespace pyserve
