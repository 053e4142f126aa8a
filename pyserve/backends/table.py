"""The backends: what a model of the native lane can run on, and what each needs.

A further one is a class of `csrc/torch_model.h` that runs it, a module that makes its file, and a row here. Needs no
torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

from pyserve.backends import openvino

TORCHSCRIPT = "torchscript"
AOTINDUCTOR = "aotinductor"
OPENVINO = "openvino"

# How far answers may be from eager's at most, as `proof.comparison.difference` counts, to be called the same. Of
# int8 only what no rounding explains counts here (shapes, kinds, what is refused): numbers outside of the ranges that
# it was calibrated for may become any other. What it loses on those inside is `precision.check_agreement`'s.
AGREEMENT: dict[str, float] = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2, "int8": 1e3}


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    Attributes:
        name: as model-config.yaml has it.
        label: for a person.
        file: main file of what is kept for it.
        missing: why it cannot be used in this installation and what to do about it; ``""`` if it can.
        version: of what makes it; something else is kept for each.
        precisions: those that it runs at.
        maker: module that makes it, with a function ``make(source, folder, precision) -> Produced``; ``""`` if nothing
            is to be made.
    """

    name: str
    label: str
    file: str
    missing: Callable[[], str]
    version: Callable[[], str]
    precisions: tuple[str, ...]
    maker: str = ""


def _torch_version() -> str:
    return version("torch")


def compiler() -> str:
    """The C++ compiler that torch would call, its path; ``""`` if there is none."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        if found := shutil.which(name):
            return found
    return ""


def _no_compiler() -> str:
    if compiler():
        return ""
    named = os.environ.get("CXX")
    what = f"the C++ compiler that CXX names ({named})" if named else "a C++ compiler (g++)"
    return f"{what} is not here, and torch compiles with it; install one, such as the package g++"


# What is quick to make comes first: it serves while the next one is compiled, which takes minutes.
BACKENDS: dict[str, Backend] = {
    each.name: each
    for each in (
        Backend(TORCHSCRIPT, "TorchScript", "graph.pt", lambda: "", _torch_version, ("fp32", "bf16", "fp16")),
        Backend(
            OPENVINO, "OpenVINO", "model.xml", openvino.missing, openvino.version, ("fp32", "bf16", "fp16", "int8"),
            "pyserve.backends.to_openvino",
        ),
        Backend(
            AOTINDUCTOR, "AOTInductor", "package.pt2", _no_compiler, _torch_version, ("fp32", "bf16", "fp16", "int8"),
            "pyserve.backends.to_aotinductor",
        ),
    )
}  # fmt: skip
