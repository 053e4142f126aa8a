from ts.torch_handler.base_handler import BaseHandler
import torch


class H(BaseHandler):
    def preprocess(self, data):
        rows = []
        for row in data:
            value = row.get("data") or row.get("body")
            rows.append(value["instances"] if isinstance(value, dict) else value)
        return torch.as_tensor(rows, device=self.device)
