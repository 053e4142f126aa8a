"""What a model's description, and commands, say about the backend that it runs on. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pyserve.backends.table import BACKENDS

# Of a choice: nothing more is found out, files are being made, what was made is compared and measured.
STATES = ("settled", "making", "trying")


def shown(
    chosen: str, reason: str, tried: Sequence[Mapping[str, Any]] = (), *, state: str = "settled"
) -> dict[str, Any]:
    """``checks.backend`` of a description.

    Args:
        chosen: the backend that runs the model now.
        reason: why, one line.
        tried: a `trial.Tried` as a dict for each candidate; what was not measured is left out.
        state: one of `STATES`.
    """
    found: dict[str, Any] = {"chosen": chosen, "state": state, "reason": reason}
    if tried:
        found["tried"] = [_rounded(each) for each in tried]
    return found


def _rounded(tried: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON can hold it: three digits, and nothing infinite."""
    kept: dict[str, Any] = {}
    for name, value in tried.items():
        if isinstance(value, float):
            if math.isfinite(value) and value < 1e300:
                kept[name] = float(f"{value:.3g}")
        elif value not in ("", 0):
            kept[name] = value
    return kept


def availability() -> list[tuple[str, str, str]]:
    """(name, version, why it cannot be used here or ``""``) of each backend, in the table's order."""
    return [(name, "" if each.missing() else each.version(), each.missing()) for name, each in BACKENDS.items()]
