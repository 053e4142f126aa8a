import torch
from ts.torch_handler.base_handler import BaseHandler


class H(BaseHandler):
    def _load_torchscript_model(self, model_pt_path):
        model = super()._load_torchscript_model(model_pt_path)
        return torch.jit.optimize_for_inference(torch.jit.freeze(model.eval()))

    def preprocess(self, data):
        return torch.tensor([row["body"] for row in data])

    def postprocess(self, data):
        return [[row, self.model.training] for row in data.tolist()]
