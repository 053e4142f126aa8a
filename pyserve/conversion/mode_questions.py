"""Whether a model's own code asks how it is being run: traced, scripted, exported, or as it is.

What it computes then may be another thing once it is converted, and the trace, or the script, is no proof of the eager
model. torch and other installed libraries ask too, in order to compute the same in a way that can be converted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

import torch

# The answers are others than in the eager model.
TRACING = (torch.jit.is_tracing,)
SCRIPTING = (torch.jit.is_scripting,)
EXPORTING = (torch.compiler.is_compiling, torch.compiler.is_exporting, torch.compiler.is_dynamo_compiling)
_NAMES: dict[CodeType, str] = {each.__code__: each.__name__ for each in (*TRACING, *SCRIPTING, *EXPORTING)}
ASKED_BY = {
    "traced": frozenset(each.__name__ for each in TRACING),
    "scripted": frozenset(each.__name__ for each in SCRIPTING),
    "exported": frozenset(each.__name__ for each in EXPORTING),
}


@contextmanager
def mode_questions() -> Iterator[set[str]]:
    """Fills the set that it gives with the names of the questions asked in this thread, such as ``is_tracing``.

    Calls are watched, rather than the functions replaced: code may have imported one by name before.
    """
    asked: set[str] = set()
    before = sys.getprofile()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in _NAMES and _is_own(frame.f_back):
            asked.add(_NAMES[frame.f_code])
        if before is not None:
            before(frame, event, argument)  # type: ignore[arg-type]

    sys.setprofile(watch)
    try:
        yield asked
    finally:
        sys.setprofile(before)


def _is_own(caller: FrameType | None) -> bool:
    """Whether this is code of a model, and not of an installed library."""
    if caller is None:
        return False
    name = str(caller.f_globals.get("__name__", ""))
    return name.split(".", maxsplit=1)[0] != "torch" and "site-packages" not in caller.f_code.co_filename
