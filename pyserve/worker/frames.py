"""Where in an archive's own code something was: its frames, and tracebacks that leave out everybody else's.

Files of the archive are named as they are in it (``handler.py:41``), wherever it was unpacked to. Does not need torch.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import os
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from pyserve.errors import ServeError, text_of
from pyserve.launch import ROOT_DIR

# Of the archive's own frames; a recursion has thousands.
FRAMES_MAX = 30
CHAIN_MAX = 8
# Of exception groups.
GROUP_SIZE_MAX = 8
GROUP_DEPTH_MAX = 3
# Lines before a `def`.
DECORATORS_MAX = 20

# File -> its lines when it was imported: a handler may change or remove its own files, and its folder may go.
_kept_sources: dict[str, list[str]] = {}

_DEFINITION = re.compile(r"\s*(async\s+)?def\s")
_PACKAGE_DIR = str(ROOT_DIR / "pyserve")
_HANDLERS_DIR = os.path.realpath(os.path.join(_PACKAGE_DIR, "handlers"))
_STDLIB_DIR = os.path.realpath(sysconfig.get_path("stdlib"))


class Frame(NamedTuple):
    """One line of a traceback that was running."""

    file: str  # as it is shown
    line: int
    function: str
    source: str
    owner: str  # "" for the archive itself, else the package

    def place(self) -> str:
        """``handler.py:41 in preprocess``."""
        return f"{self.file}:{self.line}" + (f" in {self.function}" if self.function != "<module>" else "")


def real_path(file: str) -> str:
    """Without links; as it is where the current folder is gone or the name is none that a file may have."""
    try:
        return os.path.realpath(file)
    except (OSError, ValueError):
        return file


def keep_source(file: str) -> None:
    """Quotes the lines that ``file`` has now, whatever becomes of it."""
    _kept_sources.pop(file, None)
    linecache.checkcache(file)
    lines = _read_lines(file, None)
    if lines:
        _kept_sources[file] = lines


def _read_lines(file: str, names: dict[str, Any] | None) -> list[str]:
    try:
        return linecache.getlines(file, names)
    except Exception:  # what a module says loads it may raise anything
        return []


def _source_line(file: str, line: int, names: dict[str, Any] | None = None) -> str:
    """Line ``line``, from 1, of ``file``; ``""`` if it is not known."""
    lines = _kept_sources.get(file) or _read_lines(file, names)
    return lines[line - 1] if 0 < line <= len(lines) else ""


class ArchiveFolder:
    """The unpacked archive's folder, under all names that files in it may have."""

    def __init__(self, model_dir: str | Path):
        plain = os.path.normpath(model_dir)
        real = real_path(plain)
        self.path = real
        self._prefixes = tuple(dict.fromkeys(path.rstrip("/") + "/" for path in (plain, real)))

    def name_in(self, file: str) -> str | None:
        """Path in the archive; None if it is not in there, or belongs to a venv in it."""
        if file.startswith("<"):  # no file, such as <frozen importlib._bootstrap>, wherever the current folder is
            return None
        for prefix in self._prefixes:
            if file.startswith(prefix):
                name = file[len(prefix) :]
                return None if "site-packages/" in name else name
        real = real_path(file)
        return self.name_in(real) if real != file and real.startswith(self._prefixes) else None

    def shortened(self, text: str) -> str:
        """``text`` with the archive's files named as they are in it."""
        for prefix in self._prefixes:
            text = text.replace(prefix, "")
        return text


def frames_of(traceback: TracebackType | None, folder: ArchiveFolder) -> list[Frame]:
    """Outermost first. Source lines are read for the archive's own only."""
    frames = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        line = traceback.tb_lineno or 0
        name = folder.name_in(code.co_filename)
        if name is not None:
            source = _source_line(code.co_filename, line, traceback.tb_frame.f_globals).strip()
            frames.append(Frame(name, line, code.co_name, source, ""))
        else:
            file, owner = _foreign(code.co_filename)
            frames.append(Frame(file, line, code.co_name, "", owner))
        traceback = traceback.tb_next
    return frames


def _foreign(file: str) -> tuple[str, str]:
    """How a file outside of the archive is shown, and whose it is."""
    if file.startswith("<"):
        return file, "importlib" if file.startswith("<frozen importlib") else file
    _, found, inside = file.rpartition("site-packages/")
    if not found:
        real = real_path(file)
        for folder, name in ((_PACKAGE_DIR, "pyserve"), (_HANDLERS_DIR, "pyserve/handlers"), (_STDLIB_DIR, "")):
            if real.startswith(folder + "/"):
                inside = os.path.join(name, real[len(folder) + 1 :])
                break
        else:
            inside = "/".join(file.rsplit("/", 2)[-2:])
    return inside, inside.partition("/")[0].removesuffix(".py")


def place_of(error: BaseException, frames: list[Frame], folder: ArchiveFolder) -> str:
    """``handler.py:41 in preprocess``: the innermost of ``frames`` in the archive, else of all; ``""`` for none."""
    if isinstance(error, SyntaxError) and error.filename:
        name = folder.name_in(error.filename)
        if name is not None:
            return f"{name}:{error.lineno}"
    own = next((frame for frame in reversed(frames) if not frame.owner), None)
    if own is None and frames:
        own = next((frame for frame in reversed(frames) if frame.owner != "pyserve"), frames[-1])
    return own.place() if own is not None else ""


def members_of(error: BaseException) -> tuple[BaseException, ...]:
    """The exceptions of a group, Python 3.11's or the one that stands in for it before; none of any other exception."""
    if not any(cls.__name__ == "BaseExceptionGroup" for cls in type(error).__mro__):
        return ()
    members = getattr(error, "exceptions", ())
    return members if isinstance(members, tuple) else ()


def traceback_text(error: BaseException, folder: ArchiveFolder) -> str:
    """The archive's frames with their source lines, others folded; causes come first."""
    parts = []
    chain = list(_chain(error))
    for index, (each, link) in enumerate(reversed(chain)):
        try:
            parts.append("\n".join(_lines(each, folder)))
        except Exception:  # a class of the handler's; the others of the chain are reported
            parts.append(type(each).__name__)
        if index < len(chain) - 1:
            parts.append(link)
    return "\n\n".join(parts)


def _chain(error: BaseException) -> Iterator[tuple[BaseException, str]]:
    """``error`` and what led to it, each with the words that lead from it to the one before."""
    seen: set[int] = set()
    link = ""
    current: BaseException | None = error
    while current is not None and id(current) not in seen and len(seen) < CHAIN_MAX:
        yield current, link
        seen.add(id(current))
        if current.__cause__ is not None:
            current, link = current.__cause__, "which caused:"
        elif current.__context__ is not None and not current.__suppress_context__:
            current, link = current.__context__, "while that was handled:"
        else:
            current = None


def _lines(error: BaseException, folder: ArchiveFolder, depth: int = 0) -> Iterator[str]:
    frames = frames_of(error.__traceback__, folder)
    # How the server came to call the handler is no news; what the handler's callees did is.
    first = next((index for index, frame in enumerate(frames) if not frame.owner), None)
    if first is not None:
        frames = frames[first:]
    elif isinstance(error, ServeError) or (
        isinstance(error, SyntaxError) and error.filename and folder.name_in(error.filename) is not None
    ):
        frames = []  # what pyserve finds fault with says it all
    shown: list[str] = []
    for owner, run in groupby(frames, key=lambda frame: frame.owner):
        group = list(run)
        if not owner:
            shown += [f"  {frame.place()}" + (f"\n    {frame.source}" if frame.source else "") for frame in group]
            continue
        is_last = group[-1] is frames[-1]
        folded = len(group) - is_last
        if folded:
            shown.append(f"  ... {folded} frame{'s' * (folded > 1)} of {owner}")
        if is_last:
            shown.append(f"  {group[-1].place()}")
    if len(shown) > FRAMES_MAX:
        half = FRAMES_MAX // 2
        shown = [*shown[:half], f"  ... {len(shown) - 2 * half} more", *shown[-half:]]
    yield from shown
    if isinstance(error, SyntaxError) and error.filename:
        yield f"  {folder.name_in(error.filename) or error.filename}:{error.lineno}"
        if error.text:
            yield f"    {error.text.strip()}"
        yield f"{type(error).__name__}: {error.msg}"
        return
    text = folder.shortened(text_of(error))
    yield f"{type(error).__name__}: {text}" if text else type(error).__name__
    notes = getattr(error, "__notes__", ())
    for note in notes if isinstance(notes, (list, tuple)) else ():
        if isinstance(note, str):
            yield from (f"  {line}" for line in folder.shortened(note).splitlines())
    members = members_of(error) if depth < GROUP_DEPTH_MAX else ()
    for number, each in enumerate(members[:GROUP_SIZE_MAX], 1):
        yield f"  -- {number} of {len(members)}:"
        yield textwrap.indent("\n".join(_lines(each, folder, depth + 1)), "  ")


def describe_place(function: Any, model_dir: str | Path) -> str:
    """``handler.py:12 in handle``: where ``function``, method or class is defined; ``""`` if that is not known."""
    try:
        return _place_of_definition(function, model_dir)
    except Exception:  # an object of the handler's may do anything when it is looked at
        return ""


def _place_of_definition(function: Any, model_dir: str | Path) -> str:
    if inspect.isclass(function):
        try:
            name = ArchiveFolder(model_dir).name_in(inspect.getfile(function)) or ""
            return f"{name}:{inspect.findsource(function)[1] + 1} in {function.__name__}" if name else ""
        except (OSError, TypeError):
            return ""
    plain = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    code = getattr(plain, "__code__", None)
    if code is None and callable(plain):
        code = getattr(type(plain).__call__, "__code__", None)  # an object that is called
    if code is None:
        return ""
    name = ArchiveFolder(model_dir).name_in(code.co_filename) or _foreign(code.co_filename)[0]
    first = code.co_firstlineno  # its first decorator, if it has any
    lines = range(first, first + DECORATORS_MAX)
    line = next((each for each in lines if _DEFINITION.match(_source_line(code.co_filename, each))), first)
    return f"{name}:{line} in {code.co_name}"
