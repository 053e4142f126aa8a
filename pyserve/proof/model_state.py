"""What calls of a model leave behind, put back: trying a model out must not change what its first client is answered.

Kept are the buffers and attributes of modules, tensors and containers in them, and the states of the generators of
random numbers. Weights of more than a megabyte are taken for weights: nobody's `forward` writes to them.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from pyserve import devices

PARAMETER_SIZE_MAX = 1 << 20
DEPTH_MAX = 6
_CONTAINERS = (dict, OrderedDict, list, set, deque)


def models_in(*holders: Any) -> list[torch.nn.Module]:
    """The modules that objects hold by name."""
    values = [value for holder in holders if hasattr(holder, "__dict__") for value in list(vars(holder).values())]
    return [value for value in values if isinstance(value, torch.nn.Module)]


class KeptState:
    """The state of some modules as it is now.

    Args:
        models: other objects than modules are left alone.
    """

    def __init__(self, models: Iterable[Any]):
        self._seen: dict[int, Any] = {}  # keeps the objects alive, so that ids stay theirs
        self._undo: list[Callable[[], None]] = []
        for model in models:
            if isinstance(model, torch.nn.Module):
                for module in model.modules():
                    self._keep_module(module)

    def restore(self) -> None:
        """Makes it what it was."""
        with torch.inference_mode():
            for undo in self._undo:
                undo()

    def _keep_module(self, module: torch.nn.Module) -> None:
        if id(module) in self._seen:
            return
        self._seen[id(module)] = module
        if isinstance(module, torch.jit.ScriptModule):
            self._keep_script(module)
        elif not isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
            # A lazy one becomes another class when it first runs, which is not undone by halves.
            self._keep(vars(module), 0)

    def _keep(self, value: Any, depth: int) -> None:
        if id(value) in self._seen or depth > DEPTH_MAX:
            return
        if isinstance(value, torch.Tensor):
            self._seen[id(value)] = value
            self._keep_tensor(value)
        elif type(value) in _CONTAINERS:
            self._seen[id(value)] = value
            contents = copy.copy(value)
            self._undo.append(lambda: _refill(value, contents))
            for each in list(value.values() if isinstance(value, dict) else value):
                self._keep(each, depth + 1)
        elif isinstance(value, tuple):
            for each in value:
                self._keep(each, depth + 1)

    def _keep_tensor(self, tensor: torch.Tensor) -> None:
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        if torch.nn.parameter.is_lazy(tensor) or tensor.is_meta:
            return
        if is_parameter and tensor.numel() * tensor.element_size() > PARAMETER_SIZE_MAX:
            return
        before = tensor.detach().clone()

        def undo() -> None:
            # Only what was changed: writing to a mapped weight would give this process a copy of its page.
            if tensor.shape != before.shape:
                tensor.data = before
            elif not _are_same(tensor, before):
                tensor.copy_(before)

        self._undo.append(undo)

    def _keep_script(self, module: torch.jit.ScriptModule) -> None:
        inner: Any = module._c
        for name in _attribute_names(inner):
            if not inner.hasattr(name):
                continue  # another module's
            value = inner.getattr(name)
            if isinstance(value, torch.Tensor):
                self._keep_tensor(value)
                self._undo.append(_setting(inner, name, value))
            elif type(value) in (bool, int, float, str, list, dict, tuple):
                self._undo.append(_setting(inner, name, copy.deepcopy(value)))


def _setting(inner: Any, name: str, value: Any) -> Callable[[], None]:
    def undo() -> None:
        now = inner.getattr(name)
        if now is not value and not (isinstance(value, torch.Tensor) and _is_same_memory(now, value)):
            inner.setattr(name, value)

    return undo


def _is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.dtype == other.dtype


def _attribute_names(inner: Any) -> set[str]:
    """Of all that the methods of a TorchScript module read or write by name; there is no list of what it has."""
    graphs = [inner._get_method(name).graph for name in inner._method_names()]
    return {
        node.s("name")
        for graph in graphs
        for kind in ("prim::GetAttr", "prim::SetAttr")
        for node in graph.findAllNodes(kind)
    }


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.layout is not torch.strided or one.is_quantized or one.device.type != "cpu":
        return bool(torch.equal(one, other))
    if one.dtype.is_floating_point or one.dtype.is_complex:
        return bool(torch.equal(torch.nan_to_num(one, nan=0.5), torch.nan_to_num(other, nan=0.5)))
    return bool(torch.equal(one, other))


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(contents)
    else:
        container.extend(contents)


class KeptRandomness:
    """The generators of random numbers of torch, numpy and Python as they are now."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        self._devices = devices.random_states()
        self._numpy = np.random.get_state()
        self._python = random.getstate()

    def restore(self) -> None:
        """Makes them continue from there."""
        torch.set_rng_state(self._torch)
        devices.set_random_states(self._devices)
        np.random.set_state(self._numpy)
        random.setstate(self._python)

    @staticmethod
    def seed(number: int) -> None:
        """Has all begin with ``number``."""
        torch.manual_seed(number)
        np.random.seed(number)
        random.seed(number)
