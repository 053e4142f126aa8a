"""``MAR-INF/MANIFEST.json``, typed and checked.

Names in a manifest are looked up among the archive's entries and never joined to a path, so ``/etc/passwd`` or
``../x`` can only ever be "not in the archive".
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pyserve.archive.entries import LIMITS, MANIFEST_NAME, refuse
from pyserve.errors import InvalidModelError, shown
from pyserve.handler import BUILT_IN, NOT_BUILT_IN

# Handlers that are named, not packed: those that come with pyserve, and TorchServe's others, which archives may name.
BUILTIN_HANDLERS = tuple(sorted([*BUILT_IN, *NOT_BUILT_IN]))
LSP_HANDLERS = ("BaseHandler", "TorchScriptHandler")  # of TorchServe's C++ backend
RUNTIMES = ("python", "python3", "LSP")
DEFAULT_VERSION = "1.0"

MODEL_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_\-.]*"  # what the archiver writes
SERVED_NAME_PATTERN = r"^[^/\x00-\x1f\x7f]+$"
_NAME = re.compile(MODEL_NAME_PATTERN + r"\Z")
NAME_SIZE_MAX = 255
_RESERVED = "all"  # /models/{name}/all lists every version

_TOP_KEYS = frozenset({"createdOn", "runtime", "model", "archiverVersion"})
_MODEL_KEYS = frozenset(
    {"modelName", "modelVersion", "handler", "modelFile", "serializedFile", "configFile", "requirementsFile"}
)
# Written by archivers older than TorchServe; they say nothing about serving.
_IGNORED_KEYS = frozenset({"modelServerVersion", "implementationVersion", "specificationVersion"})
_DEPTH_MAX = 256
_ADD = {"modelFile": "write the model's class there", "serializedFile": "add the weights"}
_HOW_TO_MAKE = (
    "make the archive with `pyserve archive --model-name NAME --version 1.0 --handler HANDLER "
    "--serialized-file WEIGHTS` (or torch-model-archiver)"
)


def check_served_name(name: str, label: str = "model name") -> str:
    """``name`` itself; raises InvalidModelError unless it can be one part of a URL."""
    if not name.isprintable() or not 1 <= len(name) <= NAME_SIZE_MAX or "/" in name or name in (".", ".."):
        refuse(
            label,
            f"modelName {shown(name)} cannot be used: it must be 1 to {NAME_SIZE_MAX} printable characters without "
            "'/', and not '.' or '..'; give another with model_name=, or pack again",
        )
    return name


def check_model_name(name: str, label: str = "model name") -> str:
    """``name`` itself; raises InvalidModelError unless the archiver may write it, which can stand in a file name too.
    """  # fmt: skip
    if not _NAME.match(name) or len(name) > NAME_SIZE_MAX or name.lower() == _RESERVED:
        refuse(
            label,
            f"modelName {shown(name)} cannot be used: it must begin with a letter or digit, hold only "
            f"letters, digits, '_', '-' and '.', have at most {NAME_SIZE_MAX} of them, and not be '{_RESERVED}'",
        )
    return name


def check_model_version(version: str, label: str = "model version") -> str:
    """``version`` itself; raises InvalidModelError unless it is one line of printable text."""
    if not version or len(version) > NAME_SIZE_MAX or not version.isprintable():
        refuse(
            label,
            f"modelVersion {shown(version)} cannot be used: it must be 1 to {NAME_SIZE_MAX} printable characters; "
            "pack again with another",
        )
    return version


def split_handler(handler: str, label: str = "handler") -> tuple[str, str | None]:
    """``"dir/file.py:function"`` as (``"file.py"``, ``"function"``), the folder dropped as TorchServe does.

    Raises:
        InvalidModelError: it names nothing, or has characters that cannot be printed.
    """
    path, _, function = handler.partition(":")
    module = path.rpartition("/")[2]
    # What is left has no slash, so that no folder but the model's own can be meant.
    if not module.removesuffix(".py") or not handler.isprintable() or len(handler) > LIMITS.name_size_max:
        refuse(
            label,
            f"handler {shown(handler)} cannot be used: it must be file[.py][:function] in printable characters, at "
            f"most {LIMITS.name_size_max}; name a .py file of the archive or a built-in handler",
        )
    return module, function or None


def handler_file(handler: str, has: Callable[[str], bool]) -> str | None:
    """The Python file in an archive that ``handler`` means, by its name there; None if it means none.

    Its folder is dropped, as TorchServe does; a file that lies only in that folder of the archive is found too.

    Args:
        has: whether there is a file of that name.
    """
    stem = split_handler(handler)[0].removesuffix(".py")
    if has(f"{stem}.py"):
        return f"{stem}.py"
    below = _inside(handler.partition(":")[0].removesuffix(".py"))
    if below is not None and "/" in below and has(f"{below}.py"):
        return f"{below}.py"
    return None


def _inside(name: str) -> str | None:
    """A relative path without ``.`` and empty parts; None for one that leads elsewhere."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if name.startswith("/") or ".." in parts else "/".join(parts)


def name_of_file(file: str) -> str:
    """What a model is called whose manifest does not say, from the name of its archive; as TorchServe has it."""
    stem = file.removesuffix(".tar.gz").rpartition(".")[0] or file.removesuffix(".tar.gz")
    return re.sub(r"\W|^_", "_", stem, flags=re.ASCII) or "model"


def nearest_handler(name: str) -> str:
    """``"; did you mean X? Built in: ..."`` for a message."""
    close = difflib.get_close_matches(name.removesuffix(".py"), BUILT_IN, n=1, cutoff=0.6)
    return (f"; did you mean {close[0]}?" if close else ";") + f" Built in: {', '.join(sorted(BUILT_IN))}"


@dataclass(frozen=True)
class Manifest:
    """What a manifest says; by default what no manifest says.

    Attributes:
        model_name: as written, not checked; ``""`` when not given.
        model_version: checked to be printable.
        handler: as written: a built-in name, or ``file[.py][:function]``; ``""`` when not given.
        model_file, serialized_file, config_file, requirements_file: names in the archive; None when not given.
        runtime: ``python``, ``python3`` or ``LSP``.
        created_on, archiver_version: as written; None when not given.
        extra: keys not named above; those of ``model`` under ``extra["model"]``.
        raw: the whole JSON object, as handlers see it; None when there is no manifest.
        warnings: texts about what is odd.
        has_odd_runtime: what it says as the runtime is none; TorchServe refuses that.
    """

    model_name: str = ""
    model_version: str = DEFAULT_VERSION
    handler: str = ""
    model_file: str | None = None
    serialized_file: str | None = None
    config_file: str | None = None
    requirements_file: str | None = None
    runtime: str = "python"
    created_on: str | None = None
    archiver_version: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    has_odd_runtime: bool = False

    @classmethod
    def parse(cls, text: bytes, label: str) -> Manifest:
        """Reads a manifest. ``label`` is the archive's file name, for messages.

        Raises:
            InvalidModelError: not JSON, larger than 1 MiB, nested too deeply, or a value cannot be what it is for.
        """
        if len(text) > LIMITS.manifest_size_max:
            refuse(label, f"{MANIFEST_NAME} has {len(text)} bytes, more than the {LIMITS.manifest_size_max} allowed")
        try:
            raw = json.loads(text)
            # Numbers as they are written: version 1.10 is not 1.1.
            literal = json.loads(text, parse_float=str, parse_int=str, parse_constant=str)
            _check_depth(raw, label)
        except RecursionError:
            refuse(label, f"{MANIFEST_NAME} is nested too deeply; {_HOW_TO_MAKE}")
        except ValueError as error:
            refuse(label, f"{MANIFEST_NAME} is not JSON ({error}); {_HOW_TO_MAKE}")
        if not isinstance(raw, dict):
            refuse(label, f"{MANIFEST_NAME} must be a JSON object; {_HOW_TO_MAKE}")
        model = literal.get("model") or {}
        if not isinstance(model, dict):
            refuse(label, f'{MANIFEST_NAME}: "model" must be a JSON object; {_HOW_TO_MAKE}')
        warnings: list[str] = []
        runtime = _runtime(literal, label, warnings)
        handler = _text(model, "handler", label) or ""
        if handler:
            split_handler(handler, label)
        extra = {key: value for key, value in raw.items() if key not in _TOP_KEYS | _IGNORED_KEYS}
        model_extra = {key: value for key, value in (raw.get("model") or {}).items() if key not in _MODEL_KEYS}
        if model_extra:
            extra["model"] = model_extra
        return cls(
            model_name=_text(model, "modelName", label) or "",
            model_version=_version(model, label, warnings),
            handler=handler,
            model_file=_text(model, "modelFile", label, warnings),
            serialized_file=_text(model, "serializedFile", label, warnings),
            config_file=_text(model, "configFile", label),
            requirements_file=_text(model, "requirementsFile", label),
            runtime=runtime or RUNTIMES[0],
            created_on=_text(literal, "createdOn", label, warnings),
            archiver_version=_text(literal, "archiverVersion", label, warnings),
            extra=extra,
            raw=raw,
            warnings=tuple(warnings),
            has_odd_runtime=runtime is None,
        )

    def fitted(self, sizes: Mapping[str, int], label: str) -> tuple[Manifest, tuple[str, ...]]:
        """The same without the files that an archive does not have, and what is wrong for a handler that reads them.

        A handler of one's own need not read them, and gets to see the manifest as it was written.

        Args:
            sizes: in bytes, of the archive's files, by name.

        Raises:
            InvalidModelError: the configuration is not among them.
        """
        files = {
            "modelFile": self.model_file, "serializedFile": self.serialized_file, "configFile": self.config_file,
            "requirementsFile": self.requirements_file,
        }  # fmt: skip
        found: dict[str, str | None] = dict.fromkeys(files)
        wrong: list[str] = []
        needed: list[str] = []
        for key, written in files.items():
            name = _inside(written) if written is not None else None
            if name is not None and name in sizes:
                found[key] = name
                if key in ("modelFile", "serializedFile") and sizes[name] == 0:
                    needed.append(f"{label}: {key} {shown(name)} is empty (0 bytes); {_ADD[key]} and pack again")
            elif written is not None:
                close = difflib.get_close_matches(written, list(sizes)[:1000], n=1)
                fix = f"did you mean {shown(close[0])}?" if close else "add it and pack again"
                problem = f"{key} {shown(written)} is not in the archive; {fix}"
                if key == "configFile":
                    refuse(label, problem)
                wrong.append(f"{label}: {problem}")
                if key != "requirementsFile":
                    needed.append(wrong[-1])
        fitted = replace(
            self, model_file=found["modelFile"], serialized_file=found["serializedFile"],
            config_file=found["configFile"], requirements_file=found["requirementsFile"],
            warnings=(*self.warnings, *wrong),
        )  # fmt: skip
        return fitted, tuple(needed)


def missing_manifest(label: str) -> InvalidModelError:
    """The error for an archive or folder without a manifest."""
    return InvalidModelError(f"{label}: has no {MANIFEST_NAME}; {_HOW_TO_MAKE}")


def missing_handler(label: str) -> InvalidModelError:
    """The error for a manifest that names no handler."""
    return InvalidModelError(
        f"{label}: {MANIFEST_NAME} has no model.handler; name a .py file of the archive or one of: "
        f"{', '.join(sorted(BUILT_IN))}, or give handler="
    )


def _check_depth(value: Any, label: str, depth_max: int = _DEPTH_MAX) -> None:
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


def _text(source: dict[str, Any], key: str, label: str, warnings: list[str] | None = None) -> str | None:
    """A value as text, numbers and booleans as they are written; None when there is none.

    Args:
        warnings: where it is reported that the value is none; by default that is an error.
    """
    value = source.get(key)
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        problem = f"{MANIFEST_NAME}: {key} must be text, not {'a list' if isinstance(value, list) else 'an object'}"
        if warnings is None:
            refuse(label, f"{problem}; put it in quotes")
        warnings.append(f"{label}: {problem}; it is left out")
        return None
    return value


def _version(model: dict[str, Any], label: str, warnings: list[str]) -> str:
    version = _text(model, "modelVersion", label)
    if version is None:
        if "modelVersion" in model:
            warnings.append(f"{label}: {MANIFEST_NAME}: modelVersion is empty; it is version {DEFAULT_VERSION}")
        return DEFAULT_VERSION
    check_model_version(version, label)
    if "/" in version or version == _RESERVED:
        warnings.append(
            f"{label}: modelVersion {shown(version)} cannot stand in a URL, so that only its being the default version "
            "makes it reachable; pack again with another"
        )
    return version


def _runtime(raw: dict[str, Any], label: str, warnings: list[str]) -> str | None:
    """One of `RUNTIMES`; None when the manifest says something else."""
    written = raw.get("runtime", RUNTIMES[0])
    for runtime in RUNTIMES:
        if written in (runtime, runtime.upper()):
            return runtime
    warnings.append(f"{label}: {MANIFEST_NAME}: runtime {shown(str(written))} is none of {', '.join(RUNTIMES)}; "
                    f"it is served with {RUNTIMES[0]}")  # fmt: skip
    return None
