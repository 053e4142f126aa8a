"""Whether a package that AOTInductor compiled can run on this machine.

Its code is a shared library with the instructions of the CPU that it was compiled on. One with instructions that this
CPU has not ends the process at the first call, and one that was cut short when it is mapped, so neither is loaded.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyserve.damaged_zip import DAMAGED_ZIP
from pyserve.errors import ModelLoadError
from pyserve.proof.compiled_code import check_package_code

_METADATA = re.compile(r"data/aotinductor/model/[^/]*wrapper_metadata\.json$")
# More than the largest seen by far; what is longer is not read.
_METADATA_SIZE_MAX = 1 << 20
# As torch names them in the metadata; others are not looked for.
_INSTRUCTIONS: dict[str, Callable[[], bool]] = {
    "avx2": torch.cpu._is_avx2_supported, "avx512": torch.cpu._is_avx512_supported,
    "avx512_vnni": torch.cpu._is_vnni_supported, "amx_tile": torch.cpu._is_amx_tile_supported,
}  # fmt: skip


def compiled_for(path: Path) -> str:
    """The kind of device that a compiled package runs on, as torch names it; ``""`` if it does not say.

    Raises:
        ModelLoadError: it cannot be read.
    """
    return str(_metadata(path).get("AOTI_DEVICE_KEY", ""))


def check_machine(path: Path, label: str) -> None:
    """Checks that this machine has what the package at ``path`` was compiled for, as far as it says, and that its code
    is whole.

    Raises:
        ModelLoadError: it has not or is not, or the package cannot be read; the text says what is needed.
    """
    found = _metadata(path)
    fix = "compile it again on this machine, or on one like it, with torch._inductor.aoti_compile_and_package"
    for key, here in (("AOTI_PLATFORM", sys.platform), ("AOTI_MACHINE", platform.machine())):
        there = found.get(key)
        if isinstance(there, str) and there and there != here:
            raise ModelLoadError(f"{label} was compiled for {there[:40]}, and this machine is {here}; {fix}")
    needed = str(found.get("AOTI_CPU_ISA", "")).lower().split()
    missing = [name for name in needed if name in _INSTRUCTIONS and not _INSTRUCTIONS[name]()]
    if missing:
        raise ModelLoadError(f"{label} was compiled for a CPU with {', '.join(missing)}, which this one has not; {fix}")
    check_package_code(path, label)


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as file:
            for name in file.namelist():
                if _METADATA.search(name) and file.getinfo(name).file_size <= _METADATA_SIZE_MAX:
                    found = json.loads(file.read(name))
                    return found if isinstance(found, dict) else {}
    except DAMAGED_ZIP as error:  # or JSON that is none, or nested too deeply
        raise ModelLoadError(f"{path.name}: the package cannot be read: {error}") from error
    return {}
