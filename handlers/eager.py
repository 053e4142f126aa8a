"""Build an eager model from an archive's model file and fill in its weights.

The model file is a Python file with exactly one class, a `torch.nn.Module` that takes no arguments.
Random initialisation is skipped, since the weights replace it: for densenet161 that is four fifths
of the time of building it.
"""

from __future__ import annotations

import inspect
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.overrides import TorchFunctionMode

from pyserve.handler import ModelLoadError
from pyserve.handlers.source_file import import_file

# What fills parameters with random numbers. Those of torch.nn.init that are not here end in one of the first two.
_RANDOM_FILLS = frozenset(
    {
        torch.Tensor.uniform_,
        torch.Tensor.normal_,
        torch.nn.init.uniform_,
        torch.nn.init.normal_,
        torch.nn.init.kaiming_uniform_,
        torch.nn.init.kaiming_normal_,
    }
)


class SkipRandomFill(TorchFunctionMode):
    """Inside this context, random fills of parameters leave the memory as it is; everything else runs."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM_FILLS:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, torch.nn.Parameter):
                return target
        return func(*args, **kwargs)


def load_eager_model(
    model_dir: Path, model_file: str, weights: Path | BinaryIO | None, device: torch.device | str = "cpu"
) -> torch.nn.Module:
    """The model of ``model_file`` with ``weights`` (a state dict saved by torch.save), on ``device``, in eval mode.

    Args:
        model_dir: folder with the unpacked archive; the model file may import other files in it.
        model_file: name of the Python file.
        weights: the state dict's file; None keeps the model as its class builds it.

    Raises:
        ModelLoadError: the file holds not exactly one class, the class cannot be built, or the weights do not fit.
    """
    cls = _model_class(model_dir, model_file)
    try:
        if weights is None:
            model = cls()
        else:
            with SkipRandomFill():
                model = cls()
    except Exception as error:
        raise ModelLoadError(
            f"{model_file}: building {cls.__name__}() failed: {type(error).__name__}: {error}. "
            "The class must be buildable without arguments."
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise ModelLoadError(f"{model_file}: class {cls.__name__} is not a torch.nn.Module")
    if weights is not None:
        name = weights.name if isinstance(weights, Path) else "the weights"
        _fill(model, read_state_dict(weights, name), f"{cls.__name__} in {model_file}", name)
    return model.to(device).eval()


def read_state_dict(weights: Path | BinaryIO, name: str) -> Mapping[str, torch.Tensor]:
    """The state dict in ``weights``, on the CPU; mapped into memory instead of read where the format allows.

    Raises:
        ModelLoadError: the file is missing, damaged, or holds anything but named tensors.
    """
    try:
        mmap = isinstance(weights, Path) and zipfile.is_zipfile(weights)
        state = torch.load(weights, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise ModelLoadError(f"{name} is not in the archive; repack it with --serialized-file") from error
    except pickle.UnpicklingError as error:
        raise ModelLoadError(
            f"{name} is not a file of weights only ({_first_line(error)}). "
            "Save the model's weights with torch.save(model.state_dict(), path)."
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        # torch's unpickler raises errors of many classes on damaged files; whatever it was, the file is at fault.
        raise ModelLoadError(f"{name} cannot be read as weights, it may be damaged: {_first_line(error)}") from error
    if not isinstance(state, Mapping):
        raise ModelLoadError(f"{name} holds a {type(state).__name__}, not a state dict; save model.state_dict()")
    odd = next((key for key, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if odd is not None:
        inner = next((key for key in ("state_dict", "model_state_dict", "model") if key in state), None)
        hint = f"save its member {inner!r} alone" if inner else "save model.state_dict()"
        raise ModelLoadError(f"{name} is a checkpoint, not a state dict ({odd!r} is no tensor); {hint}")
    return state


def _fill(model: torch.nn.Module, state: Mapping[str, torch.Tensor], target: str, name: str) -> None:
    own = model.state_dict()
    # Taking the tensors as they are saves a copy of the model, but would change the model's dtypes
    # if the file was saved in another one.
    same_dtypes = all(key not in own or own[key].dtype == value.dtype for key, value in state.items())
    try:
        model.load_state_dict(state, assign=same_dtypes)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        text = " ".join(line if len(line) <= 300 else line[:300] + "..." for line in lines[:4])
        hint = ""
        if any(key.startswith("module.") for key in state) and not any(key.startswith("module.") for key in own):
            hint = " The names start with 'module.': save model.module.state_dict() of a DataParallel model."
        raise ModelLoadError(f"{name} does not fit {target}: {text}{hint}") from error


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


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__
