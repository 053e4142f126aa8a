"""What Ray says, in a line."""

from __future__ import annotations

import logging
import os
import re
import warnings

VERSION_MIN = (2, 60)
FIX = 'pip install "ray[serve]>=2.60"'
TEXT_SIZE_MAX = 600
_COLOR = re.compile(r"\x1b\[[0-9;]*m")


def ray_version_problem(version: str) -> str:
    """Why this version cannot be used; ``""`` if it can."""
    numbers = [int(each) for each in re.findall(r"\d+", version)[:2]]
    if tuple(numbers) >= VERSION_MIN:
        return ""
    return f"Ray {version} is too old; {FIX}"


def plain(error: BaseException) -> str:
    """The text of an error of Ray, without colours, frames and line breaks."""
    return shortened(str(error)) or type(error).__name__


def ended(message: str) -> str:
    """What a message of Ray Serve with a traceback ends in, which is the reason."""
    lines = [line.strip() for line in _COLOR.sub("", message).splitlines() if line.strip()]
    if not any("Traceback" in line for line in lines):
        return shortened(message)
    ours = [line for line in lines if "pyserve: " in line]
    reason = (ours or lines)[-1]
    return shortened(reason.partition("pyserve: ")[2] or reason)


def shortened(text: str) -> str:
    """In one line, at most TEXT_SIZE_MAX characters."""
    found = " ".join(_COLOR.sub("", text).split())
    return found if len(found) <= TEXT_SIZE_MAX else f"{found[:TEXT_SIZE_MAX]}..."


def warnings_off() -> None:
    """Ray reports home, and warns of its own future, unless it is told not to."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    logging.getLogger("ray").setLevel(logging.ERROR)
