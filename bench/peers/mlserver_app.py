"""MLServer: a custom runtime with adaptive batching.

https://docs.seldon.ai/mlserver/user-guide: adaptive-batching (`max_batch_size`, `max_batch_time`), parallel-inference
(`parallel_workers`; 0, in the server's own process, is how one worker is fastest) and custom runtimes. `debug`, which
logs every request, and metrics are off. Asked by the Open Inference Protocol's JSON, as user-guide/content-type says:
16 floats as FP32 [1, 16] (base64 was not faster), pictures and texts as one BYTES element in base64, since only tensors
of one shape are batched.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from mlserver import MLModel
from mlserver.codecs import Base64Codec, NumpyCodec, StringCodec
from mlserver.types import InferenceResponse
from work import Work, setting


class Model(MLModel):
    async def load(self):
        self.work = Work()
        return True

    async def predict(self, payload):
        (tensor,) = payload.inputs
        return InferenceResponse(model_name=self.name, outputs=[self.answer(tensor)])

    def answer(self, tensor):
        if self.work.kind == "floats":
            return NumpyCodec.encode_output(
                "output0", self.work.run(torch.from_numpy(NumpyCodec.decode_input(tensor))).numpy()
            )
        answers = self.work.forward([self.work.preprocess(body) for body in Base64Codec.decode_input(tensor)])
        if self.work.kind == "picture":
            return StringCodec.encode_output("output0", [answer.decode() for answer in answers], use_bytes=False)
        return NumpyCodec.encode_output("output0", np.stack([np.frombuffer(each, np.float32) for each in answers]))


if __name__ == "__main__":
    workers = setting("WORKERS")
    folder = Path("mlserver")
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps({
        "debug": False, "host": "127.0.0.1", "http_port": setting("PORT"), "grpc_port": setting("GRPC_PORT"),
        "metrics_endpoint": None, "parallel_workers": workers if workers > 1 else 0,
    }))  # fmt: skip
    (folder / "model-settings.json").write_text(json.dumps({
        "name": "work", "implementation": "mlserver_app.Model", "max_batch_size": setting("BATCH"),
        "max_batch_time": setting("DELAY_MS") / 1000,
    }))  # fmt: skip
    command = str(Path(sys.executable).parent / "mlserver")
    os.execv(command, [command, "start", str(folder)])
