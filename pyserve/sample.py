"""Something to send to a model, kept as a file, so that the start-up table can end with a line that works as pasted."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import torch

from pyserve.examples import write_sample_picture
from pyserve.handler import Handler


def sample_arguments(name: str, handler: Handler, example: torch.Tensor, folder: Path) -> str:
    """Arguments for curl that post a sample input of model ``name``; the file is written into ``folder``.

    Args:
        example: one item, [1, ...].
    """
    folder.mkdir(parents=True, exist_ok=True)
    if handler.sample_kind == "picture":
        path = folder / "sample.jpg"
        if not path.exists():
            write_sample_picture(path)
        return f"-T {shlex.quote(str(path))}"
    path = folder / f"{name}.json"
    path.write_text(json.dumps(example[0].tolist()))
    return f"-H 'Content-Type: application/json' -T {shlex.quote(str(path))}"
