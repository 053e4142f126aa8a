"""Lists the names and signatures of installed packages, as facts: no code, no docstrings.

    python public_names.py ts model_archiver > public_names.json

Runs in an environment of its own (TorchServe's, or one with the shims on its path) and needs nothing but Python. What a
package wants and the environment lacks (`STAND_INS`) is replaced by empty modules whose every name is a class. The
output, an object of modules:

    {"ts.context": {"classes": {"Context": {"bases": [...], "members": {...}}}, "constants": {...},
                    "functions": {"f": [["x", kind, default]]}, "imports": {"name": "module it is defined in"}}}

A signature is a list of ``[name, kind, default]`` without ``self``; default is None for none, else its ``repr`` if that
is the same in every process, else the name of its type.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import json
import os
import pkgutil
import sys
import types
import warnings
from typing import Any

STAND_INS = (
    "torchvision",
    "transformers",
    "nvidia",
    "vllm",
    "tensorrt_llm",
    "deepspeed",
    "pippy",
    "nvgpu",
    "pynvml",
    "requests",
    "tqdm",
    "huggingface_hub",
    "matplotlib",
    "mpl_toolkits",
)
PLAIN = (bool, int, float, str, bytes, type(None))
TEXT_MAX = 120
# Special methods that are part of how a class is used.
SPECIAL = {"__init__", "__call__", "__iter__", "__next__", "__str__", "__eq__", "__enter__", "__exit__"}


def main() -> None:
    """Prints the facts of the packages given as arguments."""
    warnings.simplefilter("ignore")
    sys.argv, packages = sys.argv[:1], sys.argv[1:]
    stdout, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115 - until the end
    sys.meta_path.append(StandIns())
    facts = {name: module_facts(name, tuple(packages)) for package in packages for name in module_names(package)}
    stdout.write(written(facts) + "\n")
    stdout.flush()
    os._exit(0)  # threads that a module began are nobody's business


def written(value: Any, indent: str = "") -> str:
    """JSON with a line for each name of a module, and for each member of a class."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    inner = indent + " "
    members = [f"{inner}{json.dumps(key)}: {written(each, inner)}" for key, each in sorted(value.items())]
    return "{\n" + ",\n".join(members) + f"\n{indent}}}"


class StandIns:
    """Finds empty modules under the names of `STAND_INS`, where nothing else has found any."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        top = name.partition(".")[0]
        if top not in STAND_INS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: _stand_in(spec.name, name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is to be run."""


class _StandInClass(type):
    def __getattr__(cls, name: str) -> type:
        return _stand_in(cls.__module__, name)


def _stand_in(module: str, name: str) -> type:
    if name.startswith("__"):
        raise AttributeError(name)
    return _StandInClass(name, (), {"__module__": module, "__init__": lambda self, *args, **kwargs: None})


def module_names(package: str) -> list[str]:
    """The package and all modules in it, tests excepted."""
    found = importlib.import_module(package)
    names = [each.name for each in pkgutil.walk_packages(found.__path__, package + ".", onerror=lambda name: None)]
    return [package, *(name for name in names if not name.rpartition(".")[2].startswith("test_"))]


def module_facts(name: str, packages: tuple[str, ...]) -> dict[str, Any]:
    """What a module defines, and what it imports from its own package; or why it cannot be imported."""
    try:
        module = importlib.import_module(name)
    except BaseException as error:  # a module may end the process
        return {"import_error": f"{type(error).__name__}: {getattr(error, 'name', '')}"}
    facts: dict[str, Any] = {"classes": {}, "functions": {}, "constants": {}, "imports": {}}
    for key, value in sorted(vars(module).items()):
        if (key.startswith("_") and key != "__version__") or isinstance(value, types.ModuleType):
            continue
        origin = getattr(value, "__module__", None) if isinstance(value, type) or callable(value) else None
        if isinstance(origin, str) and origin != name:
            if origin.partition(".")[0] in packages:
                facts["imports"][key] = origin
        elif isinstance(value, type):
            facts["classes"][key] = class_facts(value)
        elif callable(value) and not isinstance(value, enum.Enum) and origin == name:
            facts["functions"][key] = signature(value)
        elif origin is None:
            facts["constants"][key] = shown(value)
    return {key: value for key, value in facts.items() if value}


def class_facts(cls: type) -> dict[str, Any]:
    """Bases, own members (private ones too: handlers override them), enum values and fields of a class."""
    facts: dict[str, Any] = {"bases": [f"{base.__module__}.{base.__qualname__}" for base in cls.__bases__]}
    if issubclass(cls, enum.Enum):
        return {**facts, "values": {each.name: each.value for each in cls}}
    if dataclasses.is_dataclass(cls):
        facts["fields"] = [[each.name, _default(each)] for each in dataclasses.fields(cls)]
    members = {}
    for key, value in sorted(vars(cls).items()):
        if key.startswith("__") and key not in SPECIAL:
            continue
        if isinstance(value, property):
            members[key] = ["property", "settable" if value.fset else "read only"]
        elif isinstance(value, (staticmethod, classmethod)):
            skipped = isinstance(value, classmethod)
            members[key] = [type(value).__name__, signature(value.__func__, skips_first=skipped)]
        elif inspect.isfunction(value) or callable(getattr(value, "__wrapped__", None)):
            members[key] = ["method", signature(value, skips_first=True)]
        elif not key.startswith("_"):
            members[key] = ["attribute", shown(value)]
    return {**facts, "members": members, **instance_facts(cls)}


def instance_facts(cls: type) -> dict[str, Any]:
    """The public attributes of a new object, of a class that can be called without arguments."""
    attributes = {key: value for key, value in all_attributes(cls).items() if not key.startswith("_")}
    return {"attributes": attributes} if attributes else {}


def all_attributes(cls: type) -> dict[str, str]:
    """What a new object has of its own; nothing if the class cannot be called without arguments."""
    if signature(cls) != []:
        return {}
    try:
        return {key: shown(value) for key, value in sorted(vars(cls()).items())}
    except Exception:  # an abstract class, or one that wants what is not here
        return {}


def signature(function: Any, *, skips_first: bool = False) -> list[list[Any]] | None:
    """Its parameters; None if it has none that can be known."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None
    return [
        [each.name, each.kind.name, None if each.default is each.empty else shown(each.default)]
        for each in parameters[1 if skips_first else 0 :]
    ]


def _default(each: dataclasses.Field[Any]) -> Any:
    return None if each.default is dataclasses.MISSING else shown(each.default)


def shown(value: Any) -> str:
    """A short plain value as Python writes it, else its type."""
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    plain = isinstance(value, PLAIN) or (
        (isinstance(value, (list, tuple, set)) and all(isinstance(each, PLAIN) for each in value))
        or (isinstance(value, dict) and all(isinstance(each, PLAIN) for pair in value.items() for each in pair))
    )  # fmt: skip
    text = repr(sorted(value, key=repr)) if isinstance(value, set) else repr(value)
    return text if plain and len(text) <= TEXT_MAX and os.sep not in text else f"<{type(value).__name__}>"


if __name__ == "__main__":
    main()
