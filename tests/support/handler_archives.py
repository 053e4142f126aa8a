"""Archives with handler code of their own, as people write them for TorchServe."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pyserve.archive.packing import ArchiverConfig, write_archive


class Doubler(torch.nn.Module):
    """[n, k] -> [n, k], twice the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def write_handler(
    store: Path,
    name: str,
    source: str | None,
    *,
    handler: str = "handler.py",
    files: Mapping[str, str] | None = None,
    network: torch.nn.Module | None = None,
    model_file: str | None = None,
    state: dict[str, torch.Tensor] | None = None,
    config: dict[str, Any] | None = None,
    requirements: str | None = None,
    version: str = "1.0",
    file: str | None = None,
) -> Path:
    """``store/{file or name}.mar``.

    Args:
        source: text of the handler's file; None for a built-in ``handler``.
        handler: as for --handler; a file name with or without ``:function``.
        files: further files, by name.
        network: packed as TorchScript.
        model_file, state: text of the model file, and its weights.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        extra = []
        for each, text in (files or {}).items():
            (folder / each).write_text(text)
            extra.append(str(folder / each))
        if source is not None:
            (folder / handler.partition(":")[0]).write_text(source)
        serialized = None
        if network is not None:
            serialized = folder / "model.pt"
            torch.jit.script(network.eval()).save(str(serialized))
        elif state is not None:
            serialized = folder / "weights.pth"
            torch.save(state, serialized)
        optional = {}
        for key, each, text in (
            ("model_file", "model.py", model_file),
            ("config_file", "model-config.yaml", None if config is None else json.dumps(config)),  # JSON is YAML
            ("requirements_file", "requirements.txt", requirements),
        ):
            if text is not None:
                (folder / each).write_text(text)
                optional[key] = str(folder / each)
        written = write_archive(
            ArchiverConfig(
                model_name=name,
                handler=str(folder / handler) if source is not None else handler,
                version=version,
                serialized_file=str(serialized) if serialized is not None else None,
                extra_files=",".join(extra) or None,
                export_path=temporary,
                **optional,
            )
        )
        store.mkdir(parents=True, exist_ok=True)
        target = store / f"{file or name}.mar"
        target.write_bytes(written.read_bytes())
        return target


# The handler of TorchServe's documentation, in our own words: every method of its own, nothing inherited.
TUTORIAL = """
import json
import os
import torch


class ModelHandler:
    def __init__(self):
        self._context = None
        self.initialized = False
        self.model = None
        self.device = None

    def initialize(self, context):
        self._context = context
        self.manifest = context.manifest
        properties = context.system_properties
        model_dir = properties.get("model_dir")
        self.device = torch.device("cuda:" + str(properties.get("gpu_id")) if torch.cuda.is_available() else "cpu")
        serialized_file = self.manifest["model"]["serializedFile"]
        model_pt_path = os.path.join(model_dir, serialized_file)
        if not os.path.isfile(model_pt_path):
            raise RuntimeError("Missing the model.pt file")
        self.model = torch.jit.load(model_pt_path)
        self.initialized = True

    def preprocess(self, data):
        rows = []
        for row in data:
            value = row.get("data")
            if value is None:
                value = row.get("body")
            if isinstance(value, (bytes, bytearray)):
                value = json.loads(value)
            rows.append(value)
        return torch.as_tensor(rows, dtype=torch.float32)

    def inference(self, model_input):
        with torch.no_grad():
            return self.model.forward(model_input)

    def postprocess(self, inference_output):
        return inference_output.tolist()

    def handle(self, data, context):
        model_input = self.preprocess(data)
        model_output = self.inference(model_input)
        return self.postprocess(model_output)
"""

# Answers with what came, and can be told to misbehave.
ECHO = """
import json
import os
import signal
import sys
import time

KEPT = []


def act(order):
    if order.get("sleep"):
        time.sleep(order["sleep"])
    if order.get("spin"):
        end = time.monotonic() + order["spin"]
        while time.monotonic() < end:
            pass
    if order.get("hang"):
        sum(range(10**14))  # in C, holding the GIL: no signal is looked at
    if order.get("kill"):
        os.kill(os.getpid(), getattr(signal, order["kill"]))
    if order.get("exit") is not None:
        os._exit(order["exit"])
    if order.get("system_exit"):
        sys.exit(order["system_exit"])
    if order.get("leak"):
        KEPT.append(bytearray(order["leak"]))
    if order.get("raise"):
        raise ValueError(order["raise"])
    if order.get("print"):
        print(order["print"], flush=True)
    if order.get("fail_in") == len_of_batch:
        raise RuntimeError("only in a batch of %d" % len_of_batch)


class Echo:
    def initialize(self, context):
        self.context = context
        self.pid = os.getpid()

    def handle(self, data, context):
        global len_of_batch
        len_of_batch = len(data)
        answers = []
        for index, row in enumerate(data):
            value = row.get("data", row.get("body"))
            if isinstance(value, dict):
                act(value)
                answers.append({"id": value.get("id"), "batch": len(data), "pid": self.pid,
                                "request_id": context.get_request_id(index)})
            else:
                answers.append(bytes(value) if isinstance(value, bytearray) else value)
        return answers
"""
