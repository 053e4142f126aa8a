"""BentoML: one batchable API, `workers` processes behind one port.

https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html: `batchable` and `max_batch_size`; its window
adapts by itself, and `max_latency_ms`, past which it answers 503, keeps its default.
.../reference/bentoml/configurations.html: `workers`; access log and metrics are off. uvloop and httptools are
installed, which uvicorn takes by itself (half as many requests/s again). Asked as
.../build-with-bentoml/iotypes.html says: tensors as JSON numbers (base64 in a JSON string was not faster), pictures as
a file upload (faster than base64), texts as JSON lists of numbers, which cost little beside the model.
"""

import json
import os
import sys
from pathlib import Path

import bentoml
import numpy as np
import torch
from work import Work, setting

INPUTS, OUTPUTS = {
    "floats": (np.ndarray, np.ndarray),
    "picture": (list[Path], list[dict[str, float]]),
    "tokens": (list[list[int]], np.ndarray),
}[os.environ["WORK_KIND"]]


@bentoml.service(
    workers=setting("WORKERS"),
    traffic={"timeout": 120, "max_concurrency": setting("QUEUE")},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Model:
    def __init__(self):
        self.work = Work()

    @bentoml.api(batchable=True, max_batch_size=setting("BATCH"))
    def predict(self, inputs: INPUTS) -> OUTPUTS:
        if self.work.kind == "floats":
            return self.work.run(torch.from_numpy(inputs.astype(np.float32, copy=False))).numpy()
        if self.work.kind == "picture":
            return [json.loads(answer) for answer in self.answers([path.read_bytes() for path in inputs])]
        return np.stack([np.frombuffer(answer, np.float32) for answer in self.answers(map(token_bytes, inputs))])

    def answers(self, bodies):
        return self.work.forward([self.work.preprocess(body) for body in bodies])


def token_bytes(ids):
    return np.array(ids, np.int64).tobytes()


if __name__ == "__main__":
    os.environ.update(BENTOML_HOME=str(Path("bentoml").absolute()), BENTOML_DO_NOT_TRACK="True")
    command = str(Path(sys.executable).parent / "bentoml")
    os.execv(command, [command, "serve", "bentoml_app:Model", "--host", "127.0.0.1", "--port", str(setting("PORT"))])
