import torch

from ts.torch_handler.base_handler import BaseHandler


class H(BaseHandler):
    def initialize(self, context):
        super().initialize(context)
        self.seen = sorted(name for name in ("manifest", "map_location", "device", "model", "mapping", "initialized", "explain", "target", "context", "model_pt_path") if hasattr(self, name))

    def preprocess(self, data):
        return torch.tensor([row["body"] for row in data])

    def postprocess(self, data):
        return [{"out": row, "seen": self.seen, "map_location": self.map_location, "initialized": self.initialized} for row in data.tolist()]
