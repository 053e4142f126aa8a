// A network as TorchScript, frozen and, where that was shown to change nothing, in oneDNN's layout.
#pragma once

#include <torch/csrc/jit/api/module.h>

#include <memory>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "file_window.h"
#include "torch_model.h"

namespace pyserve {

class ScriptModel final : public TorchModel {
  public:
    ScriptModel(const ModelOptions& options, const std::vector<at::Tensor>& example,
                const std::vector<std::vector<at::Tensor>>& others);
    // The same file again; `like` has measured what an example is needed for.
    ScriptModel(const ScriptModel& like, bool optimizes);

    c10::IValue run(const std::vector<at::Tensor>& inputs) override;
    c10::IValue run_plain(const std::vector<at::Tensor>& inputs) override;
    void forget_optimization() override;
    uint64_t checksum() const override;
    void settle() override {
        const std::lock_guard lock(plain_mutex_);
        plain_.reset();  // a second copy of the weights
        if (!has_state() && !is_optimized()) file_.reset();
    }

  protected:
    std::shared_ptr<TorchModel> load_again() override;

  private:
    torch::jit::Module read() const;
    void load(const std::vector<at::Tensor>& example);
    void optimize(const std::vector<at::Tensor>& example);
    void measure(const std::vector<at::Tensor>& example);
    void prepare();
    void lower();
    c10::IValue forward(std::vector<c10::IValue> stack);
    c10::IValue forward_copies(const std::vector<at::Tensor>& example);
    c10::IValue own(const c10::IValue& output) const;
    at::Tensor on_device_copy(const at::Tensor& input) const;
    std::shared_ptr<ScriptModel> plain();

    std::vector<std::vector<at::Tensor>> others_;  // to measure with; empty once that is done
    std::shared_ptr<FileWindow> file_;
    torch::jit::Module module_;
    std::unordered_set<const void*> storages_;  // of weights and constants

    // Loaded when it is needed for the first time: few models ever are asked what it is for.
    std::mutex plain_mutex_;
    std::shared_ptr<ScriptModel> plain_;
};

}  // namespace pyserve
