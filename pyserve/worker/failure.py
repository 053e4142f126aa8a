"""What went wrong in somebody's handler: which answer it gives, where it was, and a traceback of their own code.

    describe_failure(error, model_dir) -> Failure(exception, text, where, traceback, status, ...)

Files of the archive are named as they are in it (``handler.py:41``), wherever it was unpacked to. Does not need torch.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from pyserve.errors import TEXT_SIZE_MAX, JsonObject, ServeError, _text_of, is_memory_error
from pyserve.launch import ROOT_DIR

# Of the archive's own frames; a recursion has thousands.
FRAMES_MAX = 30
CHAIN_MAX = 8
# Lines before a `def`.
DECORATORS_MAX = 20

OUT_OF_RESOURCES = "Out of resources"
PREDICTION_FAILED = "Prediction failed"


_DEFINITION = re.compile(r"\s*(async\s+)?def\s")

# Module -> what to install for it, where the two differ.
_PACKAGES = {
    "PIL": "pillow", "cv2": "opencv-python-headless", "sklearn": "scikit-learn", "skimage": "scikit-image",
    "yaml": "pyyaml", "bs4": "beautifulsoup4", "google.protobuf": "protobuf", "dateutil": "python-dateutil",
    "sentence_transformers": "sentence-transformers", "faiss": "faiss-cpu", "Levenshtein": "levenshtein",
}  # fmt: skip

_PACKAGE_DIR = str(ROOT_DIR / "pyserve")
_HANDLERS_DIR = os.path.realpath(os.path.join(_PACKAGE_DIR, "handlers"))
_STDLIB_DIR = os.path.realpath(sysconfig.get_path("stdlib"))


class HandlerTimeout(BaseException):
    """Raised inside a handler call that goes on past response_timeout; passes ``except Exception``."""


@dataclass(frozen=True)
class Failure:
    """An exception, as callers and the log are told of it.

    Attributes:
        exception: name of its class.
        text: its own text, at most TEXT_SIZE_MAX characters.
        where: ``handler.py:41 in preprocess``: the innermost frame in the archive, else the innermost of all.
        traceback: the archive's frames with their source lines, others folded; causes come first.
        repeats: whether loading again would end in the same way.
        status, type, message: of the answer.
        fix: what would fix it, ``""`` if that is not known.
        is_expected: whether a handler or its caller meant it: no defect to be looked for.
        is_own: whether `where` is in the archive.
    """

    exception: str
    text: str
    where: str
    traceback: str
    repeats: bool
    status: int
    type: str
    message: str
    fix: str = ""
    is_expected: bool = False
    is_own: bool = True

    def detail(self) -> JsonObject:
        """For ``detail`` of the answer."""
        detail = {"exception": self.exception, "text": self.text}
        if self.is_own or not self.is_expected:  # the caller's fault, found by us: no place to look at
            detail["where"] = self.where
        return {**detail, "fix": self.fix} if self.fix else detail

    def line(self) -> str:
        """All in one line: ``ModuleNotFoundError: No module named 'timm' (handler.py:3). Fix: ...``."""
        text = " ".join(self.text.split())
        said = f"{self.exception}: {text}" if text else self.exception
        place = f" ({self.where})" if self.where else ""
        return f"{said}{place}" + (f". Fix: {self.fix}" if self.fix else "")


def describe_failure(error: BaseException, model_dir: str | Path) -> Failure:
    """What ``error``, raised by a handler of the archive in ``model_dir`` or on its behalf, means."""
    try:
        return _described(error, model_dir)
    except BaseException as own:  # an exception class of the handler's may do anything when it is looked at
        name = type(error).__name__
        text = f"<{name} that cannot be looked at: {type(own).__name__}>"
        return Failure(
            name, text, "", f"{name}: {text}", False, 503, "InternalServerException", PREDICTION_FAILED, is_own=False
        )


def _described(error: BaseException, model_dir: str | Path) -> Failure:
    folder = _Folder(model_dir)
    text = folder.shortened(_text_of(error))
    frames = _frames(error.__traceback__, folder)
    place = _place(error, frames, folder)
    is_memory = is_memory_error(error)
    status, kind, message, is_expected = 503, "InternalServerException", PREDICTION_FAILED, False
    detail: JsonObject = {}
    if is_memory:
        status, message = 507, OUT_OF_RESOURCES
    elif isinstance(error, HandlerTimeout):
        status, message = 504, "The handler was still running at response_timeout"
    elif isinstance(error, ServeError):
        status, kind, message, detail = error.status, error.type, error.message, error.detail
        is_expected = status < 500
    elif _is_prediction_exception(error):
        status, message, is_expected = _own_answer(error)
    return Failure(
        exception=str(detail.get("exception") or type(error).__name__),
        text=str(detail.get("text") or text)[:TEXT_SIZE_MAX],
        where=str(detail.get("where") or place),
        traceback=_traceback_text(error, folder),
        repeats=_repeats(error) and not is_memory,
        status=status,
        type=kind,
        message=message,
        fix=str(detail.get("fix") or "") or _fix(error, folder),
        is_expected=is_expected,
        is_own=bool(detail.get("where")) or any(not frame.owner for frame in frames),
    )


def describe_place(function: Any, model_dir: str | Path) -> str:
    """``handler.py:12 in handle``: where ``function``, method or class is defined; ``""`` if that is not known."""
    if inspect.isclass(function):
        try:
            name = _Folder(model_dir).name_in(inspect.getfile(function)) or ""
            return f"{name}:{inspect.findsource(function)[1] + 1} in {function.__name__}" if name else ""
        except (OSError, TypeError):
            return ""
    plain = inspect.unwrap(function.func if isinstance(function, functools.partial) else function)
    code = getattr(plain, "__code__", None)
    if code is None and callable(plain):
        code = getattr(type(plain).__call__, "__code__", None)  # an object that is called
    if code is None:
        return ""
    name = _Folder(model_dir).name_in(code.co_filename) or _foreign(code.co_filename)[0]
    first = code.co_firstlineno  # its first decorator, if it has any
    lines = range(first, first + DECORATORS_MAX)
    line = next((each for each in lines if _DEFINITION.match(linecache.getline(code.co_filename, each))), first)
    return f"{name}:{line} in {code.co_name}"


def _repeats(error: BaseException) -> bool:
    # Networks get better by themselves; a missing file does not.
    if isinstance(error, (HandlerTimeout, TimeoutError, ConnectionError)):
        return False
    names = {cls.__name__ for cls in type(error).__mro__}
    if names & {"URLError", "ConnectionError", "ConnectTimeout", "ReadTimeout", "gaierror", "HTTPError"}:
        return False
    return isinstance(error, (Exception, SystemExit))


def _is_prediction_exception(error: BaseException) -> bool:
    # By shape: importing the class would bring torch along.
    named = any(cls.__name__ == "PredictionException" for cls in type(error).__mro__)
    return named and hasattr(error, "message") and hasattr(error, "error_code")


def _own_answer(error: BaseException) -> tuple[int, str, bool]:
    """Status and message that a handler chose, and whether they can be used."""
    message = str(error.message)  # type: ignore[attr-defined]
    try:
        status = int(error.error_code)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return 500, message, False
    return (status, message, True) if 200 <= status <= 599 else (500, message, False)


# --- frames ---------------------------------------------------------------------------------------------------------


class _Frame(NamedTuple):
    file: str  # as it is shown
    line: int
    function: str
    source: str
    owner: str  # "" for the archive itself, else the package

    def place(self) -> str:
        """``handler.py:41 in preprocess``."""
        return f"{self.file}:{self.line}" + (f" in {self.function}" if self.function != "<module>" else "")


class _Folder:
    """The unpacked archive's folder, under all names that files in it may have."""

    def __init__(self, model_dir: str | Path):
        plain = os.path.abspath(model_dir)
        real = os.path.realpath(model_dir)
        self.path = real
        self._prefixes = tuple(dict.fromkeys(path.rstrip("/") + "/" for path in (plain, real)))

    def name_in(self, file: str) -> str | None:
        """Path in the archive; None if it is not in there, or belongs to a venv in it."""
        for prefix in self._prefixes:
            if file.startswith(prefix):
                name = file[len(prefix) :]
                return None if "site-packages/" in name else name
        real = os.path.realpath(file)
        return self.name_in(real) if real != file and real.startswith(self._prefixes) else None

    def shortened(self, text: str) -> str:
        """``text`` with the archive's files named as they are in it."""
        for prefix in self._prefixes:
            text = text.replace(prefix, "")
        return text


def _frames(traceback: TracebackType | None, folder: _Folder) -> list[_Frame]:
    """Outermost first. Source lines are read for the archive's own only."""
    frames = []
    while traceback is not None:
        code = traceback.tb_frame.f_code
        line = traceback.tb_lineno or 0
        name = folder.name_in(code.co_filename)
        if name is not None:
            source = linecache.getline(code.co_filename, line, traceback.tb_frame.f_globals).strip()
            frames.append(_Frame(name, line, code.co_name, source, ""))
        else:
            file, owner = _foreign(code.co_filename)
            frames.append(_Frame(file, line, code.co_name, "", owner))
        traceback = traceback.tb_next
    return frames


def _foreign(file: str) -> tuple[str, str]:
    """How a file outside of the archive is shown, and whose it is."""
    if file.startswith("<"):
        return file, "importlib" if file.startswith("<frozen importlib") else file
    _, found, inside = file.rpartition("site-packages/")
    if not found:
        real = os.path.realpath(file)
        for folder, name in ((_PACKAGE_DIR, "pyserve"), (_HANDLERS_DIR, "pyserve/handlers"), (_STDLIB_DIR, "")):
            if real.startswith(folder + "/"):
                inside = os.path.join(name, real[len(folder) + 1 :])
                break
        else:
            inside = os.path.join(*file.rsplit("/", 2)[-2:])
    return inside, inside.partition("/")[0].removesuffix(".py")


def _place(error: BaseException, frames: list[_Frame], folder: _Folder) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        name = folder.name_in(error.filename)
        if name is not None:
            return f"{name}:{error.lineno}"
    own = next((frame for frame in reversed(frames) if not frame.owner), None)
    if own is None and frames:
        own = next((frame for frame in reversed(frames) if frame.owner != "pyserve"), frames[-1])
    return own.place() if own is not None else ""


def _traceback_text(error: BaseException, folder: _Folder) -> str:
    parts = []
    chain = list(_chain(error))
    for index, (each, link) in enumerate(reversed(chain)):
        parts.append("\n".join(_lines(each, folder)))
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


def _lines(error: BaseException, folder: _Folder) -> Iterator[str]:
    frames = _frames(error.__traceback__, folder)
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
    text = folder.shortened(_text_of(error))
    yield f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- fixes ----------------------------------------------------------------------------------------------------------


def _fix(error: BaseException, folder: _Folder) -> str:
    """What would fix it; names no folder of this machine."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _missing_module(error.name, folder)
    if isinstance(error, ImportError) and "relative import" in _text_of(error):
        return "files of an archive are modules of no package: import them by name, without a dot"
    if isinstance(error, FileNotFoundError) and isinstance(error.filename, str):
        return _missing_file(error.filename, folder)
    if isinstance(error, PermissionError) and isinstance(error.filename, str) and folder.name_in(error.filename):
        return "the unpacked archive is not for writing; write to a folder made with tempfile"
    if isinstance(error, KeyError) and error.args and error.args[0] in ("body", "data"):
        return (
            "a plain body is under 'body', a form's fields under their own names: "
            "use row.get('data') or row.get('body')"
        )
    if isinstance(error, TypeError) and "JSON object must be str, bytes or bytearray, not" in _text_of(error):
        return "a body sent as application/json arrives parsed; call json.loads only on str, bytes or bytearray"
    if isinstance(error, (TypeError, AttributeError)):
        text = _text_of(error)
        if re.search(r"\bbytearray\b", text):
            return (
                "a body that is sent neither as JSON nor as text arrives as bytearray: bytes(value) makes bytes of it, "
                "value.decode() text, io.BytesIO(value) a file"
            )
        if "'str' object has no attribute 'decode'" in text:
            return "a body sent as text arrives as str; decode only bytes and bytearray"
    return ""


def _missing_module(name: str, folder: _Folder) -> str:
    top = name.partition(".")[0]
    if top == "ts":
        return f"pyserve has no {name}; of TorchServe's modules it has those that handlers use"
    package = _PACKAGES.get(name, _PACKAGES.get(top, top))
    file = Path(folder.path) / "requirements.txt"
    try:
        wanted = file.read_text("utf-8", "replace").lower().replace("_", "-")
    except OSError:
        return (
            f"if it is a file of yours, pack it with --extra-files; else pip install {package} where pyserve "
            f"runs, or pack a requirements.txt that names {package}"
        )
    if re.search(rf"^\s*{re.escape(package.lower().replace('_', '-'))}\b", wanted, re.MULTILINE):
        return f"requirements.txt names {package}, but it is not installed: set install_py_dep_per_model=true"
    return f"pip install {package} where pyserve runs, or add {package} to the archive's requirements.txt"


def _missing_file(filename: str, folder: _Folder) -> str:
    name = folder.name_in(filename)
    if name is not None:
        return f"{name} is not in the archive; pack it with --extra-files"
    base = os.path.basename(filename)
    if os.path.isabs(filename):
        return f"{base} is not on this machine under that path; pack it with --extra-files and read it from model_dir"
    if os.path.exists(os.path.join(folder.path, base)):
        return (
            f"the archive has {base}; open it as os.path.join(context.system_properties['model_dir'], {base!r}), "
            "whatever the current folder is"
        )
    try:
        here = os.getcwd()
    except OSError:
        here = "gone"
    where = "the unpacked archive" if os.path.realpath(here) == folder.path else "another folder"
    return (
        f"the current folder is {where}; put paths together from context.system_properties['model_dir'], and pack "
        f"{base} with --extra-files"
    )
