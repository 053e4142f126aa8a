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

from bench.encoders import BERT_POSITIONS, BERT_VOCABULARY, VOCABULARY, BertEncoder, TextEncoder
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
BATCH_SIZE_MAX = 64  # that engines are made for
BERT_LENGTHS = (16, 256)
BERT_BODIES = 32  # every length is met in the warm-up of each engine and split
BINARY_HEAD_SIZE = 192  # more than the JSON of any binary request here


# How the requests of one connection differ from one another. A load generator's own are all the same.
SAME, HEADS, BODIES = "", "varied heads", "varied heads and bodies"
VARIED_COUNT = 4096


def varied_headers(count: int = VARIED_COUNT, seed: int = 0) -> list[dict[str, str]]:
    """What real clients send anew each time: a request's id, its trace, cookies of any length."""
    chance = random.Random(seed)

    def text(size: int) -> str:
        return f"{chance.getrandbits(4 * size):0{size}x}"

    return [
        {
            "X-Request-Id": f"{text(8)}-{text(4)}-{text(4)}-{text(4)}-{text(12)}",
            "Traceparent": f"00-{text(32)}-{text(16)}-01",
            "Cookie": f"session={text(chance.randrange(16, 64))}; seen={text(chance.randrange(8, 128))}",
        }
        for _ in range(count)
    ]


@dataclass
class Workload:
    """One model and how it is asked.

    Attributes:
        kind: of `peers.work.Work`, or handler.
        model: the TorchScript file, or the handler's.
        bodies: raw request bodies, sent in turn.
        clients: numbers of clients of the closed loop.
        batch_size: the most requests of one batch, on every server.
        archives: for pyserve: key such as ``fp32`` to archive.
        network: what engines are called with directly; None if they are not measured.
        example: an input of it, of two items.
        free: its free dimensions and the smallest and largest size of each.
        precisions: that engines are called directly in, and archives are compared in.
        samples: bodies that int8 is calibrated with.
    """

    name: str
    kind: str
    model: Path
    bodies: list[bytes]
    clients: tuple[int, ...]
    batch_size: int
    archives: dict[str, Path] = field(default_factory=dict)
    network: nn.Module | None = None
    example: Tensor | None = None
    free: dict[int, tuple[int, int]] = field(default_factory=dict)
    precisions: tuple[str, ...] = ("fp32",)
    samples: list[bytes] = field(default_factory=list)

    def program(self) -> Path:
        """Its network by ``torch.export.save``, made when it is first asked for; one that is compared has one."""
        assert self.network is not None and self.example is not None
        file = self.model.with_suffix(".program.pt2")
        if not file.exists():
            sizes = {
                index: torch.export.Dim(f"size_{index}", min=low, max=high) for index, (low, high) in self.free.items()
            }
            with torch.no_grad():
                exported = torch.export.export(self.network.eval(), (self.example,), dynamic_shapes=(sizes,))
            torch.export.save(exported, str(file))
        return file

    def varied_bodies(self, as_json: bool, count: int = VARIED_COUNT, seed: int = 0) -> list[bytes]:
        """Floats at random, as many as in a body; as JSON they are of different sizes, too."""
        chance, size = random.Random(seed), len(self.bodies[0]) // 4
        rows = torch.tensor([[chance.uniform(-1, 1) for _ in range(size)] for _ in range(count)])
        if as_json:
            return [json.dumps([round(each, chance.randrange(1, 7)) for each in row]).encode() for row in rows.tolist()]
        return [row.numpy().tobytes() for row in rows]

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


AUTO = "backend: auto\n"
# Of pictures' archives: key to further lines of model-config.yaml.
PICTURE_SETTINGS = {
    "fp32": AUTO,
    "torchscript": "backend: torchscript\n",  # as it was before there were other backends
    "bf16": f"precision: bf16\n{AUTO}",
    "int8": f"precision: int8\n{AUTO}",
}
BACKENDS = ("torchscript", "aotinductor", "openvino")
NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet18": lambda: ResNet(18), "densenet161": lambda: DenseNet(161)}


def pictures(name: str, folder: Path, precisions: tuple[str, ...] = ("fp32", "bf16", "int8")) -> Workload:
    """(b), (c): resnet18 or densenet161, a JPEG in, the five most probable classes out.

    Without bf16 where the CPU has no instructions for it: torch would take seconds for a picture.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        precisions = tuple(each for each in precisions if each != "bf16")
    network = NETWORKS[name]()
    seed_weights(network)
    fit_head(network.eval(), test_pictures(folder))
    model = _traced(network, torch.zeros(1, 3, 224, 224), folder / f"{name}.pt")
    picture = write_sample_picture(folder / "picture.jpg").read_bytes()
    load = Workload(
        name, "picture", model, [picture], (8,), 8, network=network, example=torch.rand(2, 3, 224, 224),
        free={0: (1, BATCH_SIZE_MAX)}, precisions=precisions, samples=calibration_pictures(folder),
    )  # fmt: skip
    calibration = folder / "calibration"
    calibration.mkdir(exist_ok=True)
    for number, body in enumerate(load.samples):
        (calibration / f"{number:03}.jpg").write_bytes(body)
    for key, lines in PICTURE_SETTINGS.items():
        if key in ("fp32", "torchscript", *precisions):
            load.archives[key] = _archive(
                load, folder, "image_classifier", f"batchSize: 8\nmaxBatchDelay: 0\n{lines}",
                "" if key == "fp32" else f"_{key}", calibration=str(calibration) if key == "int8" else None,
            )  # fmt: skip
    return load


def backend_archives(load: Workload, folder: Path) -> dict[str, Path]:
    """A picture's archive for each backend that is named, by its name."""
    return {
        name: _archive(
            load, folder, "image_classifier", f"batchSize: 8\nmaxBatchDelay: 0\nbackend: {name}\n", f"_{name}"
        )
        for name in BACKENDS
    }  # fmt: skip


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


def bert(folder: Path, seed: int = 0, layers: int = 12, width: int = 384) -> Workload:
    """(g): an encoder of BERT's form, 16 to 256 token ids in."""
    torch.manual_seed(seed)
    network = BertEncoder(width, layers).eval()
    model = folder / "bert.pt"
    torch.jit.save(torch.jit.script(network), str(model))
    chance = random.Random(seed)
    lengths = [chance.randint(*BERT_LENGTHS) for _ in range(BERT_BODIES)]
    bodies = [torch.randint(1, BERT_VOCABULARY, (length,)).numpy().tobytes() for length in lengths]
    load = Workload(
        "bert", "tokens", model, bodies, (8,), 8, network=network,
        example=torch.randint(1, BERT_VOCABULARY, (2, 24)), free={0: (1, BATCH_SIZE_MAX), 1: (2, BERT_POSITIONS)},
    )  # fmt: skip
    spec, padded = (
        f"input: {{dtype: int64, shape: [2..{longest}], vocabulary: {BERT_VOCABULARY}"
        for longest in (BERT_POSITIONS, TOKENS_MAX)
    )
    lines = "batchSize: 8\nmaxBatchDelay: 0\n"
    load.archives["fp32"] = _archive(load, folder, "tensor", f"{lines}{spec}}}\n{AUTO}")
    load.archives["torchscript"] = _archive(
        load, folder, "tensor", f"{lines}{spec}}}\n{PICTURE_SETTINGS['torchscript']}", "_torchscript"
    )
    load.archives["padded"] = _archive(
        load, folder, "tensor", f"{lines}{padded}, pad_to: {list(TOKEN_BUCKETS)}}}\n{AUTO}", "_padded"
    )
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


def calibration_pictures(folder: Path) -> list[bytes]:
    """The test pictures, and each of them mirrored and somewhat darker."""
    bodies = test_pictures(folder)
    for body in list(bodies):
        picture = Image.open(io.BytesIO(body))
        for each in (ImageOps.mirror(picture), ImageEnhance.Brightness(picture).enhance(0.8)):
            file = io.BytesIO()
            each.save(file, "JPEG", quality=92)
            bodies.append(file.getvalue())
    return bodies


WORKLOADS: dict[str, Callable[[Path], Workload]] = {
    "nothing": free_model,
    "resnet18": lambda folder: pictures("resnet18", folder),
    "densenet161": lambda folder: pictures("densenet161", folder, ("fp32", "bf16")),
    "encoder": tokens,
    "bert": bert,
    "handler": handler,
    "megabyte": megabyte,
}


def _traced(network: nn.Module, example: Tensor, path: Path) -> Path:
    with torch.inference_mode():
        torch.jit.save(torch.jit.trace(network.eval(), example), str(path))
    return path


def _archive(
    load: Workload, folder: Path, handler: str, yaml: str, suffix: str = "", *, calibration: str | None = None
) -> Path:
    config = folder / f"{load.name}{suffix}.yaml"
    config.write_text(yaml)
    return write_archive(ArchiverConfig(
        model_name=f"{load.name}{suffix}", version="1.0", handler=handler, serialized_file=str(load.model),
        config_file=str(config), export_path=str(folder / "store"), force=True, calibration=calibration,
    ))  # fmt: skip
