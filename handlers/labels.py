"""index_to_name.json, from class index to label, and answers with labels in place of indices."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pyserve.handler import ModelLoadError

FORMS = '{"0": "label", ...}, {"0": ["id", "label"], ...} or {"object_type_names": ["label", ...]}'


def read_labels(path: Path) -> dict[str, str] | None:
    """Class index as text -> label. None if there is no such file.

    Of a list the last element is the label.

    Raises:
        ModelLoadError: the file is not JSON, or of none of the known forms.
    """
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, OSError) as error:
        raise ModelLoadError(f"{path.name} cannot be read as UTF-8 text: {error}") from error
    try:
        mapping = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(mapping, dict):
        raise ModelLoadError(f"{path.name} holds a JSON {type(mapping).__name__}; expected {FORMS}")
    names = mapping.get("object_type_names")
    if names is not None:
        if not isinstance(names, list):
            raise ModelLoadError(f"{path.name}: 'object_type_names' is not a list; expected {FORMS}")
        mapping = {str(index): name for index, name in enumerate(names)}
    return {index: _label(path.name, index, value) for index, value in mapping.items()}


def _label(file: str, index: str, value: Any) -> str:
    if isinstance(value, list) and value:
        value = value[-1]
    if not isinstance(value, str):
        shown = json.dumps(value)[:40]
        raise ModelLoadError(f"{file}: the label of class {index!r} is {shown}, not text; expected {FORMS}")
    return value


def labelled(values: Iterable[float], indices: Iterable[int], mapping: Mapping[str, str] | None) -> dict[str, float]:
    """Label -> value, in this order. A class without a label goes by its index.

    Of classes with the same label the first keeps it, the others get their index behind it:
    ``{"crane": 0.6, "crane (517)": 0.3}``.
    """
    mapping = mapping or {}
    answer: dict[str, float] = {}
    for value, index in zip(values, indices, strict=True):
        label = mapping.get(str(index), str(index))
        answer[label if label not in answer else f"{label} ({index})"] = value
    return answer
