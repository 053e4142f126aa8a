"""What a model answers in double precision: by that it is judged which of two ways to compute it rounds more.

A normalization of numbers that are all alike divides next to nothing by next to nothing: one engine gives 0, which is
right, and torch 3e-4 of rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

Run = Callable[[Sequence[torch.Tensor]], Any]


def in_double(load: Callable[[], Any]) -> Run:
    """What runs a model in double precision; loaded when it is first called. It raises what such a model does, for one
    because its code names another precision.

    Args:
        load: a model of one's own, which is changed: eager, or TorchScript.
    """
    loaded: list[Any] = []

    def run(inputs: Sequence[torch.Tensor]) -> Any:
        if not loaded:
            loaded.append(_doubled(load()))
        with torch.no_grad():
            return loaded[0](*(each.double() if each.is_floating_point() else each.clone() for each in inputs))

    return run


def copy_in_double(model: torch.nn.Module) -> Run:
    """The same of a copy of ``model``."""
    return in_double(lambda: copy.deepcopy(model))


def _doubled(model: Any) -> Any:
    model = model.double()
    if isinstance(model, torch.jit.ScriptModule):
        graph: Any = model.graph
        for node in graph.findAllNodes("prim::Constant"):  # the weights, of one that is frozen
            if node.hasAttribute("value") and node.kindOf("value") == "t" and node.t("value").is_floating_point():
                node.t_("value", node.t("value").double())
    return model
