"""Versions of Python and packages: those that an archive was packed with, beside those that run here.

``pyserve archive`` writes them into the manifest, as ``pyserve: {python, torch, packages}``, which TorchServe ignores.
"""

from __future__ import annotations

import ast
import platform
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import NamedTuple

from pyserve.archive.import_scan import imports_of
from pyserve.errors import JsonObject

MANIFEST_KEY = "pyserve"
# Name, and the version if exactly one is asked for; options, URLs and markers are not looked into.
_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?\s*(?:==\s*([A-Za-z0-9._+!-]+)\s*)?")


class Difference(NamedTuple):
    """A version that is not what it was, ``found`` empty if there is none at all."""

    name: str
    wanted: str
    found: str

    def __str__(self) -> str:
        return f"{self.name} {self.wanted}, here " + (self.found or "not installed")


def running_versions(files: Iterable[Path] = ()) -> JsonObject:
    """Versions of Python, torch and the packages that the Python ``files`` import."""
    tops: set[str] = set()
    for path in files:
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError, OSError):
            continue
        tops |= {each.module.partition(".")[0] for each in imports_of(tree, path.name)}
    distributions = packages_distributions() if tops else {}
    names = sorted(
        {name for top in tops for name in distributions.get(top, ())} - {"torch", "pyserve-torch", "pyserve"}
    )
    return {
        "python": platform.python_version(),
        "torch": installed("torch"),
        "packages": {name: installed(name) for name in names},
    }


def installed(name: str) -> str:
    """Version of an installed package, ``""`` if it is not installed."""
    try:
        return version(name)
    except (PackageNotFoundError, ValueError):
        return ""


def differences(recorded: object) -> list[Difference]:
    """Where this Python differs from what ``running_versions`` once said; whatever else it may be counts as nothing."""
    if not isinstance(recorded, dict):
        return []
    found = []
    for name, here in (("python", platform.python_version()), ("torch", installed("torch"))):
        wanted = recorded.get(name)
        if isinstance(wanted, str) and wanted and _minor(wanted) != _minor(here):
            found.append(Difference(name, wanted, here))
    packages = recorded.get("packages")
    for name, wanted in packages.items() if isinstance(packages, dict) else ():
        if isinstance(wanted, str) and _minor(installed(name)) != _minor(wanted):
            found.append(Difference(name, wanted, installed(name)))
    return found


def unmet_requirements(text: str) -> list[Difference]:
    """Lines of a requirements.txt that are not met: packages that are missing, or pinned to another version."""
    unmet = []
    for line in text.splitlines():
        match = _REQUIREMENT.match(line.strip())
        if match is None or line.strip()[match.end() :].startswith(("@", "//", ":")):
            continue
        name, wanted = match[1], match[2] or ""
        here = installed(name)
        if not here or (wanted and here.partition("+")[0] != wanted.partition("+")[0]):
            unmet.append(Difference(name, wanted or "(any)", here))
    return unmet


def _minor(text: str) -> list[str]:
    """The part of a version that usually decides whether code still works: ``["2", "11"]`` of ``2.11.0+cpu``."""
    return text.partition("+")[0].split(".")[:2]
