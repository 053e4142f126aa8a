// CUDA's graphs, and ROCm's, which have the same names. setup.py compiles this file only where torch was built for them
// and their headers are found; it needs no nvcc.
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>

#include <exception>

#include "device_graph.h"

namespace pyserve {
namespace {

class CudaGraph final : public DeviceGraph {
  public:
    explicit CudaGraph(c10::MempoolId_t memory) : memory_(memory) {}

    void begin() override {
        device_ = c10::cuda::current_device();
        graph_.capture_begin(memory_, cudaStreamCaptureModeThreadLocal);
    }
    void end() override { graph_.capture_end(); }
    void abandon() noexcept override {
        try {
            graph_.capture_end();
            return;
        } catch (const std::exception&) {
            // Has ended the recording, but raised before it told the allocator.
        }
        try {
            c10::cuda::CUDACachingAllocator::endAllocateToPool(device_, memory_);
            c10::cuda::CUDACachingAllocator::releasePool(device_, memory_);
        } catch (const std::exception&) {
            // It had been told.
        }
    }
    void replay() override { graph_.replay(); }

  private:
    const c10::MempoolId_t memory_;
    c10::DeviceIndex device_ = 0;
    at::cuda::CUDAGraph graph_;
};

class CudaPool final : public GraphPool {
  public:
    std::unique_ptr<DeviceGraph> make() override { return std::make_unique<CudaGraph>(memory_); }

  private:
    const c10::MempoolId_t memory_ = at::cuda::graph_pool_handle();
};

[[maybe_unused]] const bool is_registered =
    register_graph_pools(at::kCUDA, []() -> std::unique_ptr<GraphPool> { return std::make_unique<CudaPool>(); });

}  // namespace
}  // namespace pyserve
