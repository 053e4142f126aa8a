// A recording of what one call launches on an accelerator, to be launched again as a whole.
//
// torch has an interface for it that names no kind of device (ATen/core/GraphImplInterface.h, from 2.13 on). Where torch
// has none, or none for the device, it can be registered here: graph_cuda.cpp does that for CUDA.
#pragma once

#include <memory>

#include "tensors.h"

namespace pyserve {

class DeviceGraph {
  public:
    virtual ~DeviceGraph() = default;
    DeviceGraph(const DeviceGraph&) = delete;
    DeviceGraph& operator=(const DeviceGraph&) = delete;

    // From here on what the calling thread gives its current stream is recorded and does not run. What other threads do
    // meanwhile does no harm.
    virtual void begin() = 0;
    // Throws if something could not be recorded; `abandon` then.
    virtual void end() = 0;
    // Of a recording that failed: the stream runs again what it is given.
    virtual void abandon() noexcept = 0;
    // On the current stream. REQUIRES: end() has returned.
    virtual void replay() = 0;

  protected:
    DeviceGraph() = default;
};

// Graphs that share their memory: at any time one of them runs, and what it gave is copied before the next.
class GraphPool {
  public:
    virtual ~GraphPool() = default;
    GraphPool(const GraphPool&) = delete;
    GraphPool& operator=(const GraphPool&) = delete;

    virtual std::unique_ptr<DeviceGraph> make() = 0;

  protected:
    GraphPool() = default;
};

using MakeGraphPool = std::unique_ptr<GraphPool> (*)();

// What makes the pools of a kind of device; goes before torch's own. Before the first model is loaded.
bool register_graph_pools(at::DeviceType type, MakeGraphPool make);

// nullptr where the device has no graphs, or this torch none for it. A pool is used by one thread.
std::unique_ptr<GraphPool> make_graph_pool(at::DeviceType type);

}  // namespace pyserve
