"""LitServe: batching on, uvicorn's API server in a process of its own, pictures as a file upload, numbers as JSON.

https://lightning.ai/docs/litserve: max_batch_size, batch_timeout, workers_per_device, fast_queue.
"""

import os

import litserve as ls
import numpy as np
import torch
from fastapi import Response, UploadFile
from work import Work, setting

IS_UPLOAD = os.environ["WORK_KIND"] == "picture"


class Api(ls.LitAPI):
    def setup(self, device):
        self.work = Work()

    def predict(self, items):
        if not isinstance(items, list):  # without batching there is one
            return self.work.forward([items])[0]
        return self.work.forward(items)


class UploadApi(Api):
    def decode_request(self, request: UploadFile):
        return self.work.preprocess(request.file.read())

    def encode_response(self, output):
        return Response(output, media_type="application/json")


class JsonApi(Api):
    def decode_request(self, request):
        kind = torch.float32 if self.work.kind == "floats" else torch.int64
        return torch.tensor(request["input"], dtype=kind)

    def encode_response(self, output):
        return {"output": np.frombuffer(output, np.float32).tolist()}

    def unbatch(self, output):
        return output

    def batch(self, inputs):
        return inputs


class UploadBatchApi(UploadApi):
    batch = JsonApi.batch
    unbatch = JsonApi.unbatch


if __name__ == "__main__":
    api = (UploadBatchApi if IS_UPLOAD else JsonApi)(
        max_batch_size=setting("BATCH"), batch_timeout=setting("DELAY_MS") / 1000
    )
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=setting("WORKERS"), timeout=120, fast_queue=True)
    server.run(host="127.0.0.1", port=setting("PORT"), log_level="warning", generate_client_file=False)
