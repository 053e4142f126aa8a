"""What the comparison serves: TorchScript files with seeded weights, the archives around them, and request bodies."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor, nn

from bench.fitting import fit_head
from pyserve.archive.packing import ArchiverConfig, write_archive
from pyserve.models.sample import write_sample_picture
from pyserve.zoo import DenseNet, ResNet, seed_weights

BOUNDARY = "pyserve-bench"
UPLOAD_TYPE = f"multipart/form-data; boundary={BOUNDARY}"
RAW_TYPE = "application/octet-stream"
JSON_TYPE = "application/json"
TOKENS_MAX = 256
# Of the padded length; the reader of --help and README sees the same numbers.
TOKEN_BUCKETS = (32, 64, 128, 256)
VOCABULARY = 1000
BINARY_HEAD_SIZE = 192  # more than the JSON of any binary request here


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with its residual and its norm (Vaswani et al., 2017)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, features: Tensor, is_token: Tensor) -> Tensor:
        count, length, width = features.shape
        parts = self.inputs(features).view(count, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_token)
        features = self.norm1(features + self.outputs(mixed.transpose(1, 2).reshape(count, length, width)))
        return self.norm2(features + self.narrow(torch.relu(self.wide(features))))


class TextEncoder(nn.Module):
    """A small transformer encoder: token ids int64 [n, length], 0 for no token -> float [n, 64]."""

    def __init__(self, width: int = 256, layers: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(EncoderLayer(width, 4) for _ in range(layers))
        self.head = nn.Linear(width, 64)

    def forward(self, ids: Tensor) -> Tensor:
        is_token = ids != 0
        mask = is_token.unsqueeze(1).unsqueeze(1)
        features = self.embedding(ids)
        for layer in self.layers:
            features = layer(features, mask)
        kept = is_token.unsqueeze(2).to(features.dtype)
        return self.head((features * kept).sum(1) / kept.sum(1))


@dataclass
class Workload:
    """One model and how it is asked.

    Attributes:
        kind: of `peers.work.Work`, or handler.
        model: the TorchScript file, or the handler's.
        bodies: raw request bodies, sent in turn.
        clients: numbers of clients of the closed loop.
        batch_size: the most requests of one batch, on every server.
        archive: for pyserve: key such as ``fp32`` to archive.
    """

    name: str
    kind: str
    model: Path
    bodies: list[bytes]
    clients: tuple[int, ...]
    batch_size: int
    archives: dict[str, Path] = field(default_factory=dict)

    def numbers(self) -> list[list[float]]:
        """The same inputs as lists."""
        dtype = torch.float32 if self.kind == "floats" else torch.int64
        return [torch.frombuffer(bytearray(body), dtype=dtype).tolist() for body in self.bodies]

    def json_bodies(self) -> list[bytes]:
        """The same inputs as LitServe takes numbers."""
        return [json.dumps({"input": each}).encode() for each in self.numbers()]

    def upload_bodies(self, field_name: str = "request") -> list[bytes]:
        """The same pictures as a browser's form sends them."""
        head = (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field_name}"; filename="a.jpg"\r\n'
            "Content-Type: image/jpeg\r\n\r\n"
        ).encode()
        return [head + body + f"\r\n--{BOUNDARY}--\r\n".encode() for body in self.bodies]


def free_model(folder: Path) -> Workload:
    """(a): 16 floats in and out."""
    model = _traced(nn.Identity(), torch.zeros(1, 16), folder / "nothing.pt")
    body = torch.linspace(-1, 1, 16).numpy().tobytes()
    load = Workload("nothing", "floats", model, [body], (1, 8, 64, 512), 64)
    load.archives["fp32"] = _archive(
        load, folder, "tensor", "input: {dtype: float32, shape: [16]}\nbatchSize: 64\nmaxBatchDelay: 0\n"
    )
    return load


def pictures(name: str, folder: Path) -> Workload:
    """(b), (c): resnet18 or densenet161, a JPEG in, the five most probable classes out."""
    network: nn.Module = {"resnet18": lambda: ResNet(18), "densenet161": lambda: DenseNet(161)}[name]()
    seed_weights(network)
    fit_head(network.eval(), test_pictures(folder))
    model = _traced(network, torch.zeros(1, 3, 224, 224), folder / f"{name}.pt")
    picture = write_sample_picture(folder / "picture.jpg").read_bytes()
    load = Workload(name, "picture", model, [picture], (8,), 8)
    load.archives["fp32"] = _archive(load, folder, "image_classifier", "batchSize: 8\nmaxBatchDelay: 0\n")
    load.archives["bf16"] = _archive(
        load, folder, "image_classifier",
        "batchSize: 8\nmaxBatchDelay: 0\nprecision: bf16\nmemoryFormat: channels_last\n", "_bf16",
    )  # fmt: skip
    return load


def tokens(folder: Path, seed: int = 0) -> Workload:
    """(d): 1 to 256 token ids in, most texts short."""
    torch.manual_seed(seed)
    model = folder / "encoder.pt"
    torch.jit.save(torch.jit.script(TextEncoder().eval()), str(model))
    chance = random.Random(seed)
    lengths = [min(TOKENS_MAX, 1 + int(chance.expovariate(1 / 50))) for _ in range(64)]
    bodies = [torch.randint(1, VOCABULARY, (length,)).numpy().tobytes() for length in lengths]
    load = Workload("encoder", "tokens", model, bodies, (64,), 16)
    spec = "batchSize: 16\nmaxBatchDelay: 0\ninput: {dtype: int64, shape: [-1]"
    load.archives["fp32"] = _archive(load, folder, "tensor", f"{spec}, pad_to: {list(TOKEN_BUCKETS)}}}\n")
    load.archives["one length"] = _archive(load, folder, "tensor", f"{spec}, pad_to: [{TOKENS_MAX}]}}\n", "_one_length")
    load.archives["unpadded"] = _archive(load, folder, "tensor", f"{spec}}}\n", "_unpadded")
    return load


HANDLER = """class Handler:
    def initialize(self, context):
        self.context = context

    def handle(self, data, context):
        return ["ok"] * len(data)
"""


def handler(folder: Path) -> Workload:
    """(e): a handler that returns at once, 64 bytes in, one worker: the same archive for pyserve and TorchServe."""
    code = folder / "handler.py"
    code.write_text(HANDLER)
    load = Workload("handler", "handler", code, [b"x" * 64], (1, 64), 1)
    for size in (1, 16):
        config = folder / f"handler{size}.yaml"
        config.write_text(f"batchSize: {size}\nmaxBatchDelay: 10\nminWorkers: 1\nmaxWorkers: 1\n")
        load.archives[f"batch size {size}"] = write_archive(ArchiverConfig(
            model_name=f"handler{size}", version="1.0", handler=str(code), config_file=str(config),
            export_path=str(folder / "store"), force=True,
        ))  # fmt: skip
    return load


MEGABYTE = 1 << 20


def megabyte(folder: Path) -> Workload:
    """(f): a tensor of 1 MB in and out."""
    count = MEGABYTE // 4
    model = _traced(nn.Identity(), torch.zeros(1, count), folder / "megabyte.pt")
    load = Workload("megabyte", "floats", model, [torch.rand(count).numpy().tobytes()], (1, 8), 8)
    load.archives["fp32"] = _archive(
        load, folder, "tensor", f"input: {{dtype: float32, shape: [{count}]}}\nbatchSize: 8\nmaxBatchDelay: 0\n"
    )
    return load


def binary_requests(load: Workload, datatype: str) -> tuple[list[bytes], int]:
    """Its bodies as requests of the Open Inference Protocol with a binary tensor, and the size of their JSON.

    The size is the same for all, filled up with blanks, so that one header suits them. ``datatype`` BYTES sends a body
    as one element, as a picture or a text of any length has to be for the server to batch it.
    """
    bodies = []
    for body in load.bodies:
        tensor = len(body).to_bytes(4, "little") + body if datatype == "BYTES" else body
        head = json.dumps({
            "inputs": [{"name": "input0", "datatype": datatype, "parameters": {"binary_data_size": len(tensor)},
                        "shape": [1, 1 if datatype == "BYTES" else len(body) // 4]}],
            "parameters": {"binary_data_output": True},
        }).encode()  # fmt: skip
        bodies.append(head.ljust(BINARY_HEAD_SIZE) + tensor)
    return bodies, BINARY_HEAD_SIZE


def test_pictures(folder: Path) -> list[bytes]:
    """The sample picture as it is, mirrored, turned, cropped, darker, lighter and grey."""
    picture = Image.open(write_sample_picture(folder / "picture.jpg")).convert("RGB")
    width, height = picture.size
    variants = [
        picture, ImageOps.mirror(picture), ImageOps.flip(picture), picture.rotate(90, expand=True),
        picture.crop((0, 0, width // 2, height // 2)), picture.crop((width // 3, height // 3, width, height)),
        ImageEnhance.Brightness(picture).enhance(0.5), ImageEnhance.Brightness(picture).enhance(1.5),
        ImageOps.grayscale(picture).convert("RGB"), ImageOps.invert(picture),
    ]  # fmt: skip
    bodies = []
    for each in variants:
        file = io.BytesIO()
        each.save(file, "JPEG", quality=92)
        bodies.append(file.getvalue())
    return bodies


WORKLOADS: dict[str, Callable[[Path], Workload]] = {
    "nothing": free_model,
    "resnet18": lambda folder: pictures("resnet18", folder),
    "densenet161": lambda folder: pictures("densenet161", folder),
    "encoder": tokens,
    "handler": handler,
    "megabyte": megabyte,
}


def _traced(network: nn.Module, example: Tensor, path: Path) -> Path:
    with torch.inference_mode():
        torch.jit.save(torch.jit.trace(network.eval(), example), str(path))
    return path


def _archive(load: Workload, folder: Path, handler: str, yaml: str, suffix: str = "") -> Path:
    config = folder / f"{load.name}{suffix}.yaml"
    config.write_text(yaml)
    return write_archive(ArchiverConfig(
        model_name=f"{load.name}{suffix}", version="1.0", handler=handler, serialized_file=str(load.model),
        config_file=str(config), export_path=str(folder / "store"), force=True,
    ))  # fmt: skip
