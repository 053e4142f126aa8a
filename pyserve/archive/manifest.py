"""``MAR-INF/MANIFEST.json``, typed and checked.

Names in a manifest are looked up among the archive's entries and never joined to a path, so ``/etc/passwd`` or
``../x`` can only ever be "not in the archive".
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from pyserve.archive.entries import LIMITS, MANIFEST_NAME, name_problem, refuse
from pyserve.errors import InvalidModelError, shown
from pyserve.handler import BUILT_IN, NOT_BUILT_IN

# Handlers that are named, not packed: those that come with pyserve, and TorchServe's others, which archives may name.
BUILTIN_HANDLERS = tuple(sorted([*BUILT_IN, *NOT_BUILT_IN]))
LSP_HANDLERS = ("BaseHandler", "TorchScriptHandler")  # of TorchServe's C++ backend
RUNTIMES = ("python", "python3", "LSP")
DEFAULT_VERSION = "1.0"

MODEL_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_\-.]*"
_NAME = re.compile(MODEL_NAME_PATTERN + r"\Z")
VERSION_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_\-.+]*"
_VERSION = re.compile(VERSION_PATTERN + r"\Z")
_FUNCTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_\-.]*\Z")
NAME_SIZE_MAX = 255
_RESERVED = "all"  # /models/{name}/all lists every version

_TOP_KEYS = frozenset({"createdOn", "runtime", "model", "archiverVersion"})
_MODEL_KEYS = frozenset(
    {"modelName", "modelVersion", "handler", "modelFile", "serializedFile", "configFile", "requirementsFile"}
)
# Written by archivers older than TorchServe; they say nothing about serving.
_IGNORED_KEYS = frozenset({"modelServerVersion", "implementationVersion", "specificationVersion"})
_HOW_TO_MAKE = (
    "make the archive with `pyserve archive --model-name NAME --version 1.0 --handler HANDLER "
    "--serialized-file WEIGHTS` (or torch-model-archiver)"
)


def check_model_name(name: str, label: str = "model name") -> str:
    """``name`` itself; raises InvalidModelError unless it can stand in a URL and a file name."""
    if not _NAME.match(name) or len(name) > NAME_SIZE_MAX or name.lower() == _RESERVED:
        refuse(
            label,
            f"modelName {shown(name)} cannot be used: it must begin with a letter or digit, hold only "
            f"letters, digits, '_', '-' and '.', have at most {NAME_SIZE_MAX} of them, and not be '{_RESERVED}'",
        )
    return name


def check_model_version(version: str, label: str = "model version") -> str:
    """``version`` itself; raises InvalidModelError unless it can stand in a URL and a file name."""
    if not _VERSION.match(version) or len(version) > NAME_SIZE_MAX or version.lower() == _RESERVED:
        refuse(
            label,
            f"modelVersion {shown(version)} cannot be used: it must begin with a letter or digit, hold only "
            f"letters, digits, '_', '-', '.', '+', have at most {NAME_SIZE_MAX} of them, and not be '{_RESERVED}'",
        )
    return version


def split_handler(handler: str, label: str = "handler") -> tuple[str, str | None]:
    """``"dir/file.py:function"`` as (``"file.py"``, ``"function"``), the folder dropped as TorchServe does."""
    path, colon, function = handler.partition(":")
    module = path.rpartition("/")[2]
    # Folders in front say where the file was when it was packed; they are dropped, but must not look like an attack.
    problem = name_problem(path)
    if problem or not _MODULE.match(module) or (colon and not _FUNCTION.match(function)):
        refuse(
            label,
            f"handler {shown(handler)} cannot be used: {problem or 'it is no file[.py][:function]'}; "
            "name a .py file of the archive or a built-in handler",
        )
    return module, function or None


def nearest_handler(name: str) -> str:
    """``"; did you mean X? Built in: ..."`` for a message."""
    close = difflib.get_close_matches(name.removesuffix(".py"), BUILT_IN, n=1, cutoff=0.6)
    return (f"; did you mean {close[0]}?" if close else ";") + f" Built in: {', '.join(sorted(BUILT_IN))}"


@dataclass(frozen=True)
class Manifest:
    """What a manifest says.

    Attributes:
        model_name, model_version: checked to be safe in URLs and file names.
        handler: as written: a built-in name, or ``file[.py][:function]``.
        model_file, serialized_file, config_file, requirements_file: names in the archive; None when not given.
        runtime: ``python``, ``python3`` or ``LSP``.
        created_on, archiver_version: as written; None when not given.
        extra: keys not named above; those of ``model`` under ``extra["model"]``.
        raw: the whole JSON object, as handlers see it.
    """

    model_name: str
    model_version: str
    handler: str
    model_file: str | None = None
    serialized_file: str | None = None
    config_file: str | None = None
    requirements_file: str | None = None
    runtime: str = "python"
    created_on: str | None = None
    archiver_version: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: bytes, label: str) -> Manifest:
        """Reads a manifest. ``label`` is the archive's file name, for messages.

        Raises:
            InvalidModelError: not JSON, larger than 1 MiB, nested too deeply, or a field is missing or bad.
        """
        if len(text) > LIMITS.manifest_size_max:
            refuse(label, f"{MANIFEST_NAME} has {len(text)} bytes, more than the {LIMITS.manifest_size_max} allowed")
        try:
            raw = json.loads(text)
            _check_depth(raw, label)
        except RecursionError:
            refuse(label, f"{MANIFEST_NAME} is nested too deeply; {_HOW_TO_MAKE}")
        except ValueError as error:
            refuse(label, f"{MANIFEST_NAME} is not JSON ({error}); {_HOW_TO_MAKE}")
        if not isinstance(raw, dict):
            refuse(label, f"{MANIFEST_NAME} must be a JSON object; {_HOW_TO_MAKE}")
        model = raw.get("model")
        if not isinstance(model, dict):
            refuse(label, f'{MANIFEST_NAME} has no object "model"; {_HOW_TO_MAKE}')
        name = _text(model, "modelName", label) or refuse(
            label, f"{MANIFEST_NAME} has no model.modelName; {_HOW_TO_MAKE}"
        )
        handler = _text(model, "handler", label) or refuse(
            label,
            f"{MANIFEST_NAME} has no model.handler; name a .py file of the archive or one of: "
            f"{', '.join(sorted(BUILT_IN))}",
        )
        runtime = _text(raw, "runtime", label) or RUNTIMES[0]
        if runtime not in RUNTIMES:
            refuse(label, f"Invalid RuntimeType value: {shown(runtime)[1:-1]}; use one of {', '.join(RUNTIMES)}")
        split_handler(handler, label)
        extra = {key: value for key, value in raw.items() if key not in _TOP_KEYS | _IGNORED_KEYS}
        model_extra = {key: value for key, value in model.items() if key not in _MODEL_KEYS}
        if model_extra:
            extra["model"] = model_extra
        return cls(
            model_name=check_model_name(name, label),
            model_version=check_model_version(_version(model, label), label),
            handler=handler,
            model_file=_text(model, "modelFile", label),
            serialized_file=_text(model, "serializedFile", label),
            config_file=_text(model, "configFile", label),
            requirements_file=_text(model, "requirementsFile", label),
            runtime=runtime,
            created_on=_text(raw, "createdOn", label),
            archiver_version=_text(raw, "archiverVersion", label),
            extra=extra,
            raw=raw,
        )

    def check_files(self, names: Collection[str], label: str) -> None:
        """Raises InvalidModelError unless every file that the manifest names is one of ``names``, the archive's."""
        fields = {
            "modelFile": self.model_file,
            "serializedFile": self.serialized_file,
            "configFile": self.config_file,
            "requirementsFile": self.requirements_file,
        }
        for key, name in fields.items():
            if name is not None and name not in names:
                close = difflib.get_close_matches(name, list(names)[:1000], n=1)
                fix = f"did you mean {shown(close[0])}?" if close else "add it and pack again"
                refuse(label, f"{key} {shown(name)} is not in the archive; {fix}")
        self._check_handler(names, label)

    def _check_handler(self, names: Collection[str], label: str) -> None:
        if self.runtime == "LSP":
            return  # names a class of a C++ library, not a Python file
        module, _ = split_handler(self.handler, label)
        stem = module.removesuffix(".py")
        if f"{stem}.py" in names or module in names or stem in BUILTIN_HANDLERS or stem.startswith("ts.torch_handler."):
            return
        if not module.endswith(".py"):
            # Not a file name: a module may also be installed, or come with the archive's requirements.
            package = stem.partition(".")[0]
            if f"{package}/__init__.py" in names or self.requirements_file or _is_installed(package):
                return
        refuse(label, f"handler {shown(self.handler)} is neither in the archive nor built in{nearest_handler(stem)}")


def missing_manifest(label: str) -> InvalidModelError:
    """The error for an archive or folder without a manifest."""
    return InvalidModelError(f"{label}: has no {MANIFEST_NAME}; {_HOW_TO_MAKE}")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _check_depth(value: Any, label: str, depth_max: int = 32) -> None:
    level = [value]
    for _ in range(depth_max):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return
    refuse(label, f"{MANIFEST_NAME} is nested more than {depth_max} levels deep; {_HOW_TO_MAKE}")


def _text(source: dict[str, Any], key: str, label: str) -> str | None:
    value = source.get(key)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        refuse(label, f"{MANIFEST_NAME}: {key} must be text, not {type(value).__name__}; put it in quotes")
    return value


def _version(model: dict[str, Any], label: str) -> str:
    value = model.get("modelVersion")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    # A float is refused like any other non-text: 1.10 without quotes would silently become version 1.1.
    return _text(model, "modelVersion", label) or DEFAULT_VERSION
