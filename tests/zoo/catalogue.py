"""All models of the zoo."""

from __future__ import annotations

from . import batches, control_flow, dtypes, loading, masks, nonfinite, outputs, randomness, shapes, state
from .case import Case

KINDS: dict[str, list[Case]] = {
    "shapes": shapes.CASES,
    "state": state.CASES,
    "control flow": control_flow.CASES,
    "loading": loading.CASES,
    "dtypes": dtypes.CASES,
    "non-finite numbers": nonfinite.CASES,
    "outputs": outputs.CASES,
    "batches": batches.CASES,
    "masks": masks.CASES,
    "randomness": randomness.CASES,
}

CASES = [case for cases in KINDS.values() for case in cases]
