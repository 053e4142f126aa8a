"""The accelerator of tests in this process: the real one where torch has one, else the simulated one."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.simdev import build


def real_accelerator() -> str | None:
    """``cuda:0`` or the like; none where torch has none, or only the simulated one."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None or found.type == "simdev" else f"{found.type}:0"


@functools.cache
def _module() -> Any:
    path = str(build.built())
    if path not in sys.path:
        sys.path.append(path)
    simdev = importlib.import_module("simdev_autoload").register()
    simdev.set_visible(os.environ.get("SIMDEV") == "1")  # other tests of this process run as if it were not there
    return simdev


@contextmanager
def simulated() -> Iterator[Any]:
    """The extension module, with its devices visible to torch and without any fault; afterwards as before."""
    simdev = _module()
    simdev.reset()
    simdev.set_visible(True)
    try:
        yield simdev
    finally:
        simdev.reset()
        simdev.trace(False)
        simdev.take_spans()
        simdev.set_visible(os.environ.get("SIMDEV") == "1")
