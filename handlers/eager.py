"""Build an eager model from an archive's model file and fill in its weights.

The model file is a Python file with exactly one class, a `torch.nn.Module` that takes no arguments.
Random initialisation is skipped where the weights replace all of it: for densenet161 that is four fifths
of the time of building it. Where anything else came of the random numbers, the model is built as it stands.
"""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import random
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from pyserve.handler import ModelLoadError
from pyserve.handlers.mapped_load import mapped_file
from pyserve.handlers.safetensors_file import SUFFIX, looks_like_safetensors, read_safetensors
from pyserve.handlers.shared_weights import share_weights
from pyserve.handlers.skipped_init import SkipRandomFill, StaleMemory, StaleNumberUsedError
from pyserve.handlers.source_file import import_file
from pyserve.torch_error import cause_of

log = logging.getLogger(__name__)


def load_eager_model(
    model_dir: Path,
    model_file: str,
    weights: Path | BinaryIO | None,
    device: torch.device | str = "cpu",
    *,
    plain: bool = False,
    name: str = "",
) -> torch.nn.Module:
    """The model of ``model_file`` with ``weights`` (a state dict, of torch.save or as safetensors), on ``device``, in
    eval mode.

    It is the one that building the class and copying the weights into it makes. Random initialisation is left out, and
    the file's tensors are used in place of the model's, where that makes the very same model.

    Args:
        model_dir: folder with the unpacked archive; the model file may import other files in it.
        model_file: name of the Python file.
        weights: the state dict's file; None keeps the model as its class builds it.
        plain: take no short way.
        name: of the weights' file, if ``weights`` is an open one.

    Raises:
        ModelLoadError: the file holds not exactly one class, the class cannot be built, or the weights do not fit.
    """
    cls = _model_class(model_dir, model_file)
    if weights is None:
        return _built(cls, model_file).to(device).eval()
    name = weights.name if isinstance(weights, Path) else name or "the weights"
    state = read_state_dict(weights, name)
    target = f"{cls.__name__} in {model_file}"
    model = None if plain else _built_the_short_way(cls, state)
    if model is None:
        model = _built(cls, model_file)
        _fill(model, state, target, name)
    return model.to(device).eval()


def _built(cls: type, model_file: str) -> torch.nn.Module:
    try:
        model = cls()
    except Exception as error:
        raise ModelLoadError(
            f"{model_file}: building {cls.__name__}() failed: {type(error).__name__}: {error}. "
            "The class must be buildable without arguments."
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise ModelLoadError(f"{model_file}: class {cls.__name__} is not a torch.nn.Module")
    return model


def _built_the_short_way(cls: type, state: Mapping[str, torch.Tensor]) -> torch.nn.Module | None:
    """The model without random initialisation, its weights filled in; None unless that made the very same model.

    The generators are as they were when there is none, so that a plain build is the plain build.
    """
    generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
    stale = StaleMemory()
    try:
        with SkipRandomFill(stale):
            model = cls()
        if isinstance(model, torch.nn.Module):
            state = _completed(model, state)
            assign = _all_become_stale(model, state, stale)
            with SkipRandomFill(stale):
                model.load_state_dict(_copied(state), assign=assign)
            if not stale.is_alive():
                return model
            log.debug("%s is built plainly: it keeps memory of its constructor", cls.__name__)
    except (Exception, StaleNumberUsedError) as error:
        # Numbers that are not there yet may break anything; a plain build tells whether the model is at fault.
        log.debug("%s is built plainly: %s", cls.__name__, error)
    torch.set_rng_state(generators[0])
    np.random.set_state(generators[1])
    random.setstate(generators[2])
    return None


def _copied(state: Mapping[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """As it was in the file, with the versions of the modules that it came from.

    torch keeps the way of loading in these, and the next load of the same dict would follow it.
    """
    copied = OrderedDict(state)
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        copied._metadata = copy.deepcopy(versions)  # type: ignore[attr-defined]
    return copied


def _all_become_stale(model: torch.nn.Module, state: Mapping[str, torch.Tensor], stale: StaleMemory) -> bool:
    """Marks all memory that the file has numbers for; whether the file's tensors may take the place of the model's."""
    own = model.state_dict()
    for tensor in own.values():
        stale.add(tensor)
    return _may_be_assigned(own, state)


def _may_be_assigned(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> bool:
    """Whether the file's tensors are like the model's in everything, and nothing is shared on either side.

    Taking them as they are saves a copy of the model.
    """
    if own.keys() != state.keys():
        return False
    pairs = [(own[key], value) for key, value in state.items()]
    if any(
        type(mine) not in (torch.Tensor, torch.nn.Parameter)
        or type(given) not in (torch.Tensor, torch.nn.Parameter)
        or (mine.dtype, mine.layout, mine.device, mine.shape) != (given.dtype, given.layout, given.device, given.shape)
        or mine.layout is not torch.strided
        or mine.stride() != given.stride()
        or given.is_conj()
        or given.is_neg()
        for mine, given in pairs
    ):
        return False
    for tensors in zip(*pairs, strict=True):
        memory = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
        if len(storages) < len(memory):
            return False
    return True


def read_state_dict(weights: Path | BinaryIO, name: str) -> Mapping[str, torch.Tensor]:
    """The state dict in ``weights``, on the CPU; mapped into memory instead of read where the file stays as it is.

    Raises:
        ModelLoadError: the file is missing, damaged, or holds anything but named tensors.
    """
    try:
        if name.lower().endswith(SUFFIX) or looks_like_safetensors(weights):
            return _shared_state(read_safetensors(weights, name), weights)
        original = mapped_file(weights) if isinstance(weights, Path) else None
        state = torch.load(original or weights, map_location="cpu", weights_only=True, mmap=original is not None)
    except FileNotFoundError as error:
        raise ModelLoadError(f"{name} is not in the archive; repack it with --serialized-file") from error
    except pickle.UnpicklingError as error:
        raise ModelLoadError(
            f"{name} is not a file of weights only: {cause_of(str(error))}. "
            "Save the model's weights with torch.save(model.state_dict(), path)."
        ) from error
    except (MemoryError, ModelLoadError):
        raise
    except Exception as error:
        # torch's unpickler raises errors of many classes on damaged files; whatever it was, the file is at fault.
        raise ModelLoadError(f"{name} cannot be read as weights, it may be damaged: {cause_of(str(error))}") from error
    if not isinstance(state, Mapping):
        raise ModelLoadError(f"{name} holds a {type(state).__name__}, not a state dict; save model.state_dict()")
    # Modules keep other things in their state too: extra state, and quantised ones a dtype. A checkpoint has members
    # around its weights.
    members = ("state_dict", "model_state_dict", "model")
    inner = next((key for key in members if isinstance(state.get(key), Mapping)), None)
    odd = next((key for key, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if odd is not None and (inner or not any(isinstance(value, torch.Tensor) for value in state.values())):
        fix = f"save its member {inner!r} alone" if inner else "save model.state_dict()"
        raise ModelLoadError(f"{name} is a checkpoint, not a state dict ({odd!r} is no tensor); {fix}")
    return state


def _shared_state(state: dict[str, torch.Tensor], weights: Path | BinaryIO) -> Mapping[str, torch.Tensor]:
    """``state``, in memory that worker processes of one model share."""
    if isinstance(weights, Path):
        holder = torch.nn.Module()
        for number, tensor in enumerate(state.values()):
            holder.register_buffer(str(number), tensor)
        share_weights(holder, weights)
    return SharedNames(state)


class SharedNames(OrderedDict[str, torch.Tensor]):
    """A state dict without the further names of tensors that have several: safetensors files have none of them."""


def _completed(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """``state`` with the names that safetensors leave out: of tensors that are, in the model, one with a given one."""
    if not isinstance(state, SharedNames):
        return state
    own = model.state_dict()
    given = {_place(own[key]): value for key, value in state.items() if key in own}
    left_out = {key: _place(tensor) for key, tensor in own.items() if key not in state}
    missing = {key: given[place] for key, place in left_out.items() if place in given}
    return OrderedDict({**state, **missing}) if missing else state


def _place(tensor: torch.Tensor) -> tuple[object, ...]:
    """The same for two tensors that are one; by the memory of its own for one without numbers."""
    if not isinstance(tensor, torch.Tensor) or not tensor.numel():
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _fill(model: torch.nn.Module, state: Mapping[str, torch.Tensor], target: str, name: str) -> None:
    try:
        model.load_state_dict(_copied(_completed(model, state)))
    except RuntimeError as error:
        own = model.state_dict()
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        text = " ".join(line if len(line) <= 300 else line[:300] + "..." for line in lines[:4])
        fix = ""
        if any(key.startswith("module.") for key in state) and not any(key.startswith("module.") for key in own):
            fix = " The names start with 'module.': save model.module.state_dict() of a DataParallel model."
        raise ModelLoadError(f"{name} does not fit {target}: {text}{fix}") from error


def _model_class(model_dir: Path, model_file: str) -> type:
    path = model_dir / model_file
    if not path.is_file():
        raise ModelLoadError(f"model file {model_file} is not in the archive; repack it with --model-file")
    try:
        module = import_file(path)
    except Exception as error:
        raise ModelLoadError(f"importing {model_file} failed: {type(error).__name__}: {error}") from error
    classes = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__]
    if len(classes) != 1:
        names = ", ".join(cls.__name__ for cls in classes) or "none"
        raise ModelLoadError(f"{model_file} must define exactly one class, the model; it defines: {names}")
    model_class: type = classes[0]
    return model_class
