class H:
    ready = False

    async def initialize(self, context):
        self.ready = True

    async def handle(self, data, context):
        return [str(self.ready)] * len(data)
