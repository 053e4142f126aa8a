// A network as TorchScript, frozen and, where that was shown to change nothing, in oneDNN's layout.
#pragma once

#include <torch/csrc/jit/api/module.h>

#include <memory>
#include <mutex>
#include <optional>
#include <unordered_set>
#include <vector>

#include "file_window.h"
#include "torch_model.h"

namespace pyserve {

class ScriptModel final : public TorchModel {
  public:
    ScriptModel(const ModelOptions& options, const std::vector<at::Tensor>& example,
                const std::vector<std::vector<at::Tensor>>& others);
    // From a file that is open, as the plain one beside another backend. Without an example nothing is measured.
    ScriptModel(const ModelOptions& options, std::shared_ptr<FileWindow> file,
                const std::vector<at::Tensor>& example = {}, const std::vector<std::vector<at::Tensor>>& others = {});
    // The same file again, on `device`; `like` has measured what an example is needed for.
    ScriptModel(const ScriptModel& like, at::Device device, bool optimizes);

    c10::IValue run(const std::vector<at::Tensor>& inputs) override;
    c10::IValue run_plain(const std::vector<at::Tensor>& inputs) override;
    void forget_optimization() override;
    uint64_t checksum() const override;
    // What may make NaN of ordinary numbers where a kernel could hide it; "" for nothing. See finite_flow.h.
    std::string may_hide_nan() const;
    void settle() override {
        const std::lock_guard lock(plain_mutex_);
        plain_.reset();  // a second copy of the weights
        // On an accelerator it may be wanted on another one too.
        if (!has_state() && !is_optimized() && device().is_cpu()) file_.reset();
    }

  protected:
    std::shared_ptr<TorchModel> load_again(at::Device device) override;

  private:
    torch::jit::Module read() const;
    torch::jit::Module read_for(at::Device device, bool renames) const;
    void read_again();
    bool choose_devices(const std::vector<at::Tensor>& example);
    bool answers_as_on_the_cpu(const std::vector<at::Tensor>& example);
    void load(const std::vector<at::Tensor>& example);
    void optimize(const std::vector<at::Tensor>& example);
    void measure(const std::vector<at::Tensor>& example);
    bool convolves() const;
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
    bool renames_devices_ = false;              // the devices that its code names become the one that it is on
    std::optional<at::Device> copied_from_;     // only this one does: it is a copy of a model that was tried there
    std::unordered_set<const void*> storages_;  // of weights and constants

    // Loaded when it is needed for the first time: few models ever are asked what it is for.
    std::mutex plain_mutex_;
    std::shared_ptr<ScriptModel> plain_;
};

}  // namespace pyserve
