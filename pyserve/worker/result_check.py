"""What may be wrong with the shape of what a handler returned for a batch, and how to fix it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Outcome(NamedTuple):
    """What a call of the handler gave: results, one per request, or what it raised.

    Attributes:
        is_shape: it raised nothing, but returned something else than a list of as many.
    """

    results: list[Any]
    error: BaseException | None
    is_shape: bool = False


class ShapeProblem(NamedTuple):
    """Not a list with one element per request."""

    kind: str
    what: str
    fix: str


def explain_shape(returned: Any, count: int) -> ShapeProblem | None:
    """What is wrong with ``returned`` as the result of a batch of ``count``; None if its shape is right."""
    per_row = "return a list with one element per element of data, in order"
    if isinstance(returned, list):
        size = len(returned)
        if size == count:
            return None
        if size == 1:
            fix = ". Your handler reads data[0] only?"
        elif size > count:
            fix = ". Does it add to a list that it keeps, or return one list per row without the outer list?"
        else:
            fix = ". Does it leave out rows?"
        return ShapeProblem("length", f"returned {size} for {count}", per_row + fix)
    if returned is None:
        return ShapeProblem("none", f"returned None for {count}", f"{per_row}; does a path of it end without return?")
    kind = type(returned).__name__
    if hasattr(returned, "__next__") or hasattr(returned, "__anext__"):
        return None  # streamed
    if kind == "dict":
        return ShapeProblem("dict", f"returned dict for {count}", f"{per_row}; for one request that is [result]")
    fix = f"{per_row}; call .tolist() on tensors and arrays" if hasattr(returned, "tolist") else per_row
    return ShapeProblem("type", f"returned {kind} for {count}", fix)
