"""PyTriton: Triton's C++ HTTP frontend and dynamic batcher in front of Python callables.

https://triton-inference-server.github.io/pytriton/latest/binding_models and .../binding_configuration: `DynamicBatcher`
with a queue delay, and "multi-instance inference", one callable per worker. Asked by Triton's binary tensor extension
over HTTP (docs.nvidia.com, protocol/extension_binary_data), which is its fastest form there: 16 floats as FP32 [1, 16],
which @batch hands over as one array; pictures and texts, whose sizes differ, as one BYTES element, since Triton batches
only tensors of one shape. gRPC and metrics are off, so that they cost nothing.
"""

import os
import signal
import sys

import numpy as np
import torch
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig
from work import Work, setting

KIND = os.environ["WORK_KIND"]


class Instance:
    """One worker."""

    def __init__(self):
        self.work = Work()

    @batch
    def __call__(self, input0):
        if KIND == "floats":
            return [self.work.run(torch.from_numpy(input0)).numpy()]
        answers = self.work.forward([self.work.preprocess(body) for body in input0[:, 0]])
        if KIND == "tokens":
            return [np.stack([np.frombuffer(answer, np.float32) for answer in answers])]
        return [np.array(answers, dtype=object).reshape(-1, 1)]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    config = TritonConfig(
        http_address="127.0.0.1", http_port=setting("PORT"), allow_grpc=False, allow_metrics=False, log_verbose=0
    )
    with Triton(config=config, workspace="pytriton") as triton:
        triton.bind(
            model_name="work",
            infer_func=[Instance() for _ in range(setting("WORKERS"))],
            inputs=[Tensor(name="input0", dtype=np.float32 if KIND == "floats" else object, shape=(-1,))],
            outputs=[Tensor(name="output0", dtype=object if KIND == "picture" else np.float32, shape=(-1,))],
            config=ModelConfig(
                max_batch_size=setting("BATCH"),
                batcher=DynamicBatcher(max_queue_delay_microseconds=1000 * setting("DELAY_MS")),
            ),
            strict=False,
        )
        triton.serve()
