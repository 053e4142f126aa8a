"""TorchServe: a handler class as its documentation shows; batch size and delay stand in model-config.yaml."""

from work import Work


class Handler:
    def initialize(self, context):
        self.work = Work()

    def handle(self, data, context):
        items = [self.work.preprocess(row.get("data") or row.get("body")) for row in data]
        return self.work.forward(items)
