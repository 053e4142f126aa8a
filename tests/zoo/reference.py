"""What is right: the class built again, weights loaded as torch loads them, each item alone.

Nothing of the server is used here.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .case import Case, Item

SAVED_SEED, BUILT_SEED = 3, 99


@dataclass(frozen=True)
class Refused:
    """The class itself raises for this item, or its answer has not one row: a number would be made up."""

    reason: str


def load_class(path: Path) -> type[nn.Module]:
    """The class of a model file."""
    name = f"zoo_{path.parent.name}".replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # TorchScript looks for the source there
    spec.loader.exec_module(module)
    net: type[nn.Module] = module.Net
    return net


def saved(path: Path, weights: Path) -> nn.Module:
    """The model that its author saved: its state dict lies in ``weights`` then."""
    torch.manual_seed(SAVED_SEED)
    model = load_class(path)()
    _move_statistics(model)
    torch.save(model.state_dict(), weights)
    return model.eval()


def _move_statistics(model: nn.Module) -> None:
    """Running statistics as after some training, so that taking them for 0 and 1 is seen."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.5, 0.5)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


def rebuilt(path: Path, weights: Path) -> nn.Module:
    """What TorchServe serves: built with other random numbers, then the state dict is copied in."""
    torch.manual_seed(BUILT_SEED)
    model = load_class(path)()
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def right_answers(path: Path, weights: Path, case: Case) -> list[Any]:
    """Per request of ``case`` the output of a fresh model for it alone, or `Refused`."""
    if case.is_pure:
        model = rebuilt(path, weights)
        return [_alone(model, item) for item in case.requests()]
    return [_alone(rebuilt(path, weights), item) for item in case.requests()]


def _alone(model: nn.Module, item: Item) -> Any:
    try:
        with torch.no_grad():
            output = model(*(each.clone() for each in item))
    except Exception as error:  # whatever the model raises: the server must not answer
        return Refused(f"{type(error).__name__}: {error}")
    if isinstance(output, types.SimpleNamespace):  # its names are those of the outputs
        output = vars(output)
    odd = _no_row(output)
    return Refused(odd) if odd else output


def _no_row(output: Any) -> str:
    """Why an output is no answer for one item; "" if it is."""
    if isinstance(output, torch.Tensor):
        return "" if output.dim() and output.shape[0] == 1 else f"a tensor {list(output.shape)} is not one row"
    if isinstance(output, dict):
        return next(filter(None, map(_no_row, output.values())), "")
    if isinstance(output, (list, tuple)):
        return next(filter(None, map(_no_row, output)), "")
    if output is None or isinstance(output, (bool, int, float, str)):
        return ""
    return f"a {type(output).__name__} is no answer"
