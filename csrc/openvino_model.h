// A network that OpenVINO's CPU plugin runs: an .xml file with its .bin beside it.
//
// One compiled model holds the weights once and computes as many batches at a time as it has streams, each in a thread of
// OpenVINO's with helpers of its own; workers wait for theirs. Both numbers are compiled in. They follow the workers, of
// which others may come and whose threads become fewer when there are other models: that is compiled beside the
// requests, which the one that is there continues to answer.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "torch_model.h"

namespace pyserve {

class OpenVinoModel final : public TorchModel {
  public:
    // `options.library` is the path of OpenVINO's C library. Throws std::exception with OpenVINO's words: it cannot be
    // loaded, or the file cannot be used.
    OpenVinoModel(const ModelOptions& options, const std::vector<at::Tensor>& example);
    ~OpenVinoModel() override;

    // The outputs in their order: a tensor, or a tuple of several. Inputs have the types that the file names.
    c10::IValue run(const std::vector<at::Tensor>& inputs) override;
    void use_threads(int count, int workers) override;
    void prepare_threads(int count, int workers) override;
    std::pair<int, int> streams_and_threads() const override;

  protected:
    std::shared_ptr<TorchModel> load_again(at::Device device) override;

  private:
    class Compiled;
    struct Shared;

    const std::shared_ptr<Shared> shared_;  // with what is compiled beside the requests
};

}  // namespace pyserve
