"""Small things that handlers import."""

from __future__ import annotations

import enum
import functools
import inspect
import json
import logging
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from pyserve.handler import ModelLoadError, PredictionException
from pyserve.handlers.labels import read_labels
from pyserve.handlers.text import remove_accents

__all__ = [
    "CLEANUP_REGEX", "PT2Backend", "PredictionException", "check_valid_pt2_backend", "deprecated", "get_yaml_config",
    "list_classes_from_module", "load_label_mapping", "logger", "map_class_to_label", "remove_accented_characters",
]  # fmt: skip

logger = logging.getLogger(__name__)

# Tags and entities of HTML.
CLEANUP_REGEX = re.compile(r"<[^\n]*?>|&(?:#(?:x[0-9a-f]{1,6}|\d{1,6})|[a-z0-9]+);", re.ASCII)


class PT2Backend(str, enum.Enum):
    """Backends of torch.compile that TorchServe's configuration takes."""

    EAGER = "eager"
    AOT_EAGER = "aot_eager"
    INDUCTOR = "inductor"
    NVFUSER = "nvfuser"
    AOT_NVFUSER = "aot_nvfuser"
    AOT_CUDAGRAPHS = "aot_cudagraphs"
    OFI = "ofi"
    FX2TRT = "fx2trt"
    ONNXRT = "onnxrt"
    IPEX = "ipex"
    TORCHXLA_TRACE_ONCE = "torchxla_trace_once"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"
    HPU_BACKEND = "hpu_backend"


def check_valid_pt2_backend(backend: str) -> bool:
    """Whether ``backend`` is one of `PT2Backend`; a warning in the log if not."""
    if backend in {each.value for each in PT2Backend}:
        return True
    logger.warning("%s is not a supported backend", backend)
    return False


def list_classes_from_module(module: ModuleType, parent_class: type | None = None) -> list[type]:
    """The classes that ``module`` itself defines, those derived from ``parent_class`` if it is given."""
    classes = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__]
    return [cls for cls in classes if parent_class is None or issubclass(cls, parent_class)]


def load_label_mapping(mapping_file_path: str | Path) -> dict[str, str] | None:
    """Class index as text -> label, from an index_to_name.json; None without that file, and a warning in the log.

    Raises:
        json.JSONDecodeError: it is no JSON.
        ModelLoadError: it is not of that form.
    """
    path = Path(mapping_file_path)
    if not path.is_file():
        logger.warning("%r is missing. Inference output will not include class name.", str(mapping_file_path))
        return None
    try:
        return read_labels(path)
    except ModelLoadError as error:
        if isinstance(error.__cause__, json.JSONDecodeError):  # what handlers that do without labels catch
            raise error.__cause__ from None
        raise


def map_class_to_label(
    probs: Any, mapping: Mapping[str, str] | None = None, lbl_classes: Any = None
) -> list[dict[str, float]]:
    """One dict of label -> probability per row, in the order of the row. A class without a label goes by its index.

    Args:
        probs: rows of probabilities.
        mapping: class index as text -> label; without it the index is the label.
        lbl_classes: rows of class indices; by default those of the columns. The shorter row decides.

    Raises:
        TypeError: ``probs`` is no list, but a tensor or the like.
    """
    if not isinstance(probs, (list, tuple)):
        raise TypeError(f"map_class_to_label takes a list of rows, got {type(probs).__name__}; call .tolist() first")
    rows = []
    for number, row in enumerate(probs):
        classes = range(len(row)) if lbl_classes is None else lbl_classes[number]
        names = (str(int(each)) for each in classes)
        rows.append({(mapping or {}).get(name, name): value for name, value in zip(names, row, strict=False)})
    return rows


def get_yaml_config(yaml_file_path: str | Path) -> Any:
    """What a YAML file holds, None if it is empty; only plain values."""
    with open(yaml_file_path) as file:
        return yaml.safe_load(file)


def remove_accented_characters(text: str) -> str:
    """``text`` without accents."""
    return remove_accents(text)


def deprecated(
    version: str, replacement: str = "", klass: type[Warning] = PendingDeprecationWarning
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Marks a function that has another in its place since ``version``: a warning at each call."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            warnings.warn(
                f"{function.__name__} is deprecated in {version} and moved to {replacement}", klass, stacklevel=2
            )
            return function(*args, **kwargs)

        return call

    return decorate
