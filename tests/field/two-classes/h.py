class Config:
    x = 1


class Handler:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return ["ok"] * len(data)
