"""Something to send to a model, kept as a file, so that the start-up table can end with a line that works as pasted."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import torch

from pyserve.examples import write_sample_picture
from pyserve.handler import Handler


def sample_arguments(name: str, handler: Handler, example: list[torch.Tensor], folder: Path) -> str:
    """Arguments for curl that post a sample input of model ``name``; the file is written into ``folder``.

    Args:
        example: one item, [1, ...] per input.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if handler.sample_kind == "picture":
        path = folder / "sample.jpg"
        if not path.exists():
            write_sample_picture(path)
        return f"-T {shlex.quote(str(path))}"
    path = folder / f"{name}.json"
    values = [each[0].tolist() for each in example]
    names = [spec.name for spec in getattr(handler, "specs", ())]
    path.write_text(json.dumps(values[0] if len(values) == 1 else dict(zip(names, values, strict=True))))
    return f"-H 'Content-Type: application/json' -T {shlex.quote(str(path))}"
