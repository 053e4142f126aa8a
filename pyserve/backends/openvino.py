"""Where OpenVINO's libraries are: the wheel's, found without importing it."""

from __future__ import annotations

import importlib.util
import re
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

from pyserve import torch_error

FIX = "pip install openvino nncf"
_PLACES = re.compile(
    r"Exception from \S+:\d+:\s*|Check '[^\n]*' failed at \S+:\d+:\s*|FrontEnd API failed with [^\n]*\n\s*"
)


def library() -> Path | None:
    """The C library of the wheel; None if it is not installed."""
    try:
        found = importlib.util.find_spec("openvino")
    except (ImportError, ValueError):
        return None
    folders = [] if found is None else list(found.submodule_search_locations or ())
    for folder in folders:
        for path in sorted((Path(folder) / "libs").glob("libopenvino_c.so*")):
            return path
    return None


def missing() -> str:
    """Why OpenVINO cannot be used here, and what to do about it; ``""`` if it can."""
    return "" if library() is not None else f"OpenVINO is not installed here; {FIX}"


def cause_of(error_text: str) -> str:
    """What went wrong, in what OpenVINO says of an error: it begins with where in its source that was noticed."""
    return torch_error.cause_of(_PLACES.sub("", error_text))


def version() -> str:
    """Of the installed wheel; ``""`` without one."""
    try:
        return installed_version("openvino")
    except PackageNotFoundError:
        return ""
