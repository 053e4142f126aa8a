import io
import os

import torch

from net import Net


class H:
    def initialize(self, context):
        folder = context.system_properties.get("model_dir")
        self.model = Net()
        path = os.path.join(folder, "state.pth")
        torch.save({"w": torch.tensor([2.0, 3.0])}, path)
        self.model.load_state_dict(torch.load(path, map_location="cpu"))
        self.model.eval()

    def handle(self, data, context):
        with torch.no_grad():
            return [self.model(torch.tensor(row["body"])).tolist() for row in data]
