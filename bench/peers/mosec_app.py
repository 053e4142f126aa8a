"""mosec: one stage with batching on, bytes in and out; another stage for preprocessing would be another hop.

https://mosecorg.github.io/mosec: Server.append_worker(num, max_batch_size, max_wait_time in ms).
"""

from mosec import Server, Worker
from work import Work, setting


class Model(Worker):
    """Bytes in, bytes out, as they are on the wire."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def deserialize(self, data):
        return bytes(data)

    def serialize(self, data):
        return data

    def forward(self, data):
        if not isinstance(data, list):
            return self.work.forward([self.work.preprocess(data)])[0]
        return self.work.forward([self.work.preprocess(each) for each in data])


if __name__ == "__main__":
    server = Server()
    server.append_worker(
        Model, num=setting("WORKERS"), max_batch_size=setting("BATCH"), max_wait_time=setting("DELAY_MS"), timeout=120
    )
    server.run()
