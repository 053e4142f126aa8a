// A network on a quicker backend than TorchScript, and beside it the same as plain TorchScript, which is read when it is
// first needed. What the quick one was not shown to answer alike goes to the plain one, so that its answers and errors
// there are what they would be without the quick one:
//   inputs of other types and sizes than were tried, and larger batches than the program was compiled for,
//   floats that are not ordinary (magnitude.h), whole numbers outside the given ranges,
//   whatever the quick one raises for, and answers of its that are not finite.
// Answers come in the structure that TorchScript gives them: the others know only a row of tensors.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "file_window.h"
#include "script_model.h"
#include "torch_model.h"

namespace pyserve {

class CheckedModel final : public TorchModel {
  public:
    // REQUIRES: options.plain.path is not empty. Throws std::exception: one of the two cannot be loaded or does not take
    // the example, or the quick one cannot be believed.
    CheckedModel(const ModelOptions& options, const std::vector<at::Tensor>& example,
                 const std::vector<std::vector<at::Tensor>>& others);

    c10::IValue run(const std::vector<at::Tensor>& inputs) override;
    c10::IValue run_plain(const std::vector<at::Tensor>& inputs) override { return plain()->run(inputs); }
    void use_threads(int count, int workers) override { quick_->use_threads(count, workers); }
    void prepare_threads(int count, int workers) override { quick_->prepare_threads(count, workers); }
    std::pair<int, int> streams_and_threads() const override { return quick_->streams_and_threads(); }
    int64_t plain_runs() const override { return plain_runs_.load(std::memory_order_relaxed); }
    void settle() override;

  protected:
    std::shared_ptr<TorchModel> load_again(at::Device device) override;

  private:
    bool was_tried(const std::vector<at::Tensor>& inputs) const;
    c10::IValue in_structure(const std::vector<at::Tensor>& outputs) const;
    c10::IValue run_instead(const std::vector<at::Tensor>& inputs);
    std::shared_ptr<ScriptModel> plain();

    const std::shared_ptr<FileWindow> file_;  // of the plain one
    std::vector<InputRule> rules_;
    std::shared_ptr<TorchModel> quick_;
    c10::IValue structure_;        // an answer of the plain one, its tensors without memory
    size_t outputs_ = 0;           // tensors in it
    bool shares_outputs_ = false;  // they are the quick one's own memory
    std::atomic<int64_t> plain_runs_{0};
    std::mutex plain_mutex_;
    std::shared_ptr<ScriptModel> plain_;
};

}  // namespace pyserve
