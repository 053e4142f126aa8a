"""Compares what can be imported here with names recorded elsewhere: `tests/differential/public_names.py` writes them.

    python -m tests.support.name_differences RECORD FOLDER

prints a JSON list of [name, difference] pairs, with the packages taken from FOLDER.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import json
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from tests.differential import public_names

Pair = tuple[str, str]
# A default that a call may change, and what stands for it.
_EMPTY = {"[]": "None", "{}": "None"}


def of_module(name: str, facts: dict[str, Any]) -> Iterator[Pair]:
    """What is missing in a module, or cannot be called as the recorded one can."""
    if "import_error" in facts:
        return
    try:
        module = importlib.import_module(name)
    except ImportError:
        yield name, "cannot be imported"
        return
    for key in (*facts.get("constants", {}), *facts.get("imports", {})):
        if not hasattr(module, key):
            yield f"{name}.{key}", "missing"
    for key, recorded in facts.get("constants", {}).items():
        if hasattr(module, key) and "<" not in recorded and public_names.shown(getattr(module, key)) != recorded:
            yield f"{name}.{key}", f"is {public_names.shown(getattr(module, key))}, not {recorded}"
    for key, recorded in facts.get("functions", {}).items():
        if not hasattr(module, key):
            yield f"{name}.{key}", "missing"
        else:
            yield from _of_signature(f"{name}.{key}", recorded, public_names.signature(getattr(module, key)))
    for key, recorded in facts.get("classes", {}).items():
        if not hasattr(module, key):
            yield f"{name}.{key}", "missing"
        else:
            yield from _of_class(f"{name}.{key}", recorded, getattr(module, key))


def _of_class(name: str, facts: dict[str, Any], cls: type) -> Iterator[Pair]:
    bases = {f"{each.__module__}.{each.__qualname__}" for each in cls.__mro__}
    for base in facts["bases"]:
        if base not in bases and base != "abc.ABC" and not issubclass(cls, _class_named(base)):
            yield name, f"is no {base}"
    if "values" in facts:
        values = {each.name: each.value for each in cls} if issubclass(cls, enum.Enum) else {}
        if values != facts["values"]:
            yield name, f"has the values {values}"
    fields = public_names.class_facts(cls).get("fields")
    if "fields" in facts and [each[0] for each in fields or []][: len(facts["fields"])] != [
        each[0] for each in facts["fields"]
    ]:
        yield name, f"has the fields {fields}"
    for key, recorded in facts.get("members", {}).items():
        yield from _of_member(f"{name}.{key}", recorded, cls, key)
    if "attributes" in facts:
        made = public_names.all_attributes(cls)
        for key, recorded in facts["attributes"].items():
            if key not in made and not hasattr(cls, key):
                yield f"{name}().{key}", "missing"
            elif key in made and "<" not in recorded and made[key] != recorded:
                yield f"{name}().{key}", f"is {made[key]}, not {recorded}"


def _class_named(name: str) -> tuple[type, ...]:
    """The class of a dotted name; nothing if there is none here."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError:
        return ()
    return (found,) if isinstance(found, type) else ()


def _of_member(name: str, recorded: list[Any], cls: type, key: str) -> Iterator[Pair]:
    kind, facts = recorded
    try:
        found = inspect.getattr_static(cls, key)
    except AttributeError:
        if not (kind == "property" and key in public_names.all_attributes(cls)):
            yield name, "missing"
        return
    if kind == "attribute":
        if "<" not in facts and public_names.shown(getattr(cls, key)) != facts:
            yield name, f"is {public_names.shown(getattr(cls, key))}, not {facts}"
    elif kind == "property":
        if isinstance(found, property) and facts == "settable" and found.fset is None:
            yield name, "cannot be set"
    elif not callable(getattr(cls, key)):
        yield name, "cannot be called"
    else:
        is_plain = not isinstance(found, (staticmethod, classmethod))
        function = found if is_plain else found.__func__
        skips = is_plain or isinstance(found, classmethod)
        if kind != "method" and is_plain:
            yield name, f"is no {kind}"
        yield from _of_signature(name, facts, public_names.signature(function, skips_first=skips))


def _of_signature(name: str, recorded: list[Any] | None, ours: list[Any] | None) -> Iterator[Pair]:
    """Whether every call that the recorded signature allows is allowed, and means the same."""
    if recorded is None or ours is None or {each[1] for each in recorded} == {"VAR_POSITIONAL", "VAR_KEYWORD"}:
        return  # the second is a decorator's, which hides what it takes
    kinds = {kind for _, kind, _ in ours}
    takes_all = {"VAR_POSITIONAL", "VAR_KEYWORD"} <= kinds
    plain = [each for each in ours if each[1] in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")]
    names = [each[0] for each in plain]
    wanted = [each for each in recorded if each[1] in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")]
    for position, (parameter, _, default) in enumerate(wanted):
        if takes_all and parameter not in names:
            continue
        is_private = parameter == "_" or (name.rpartition(".")[2].startswith("_") and not name.endswith("__"))
        if position >= len(plain) or (names[position] != parameter and not is_private):
            yield name, f"parameter {position} is not {parameter}: {names}"
        elif default is not None and plain[position][2] is None:
            yield name, f"{parameter} has no default"
        elif default is not None and "<" not in default and plain[position][2] not in (default, _EMPTY.get(default)):
            yield name, f"the default of {parameter} is {plain[position][2]}, not {default}"
    recorded_kinds = {kind for _, kind, _ in recorded}
    for kind in ("VAR_POSITIONAL", "VAR_KEYWORD"):
        if kind in recorded_kinds and kind not in kinds:
            yield name, f"has no {kind}"
    if "VAR_POSITIONAL" not in recorded_kinds:
        for parameter, _, default in plain[len(wanted) :]:
            if default is None:
                yield name, f"{parameter} is needed too"


def main() -> None:
    """Prints the differences."""
    record, folder = sys.argv[1:]
    warnings.simplefilter("ignore")
    sys.path.insert(0, folder)
    stdout, sys.stdout = sys.stdout, open(os.devnull, "w")  # noqa: SIM115 - until the end
    sys.meta_path.append(public_names.StandIns())
    with open(record) as file:
        facts = json.load(file)
    json.dump([pair for name in facts for pair in of_module(name, facts[name])], stdout)
    stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
