// Requests of this process's own connections that are answered without Python (bindings_fast_path.h): into a lane, and from the
// output's row to the bytes of the answer.
//
//     FastPath::take ──> LanePath::submit ──> Lane ──> Engine::drain ──> LanePath::answer
//
// Threads: loop thread only, with the GIL.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bindings_fast_path.h"
#include "bindings_rows.h"
#include "completion.h"
#include "lookout.h"

namespace pyserve {

// A path of one lane.
class LaneRoute : public FastRoute {
  public:
    LaneRoute(std::shared_ptr<LaneRows> rows, std::string version, FastPlace place)
        : FastRoute(std::move(place)), lane(std::move(rows)), url_version(std::move(version)) {}

    const std::shared_ptr<LaneRows> lane;
    const std::string url_version;
    Lookout lookout;
};

struct LaneCall : FastCall, FrontCall {
    bool was_alone = false;  // nothing else was under way when it was taken

    LaneRoute& lane_route() const { return static_cast<LaneRoute&>(*route); }
};

class LanePath : public FastPath, public RowSource {
  public:
    LanePath(std::shared_ptr<RowTable> table, FastOptions options, py::object budget, py::object call_soon,
             py::object log, py::object key_until)
        : FastPath(options, std::move(budget), std::move(call_soon), std::move(log)), table_(std::move(table)),
          key_until_(std::move(key_until)) {
        keys_.ask(key_until_);
    }

    // Answers that are expected at once may be waited for awake; `drain` takes what has come.
    void wait_awake(std::shared_ptr<Completions<>> completions, py::object drain) {
        completions_ = std::move(completions);
        drain_ = std::move(drain);
    }
    // The paths that there are as long as the table has this generation.
    void set(uint64_t generation, const std::unordered_map<std::string, std::shared_ptr<LaneRoute>>& routes) {
        generation_ = generation;
        set_routes({routes.begin(), routes.end()});
        keys_.ask(key_until_);  // a key that was exchanged takes the table back
    }

    py::object cancel(FastConnection& connection) override;
    py::object hand_over(FastConnection& connection) override;

    std::unique_ptr<FrontCall> release(FrontCall* call) override;
    bool answer(FrontCall& call, const RowCut& cut, const char* row) override;
    void again(FrontCall& call) override;
    void wake() override;
    py::object link(const FrontCall& call) const override;
    py::object head(const FrontCall& call) const override;

  protected:
    bool has_room(const FastRoute& route) const override {
        return table_->generation == generation_ && static_cast<const LaneRoute&>(route).lane->has_room();
    }
    std::unique_ptr<FastCall> new_call() override { return std::make_unique<LaneCall>(); }
    char* new_item(const FastRoute& route) override {
        const at::Tensor& like = static_cast<const LaneRoute&>(route).lane->item();
        item_ = at::empty(like.sizes(), like.options());
        return static_cast<char*>(item_.data_ptr());
    }
    bool submit(FastConnection& connection, std::unique_ptr<FastCall> call) override;
    void begin() override;
    py::object announcer() override;

  private:
    const std::shared_ptr<RowTable> table_;
    const py::object key_until_;
    std::shared_ptr<Completions<>> completions_;
    py::object drain_;
    at::Tensor item_;  // of the request that is being taken
    size_t under_way_ = 0;
    std::shared_ptr<FastRoute> alone_;  // of what was taken in this turn, if it was alone
    uint64_t generation_ = 0;
    TouchedLanes touched_;
    std::vector<std::pair<std::shared_ptr<FastConnection>, py::object>> again_;
};

void bind_fast_path(py::module_& m);

}  // namespace pyserve
