"""What Python files import, without running them, and which of that is not there.

One missing module is seen when a handler is loaded; the others only after the first was mended. Reading the files
finds them all at once.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyserve.launch import COMPAT_DIR

_FORGIVING = frozenset({"ImportError", "ModuleNotFoundError", "Exception", "BaseException"})
_SKIPPED_FOLDERS = ("__", ".", "site-packages")


@dataclass(frozen=True)
class Import:
    """One name that is imported.

    Attributes:
        module: dotted name.
        place: ``handler.py:3``, the file's name as in its folder.
        is_optional: the file goes on without it: it is within ``try`` with ``except ImportError``.
    """

    module: str
    place: str
    is_optional: bool


@dataclass(frozen=True)
class BrokenFile:
    """A file that is not Python.

    Attributes:
        place: ``handler.py:3``.
        text: of the syntax error.
    """

    place: str
    text: str


def scan_folder(folder: Path) -> tuple[list[Import], list[BrokenFile]]:
    """The imports of all Python files below ``folder``, and those that cannot be read as Python."""
    imports: list[Import] = []
    broken: list[BrokenFile] = []
    for path in python_files(folder):
        name = path.relative_to(folder).as_posix()
        try:
            tree = ast.parse(path.read_bytes(), name)
        except SyntaxError as error:
            broken.append(BrokenFile(f"{name}:{error.lineno or 1}", str(error.msg)))
        except (ValueError, RecursionError, OSError) as error:
            broken.append(BrokenFile(name, str(error)))
        else:
            imports += imports_of(tree, name)
    return imports, broken


def python_files(folder: Path) -> Iterator[Path]:
    """The Python files below ``folder``, sorted, those of virtual environments and the like left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(_SKIPPED_FOLDERS))
        for name in sorted(files):
            if name.endswith(".py") and os.path.isfile(os.path.join(parent, name)):
                yield Path(parent, name)


def imports_of(tree: ast.AST, name: str, *, is_optional: bool = False) -> Iterator[Import]:
    """What ``tree``, of the file ``name``, imports; what only type checkers look at is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, f"{name}:{node.lineno}", is_optional)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and node.module:
                yield Import(node.module, f"{name}:{node.lineno}", is_optional)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for each in node.orelse:
                yield from imports_of(each, name, is_optional=is_optional)
        elif isinstance(node, ast.Try):
            forgives = is_optional or any(_forgives(handler) for handler in node.handlers)
            yield from imports_of(ast.Module(node.body, []), name, is_optional=forgives)
            for part in (*node.handlers, ast.Module([*node.orelse, *node.finalbody], [])):
                yield from imports_of(part, name, is_optional=forgives)
        else:
            yield from imports_of(node, name, is_optional=is_optional)


def _forgives(handler: ast.ExceptHandler) -> bool:
    if handler.type is None:
        return True
    named = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(ast.unparse(each).rpartition(".")[2] in _FORGIVING for each in named)


def missing_imports(imports: list[Import], folder: Path) -> dict[str, list[str]]:
    """Module -> where it is imported, of those that neither ``folder`` nor this Python has."""
    missing: dict[str, list[str]] = {}
    known: dict[str, bool] = {}
    for each in imports:
        if each.is_optional:
            continue
        top = each.module.partition(".")[0]
        name = each.module if top == "ts" else top
        if name not in known:
            known[name] = is_there(name, folder)
        if not known[name]:
            missing.setdefault(name, []).append(each.place)
    return missing


def is_there(name: str, folder: Path) -> bool:
    """Whether module ``name`` can be imported by code in ``folder``; nothing of it is run."""
    top = name.partition(".")[0]
    if any(_in_folder(base, top) for base in {folder, *(path.parent for path in python_files(folder))}):
        return True
    if top in sys.builtin_module_names or top in sys.stdlib_module_names:
        return True
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    # Our own `ts` may be on the path already, and has not every part.
    is_ours = spec is None or str(spec.origin or "").startswith(COMPAT_DIR)
    if top != "ts" or not is_ours:
        return spec is not None
    return _in_folder(Path(COMPAT_DIR), name.replace(".", "/"))


def _in_folder(folder: Path, name: str) -> bool:
    return (folder / f"{name}.py").is_file() or (folder / name).is_dir() or any(folder.glob(f"{name}.*.so"))
