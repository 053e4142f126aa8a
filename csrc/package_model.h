// A network that AOTInductor compiled ahead of time, as a .pt2 package.
#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <memory>
#include <string>
#include <vector>

#include "torch_model.h"

namespace pyserve {

class PackageModel final : public TorchModel {
  public:
    explicit PackageModel(const ModelOptions& options);

    c10::IValue run(const std::vector<at::Tensor>& inputs) override;
    std::vector<std::string> call_spec() const override { return loader_->get_call_spec(); }

  protected:
    std::shared_ptr<TorchModel> load_again(at::Device device) override;

  private:
    std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader_;
};

}  // namespace pyserve
