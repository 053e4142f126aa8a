class H:
    def __init__(self):
        self.calls = 0
        self.initialized = 0

    def initialize(self, context):
        self.initialized += 1

    def handle(self, data, context):
        self.calls += 1
        return [f"{self.initialized} {self.calls}"] * len(data)
