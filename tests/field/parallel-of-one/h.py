class H:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        return ["ok"]
