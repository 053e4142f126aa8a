#include "device_graph.h"

#include <map>

#if __has_include(<ATen/core/GraphImplInterface.h>)
#include <ATen/core/GraphImplInterface.h>
#define PYSERVE_HAS_GENERIC_GRAPHS 1
#endif

namespace pyserve {
namespace {

std::map<at::DeviceType, MakeGraphPool>& makers() {
    static std::map<at::DeviceType, MakeGraphPool> all;
    return all;
}

#ifdef PYSERVE_HAS_GENERIC_GRAPHS

// Of the recordings of one pool, the first gets memory of its own, and the others that of the first.
struct SharedMemory {
    c10::MempoolId_t id{0, 0};
};

class GenericGraph final : public DeviceGraph {
  public:
    GenericGraph(at::DeviceType type, std::shared_ptr<SharedMemory> memory)
        : graph_(at::create_graph_impl(type)), memory_(std::move(memory)) {}

    void begin() override { graph_->capture_begin(memory_->id, at::GraphCaptureMode::ThreadLocal); }
    void end() override {
        graph_->capture_end();
        memory_->id = graph_->pool();
    }
    void abandon() noexcept override {
        try {
            graph_->capture_end();
        } catch (const std::exception&) {
            // That it cannot be ended is why it is abandoned.
        }
    }
    void replay() override { graph_->replay(); }

  private:
    const std::unique_ptr<at::GraphImplInterface> graph_;
    const std::shared_ptr<SharedMemory> memory_;
};

class GenericPool final : public GraphPool {
  public:
    explicit GenericPool(at::DeviceType type) : type_(type) {}
    std::unique_ptr<DeviceGraph> make() override { return std::make_unique<GenericGraph>(type_, memory_); }

  private:
    const at::DeviceType type_;
    const std::shared_ptr<SharedMemory> memory_ = std::make_shared<SharedMemory>();
};

#endif

}  // namespace

bool register_graph_pools(at::DeviceType type, MakeGraphPool make) { return makers().emplace(type, make).second; }

std::unique_ptr<GraphPool> make_graph_pool(at::DeviceType type) {
    const auto found = makers().find(type);
    if (found != makers().end()) return found->second();
#ifdef PYSERVE_HAS_GENERIC_GRAPHS
    if (at::has_graph_impl(type)) return std::make_unique<GenericPool>(type);
#endif
    return nullptr;
}

}  // namespace pyserve
