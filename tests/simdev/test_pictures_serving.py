"""A whole server with pictures on an accelerator: every way to send one, answered as the same model on the CPU does."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
import torch

from tests.simdev.serving import give_device
from tests.simdev.test_pictures_lane import Classes, Segments, close
from tests.support.pictures import picture_files
from tests.support.serving import Server
from tests.support.serving_models import write_torchscript

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = [pytest.mark.server, pytest.mark.accelerator]

MODELS = {"classes": (Classes(), "image_classifier"), "segments": (Segments(), "image_segmenter")}


def requests() -> list[tuple[str, bytes, dict[str, str]]]:
    """Path, body and headers, with NAME where the model's name goes."""
    files = list(picture_files())
    made = [("/predictions/NAME", file, {"Content-Type": "image/png"}) for file in files[::4]]
    as_text = json.dumps(base64.b64encode(files[1]).decode()).encode()
    made.append(("/predictions/NAME", as_text, {"Content-Type": "application/json"}))
    numbers = torch.randn((2, 3, 224, 224), generator=torch.Generator().manual_seed(1))
    raw = numbers.numpy().tobytes()
    head = json.dumps({"inputs": [{"name": "x", "shape": [2, 3, 224, 224], "datatype": "FP32",
                                   "parameters": {"binary_data_size": len(raw)}}]}).encode()  # fmt: skip
    made.append(("/v2/models/NAME/infer", head + raw, {"Inference-Header-Content-Length": str(len(head))}))
    texts = b"".join(struct.pack("<I", len(file)) + file for file in files[:2])
    head = json.dumps({"inputs": [{"name": "x", "shape": [2], "datatype": "BYTES",
                                   "parameters": {"binary_data_size": len(texts)}}]}).encode()  # fmt: skip
    made.append(("/v2/models/NAME/infer", head + texts, {"Inference-Header-Content-Length": str(len(head))}))
    return made


def answer(server: Server, name: str, path: str, body: bytes, headers: dict[str, str]) -> Any:
    response = server.ask("POST", path.replace("NAME", name), body, headers)
    assert response.status == 200, response.body
    found = response.json
    if "outputs" in found:
        return [json.loads(each) if isinstance(each, str) else each for each in found["outputs"][0]["data"]]
    return found


def test_pictures_are_answered_as_on_the_cpu_however_they_are_sent(server: Server) -> None:
    give_device(server)
    archives = []
    for name, (network, handler) in MODELS.items():
        for where in ("cpu", "gpu"):
            config = {"deviceType": where, "batchSize": 4}
            archives.append(write_torchscript(server.store, network, f"{name}-{where}", handler=handler, config=config))
    server.start("--models", *(str(each) for each in archives))
    for name in MODELS:
        checks = server.describe(f"{name}-gpu")["checks"]
        assert checks["pixels"] == "bytes, normalized on the device: the same numbers"
        assert "pixels" not in server.describe(f"{name}-cpu")["checks"]
        for path, body, headers in requests():
            got, wanted = (answer(server, f"{name}-{where}", path, body, headers) for where in ("gpu", "cpu"))
            assert close(got, wanted), path
