"""What every server of the comparison does for a request, the same for all: no server's own code is in here.

The model is one TorchScript file; pictures are prepared with Pillow as pyserve's image_classifier does. Settings come
from the environment, so that a peer's file shows nothing but how that peer is used:

    WORK_KIND     floats, picture or tokens
    WORK_MODEL    the TorchScript file
    WORK_THREADS  intra-op threads of each worker
    WORK_WORKERS, WORK_BATCH, WORK_DELAY_MS, WORK_PORT   for the peers' own settings
"""

import io
import json
import os

import numpy as np
import torch
from PIL import Image

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def setting(name, default=0):
    return int(os.environ.get(f"WORK_{name}", default))


class Work:
    """Bytes -> tensor -> model -> bytes."""

    def __init__(self) -> None:
        self.kind = os.environ["WORK_KIND"]
        torch.set_num_threads(setting("THREADS", 1))
        self.model = torch.jit.freeze(torch.jit.load(os.environ["WORK_MODEL"]).eval())

    def preprocess(self, body):
        """One request's body -> one item."""
        if self.kind == "floats":
            return torch.frombuffer(bytearray(body), dtype=torch.float32)
        if self.kind == "tokens":
            return torch.frombuffer(bytearray(body), dtype=torch.int64)
        picture = Image.open(io.BytesIO(body)).convert("RGB")
        width, height = picture.size
        short = min(width, height)
        picture = picture.resize((256 * width // short, 256 * height // short), Image.Resampling.BILINEAR)
        left, top = round((picture.width - 224) / 2), round((picture.height - 224) / 2)
        pixels = np.asarray(picture.crop((left, top, left + 224, top + 224)), dtype=np.float32)
        return (torch.from_numpy(pixels / 255).permute(2, 0, 1) - MEAN) / STD

    def forward(self, items):
        """Items of a batch -> one answer each."""
        if self.kind == "tokens":  # padded to the longest; 0 is no token
            return self.postprocess(self.run(torch.nn.utils.rnn.pad_sequence(list(items), batch_first=True)))
        return self.postprocess(self.run(torch.stack(list(items))))

    def run(self, batch):
        """The model, for a server that makes the batch's tensor by itself."""
        with torch.inference_mode():
            return self.model(batch)

    def postprocess(self, output):
        if self.kind != "picture":
            return [row.numpy().tobytes() for row in output]
        values, classes = torch.softmax(output, 1).topk(5)
        return [
            json.dumps({str(label): value for label, value in zip(labels, row, strict=True)}).encode()
            for labels, row in zip(classes.tolist(), values.tolist(), strict=True)
        ]
