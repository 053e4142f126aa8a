import os

import torch


class H:
    def initialize(self, ctx):
        self.manifest = ctx.manifest
        properties = ctx.system_properties
        model_dir = properties.get("model_dir")
        self.device = torch.device("cuda:" + str(properties.get("gpu_id")) if torch.cuda.is_available() and properties.get("gpu_id") is not None else "cpu")
        serialized_file = self.manifest["model"]["serializedFile"]
        self.model = torch.jit.load(os.path.join(model_dir, serialized_file), map_location=self.device)
        self.batch = properties.get("batch_size")

    def handle(self, data, ctx):
        return [{"out": self.model(torch.tensor([row["body"]])).tolist(), "batch": self.batch, "gpu": ctx.system_properties.get("gpu_id")} for row in data]
