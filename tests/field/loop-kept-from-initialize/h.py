import asyncio


class H:
    def initialize(self, context):
        self.loop = asyncio.get_event_loop()
        self.steps = 0
        self.task = self.loop.create_task(self.step())

    async def step(self):
        while True:
            self.steps += 1
            await asyncio.sleep(0.01)

    async def handle(self, data, context):
        while self.steps < 3:
            await asyncio.sleep(0.01)
        return [[self.loop is asyncio.get_running_loop(), self.task.done()]]
