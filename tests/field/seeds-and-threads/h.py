import torch


class H:
    def initialize(self, context):
        torch.manual_seed(5)
        torch.set_num_threads(1)
        torch.set_grad_enabled(True)

    def handle(self, data, context):
        x = torch.ones(2, requires_grad=True)
        (x * 3).sum().backward()
        return [{"draw": round(torch.rand(1).item(), 6), "threads": torch.get_num_threads(), "grad": x.grad.tolist()}] * len(data)
