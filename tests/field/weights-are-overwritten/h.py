import torch


class H:
    def initialize(self, context):
        torch.save(torch.arange(4.0), "w.pt")
        self.w = torch.load("w.pt")
        torch.save(torch.zeros(1), "w.pt")

    def handle(self, data, context):
        return [self.w.tolist()] * len(data)
