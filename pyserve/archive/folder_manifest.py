"""A manifest for a folder that has none: what a model under development most likely is, or which line to write.

    infer_manifest(folder) -> Inferred(text, said)

Nothing is written; the folder stays as it is.
"""

from __future__ import annotations

import ast
import json
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pyserve.archive.manifest import DEFAULT_VERSION, nearest_handler
from pyserve.damaged_zip import DAMAGED_ZIP
from pyserve.errors import InvalidModelError, shown
from pyserve.handler import BUILT_IN

WEIGHTS_SUFFIXES = (".pt", ".pth", ".pt2", ".onnx")
SAFETENSORS = ".safetensors"
HANDLER_FILE = "handler.py"
MODEL_FILE = "model.py"
CONFIG_FILE = "model-config.yaml"
LABELS_FILE = "index_to_name.json"
REQUIREMENTS_FILE = "requirements.txt"

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.\-]+")


@dataclass(frozen=True)
class Inferred:
    """What was made of a folder.

    Attributes:
        text: of MANIFEST.json.
        said: in one line, for people.
    """

    text: bytes
    said: str


def infer_manifest(folder: Path, given_handler: str = "") -> Inferred:
    """The manifest of a folder without one.

    Args:
        given_handler: in place of what would be taken: a built-in one, or a Python file of the folder.

    Raises:
        InvalidModelError: it cannot be told which file is what; the text says what to write.
    """
    files = sorted(path.name for path in folder.iterdir() if os.path.isfile(path))
    weights = _weights(folder, files)
    code = [name for name in files if name.endswith(".py")]
    handler = _given(folder, given_handler) if given_handler else _handler(folder, code, weights, files)
    name = _NOT_IN_NAMES.sub("_", folder.resolve().name).lstrip("_.-") or "model"
    model = {"modelName": name, "modelVersion": DEFAULT_VERSION, "handler": handler}
    if weights is not None:
        model["serializedFile"] = weights
    if MODEL_FILE in files and handler != MODEL_FILE and not (weights and _is_torchscript(folder / weights)):
        model["modelFile"] = MODEL_FILE
    for key, file in (("configFile", CONFIG_FILE), ("requirementsFile", REQUIREMENTS_FILE)):
        if file in files:
            model[key] = file
    told = {"modelName": "name", "handler": "handler", "serializedFile": "weights", "modelFile": "model file",
            "configFile": "configuration", "requirementsFile": "requirements"}  # fmt: skip
    said = ", ".join(f"{word} {model[key]}" for key, word in told.items() if key in model)
    manifest = {"runtime": "python", "model": model, "archiverVersion": "1.0"}
    text = json.dumps(manifest, indent=2).encode()
    return Inferred(text, f"no MAR-INF/MANIFEST.json in {folder.name}; taken: {said}")


def _given(folder: Path, handler: str) -> str:
    path = handler.partition(":")[0]
    if handler in BUILT_IN or any((folder / Path(name).name).is_file() for name in (path, f"{path}.py")):
        return handler if handler in BUILT_IN else handler.rpartition("/")[2]
    raise InvalidModelError(
        f"--handler {shown(handler)} is neither a Python file in {folder.name} nor built in{nearest_handler(path)}"
    )


def _handler(folder: Path, files: list[str], weights: str | None, all_files: list[str]) -> str:
    if HANDLER_FILE in files:
        return HANDLER_FILE
    found = [name for name in files if _is_handler(folder / name)]
    if len(found) == 1:
        return found[0]
    if not found and weights is not None:  # a model without code of its own to call it
        return "image_classifier" if LABELS_FILE in all_files else "tensor"
    if found:
        problem = f"{', '.join(found)} could each be the handler; name one of them {HANDLER_FILE}"
    else:
        problem = (
            f"no file in it defines a function handle(data, context) or a class with a method handle; write one in "
            f"{HANDLER_FILE}"
        )
    raise InvalidModelError(f"{folder.name}: {problem}, or {_how_to_say(folder, found)}")


def _is_handler(path: Path) -> bool:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return False
    return any(
        (isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and _is_handle(node))
        or (isinstance(node, ast.ClassDef) and _is_handler_class(node))
        for node in tree.body
    )


def _is_handler_class(node: ast.ClassDef) -> bool:
    if any(isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef)) and each.name == "handle" for each in node.body):
        return True
    # Derived from one of TorchServe's, whose names end so, but for the classifiers and their like.
    bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
    return any(re.search(r"(Handler|Classifier|Detector|Segmenter)\Z", base) for base in bases)


def _is_handle(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return node.name == "handle" and len(node.args.args) >= 2


def _weights(folder: Path, files: list[str]) -> str | None:
    found = [name for name in files if name.endswith(WEIGHTS_SUFFIXES)]
    safetensors = [name for name in files if name.endswith(SAFETENSORS)]
    if not found and len(safetensors) == 1:  # several are parts of one model, which a handler reads
        found = safetensors
    if len(found) <= 1:
        return found[0] if found else None
    preferred = [name for name in found if Path(name).stem == "model"]
    if len(preferred) == 1:
        return preferred[0]
    raise InvalidModelError(
        f"{folder.name}: {', '.join(found)} could each be the weights; name the one model{Path(found[0]).suffix}, or "
        f"{_how_to_say(folder, [HANDLER_FILE])}"
    )


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return any("/code/" in name for name in file.namelist())
    except DAMAGED_ZIP:
        return False


def _how_to_say(folder: Path, handlers: list[str]) -> str:
    handler = handlers[0] if handlers else "HANDLER"
    return (
        f"say what is what with `pyserve archive --model-name {folder.resolve().name} --version 1.0 "
        f"--handler {handler} --serialized-file WEIGHTS --archive-format no-archive`"
    )
