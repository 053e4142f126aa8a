"""What went wrong in a handler: which answer it gives, where it was, and a traceback of the handler's own code.

    describe_failure(error, model_dir) -> Failure(exception, text, where, traceback, status, ...)

Files of the archive are named as they are in it (``handler.py:41``), wherever it was unpacked to. Does not need torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from pyserve.causes import fix_for, package_of
from pyserve.errors import TEXT_SIZE_MAX, JsonObject, ServeError, is_memory_error, is_of_machine, text_of
from pyserve.worker.frames import (
    GROUP_DEPTH_MAX,
    ArchiveFolder,
    Frame,
    frames_of,
    members_of,
    place_of,
    real_path,
    traceback_text,
)

Part = TypeVar("Part")

OUT_OF_RESOURCES = "Out of resources"
PREDICTION_FAILED = "Prediction failed"


class HandlerTimeout(BaseException):
    """Raised inside a handler call that runs past response_timeout; passes ``except Exception``."""


@dataclass(frozen=True)
class Failure:
    """An exception, as clients and the log see it.

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
    name = type(error).__name__
    folder = ArchiveFolder(model_dir)
    # Each part alone: an exception class of the handler's may do anything when it is looked at, and what a part needs
    # may be just what has failed.
    unknown = f"<{name} that cannot be looked at>"
    text = _tried(lambda: folder.shortened(_text(error)), unknown)
    frames: list[Frame] = _tried(lambda: frames_of(error.__traceback__, folder), [])
    place = _tried(lambda: place_of(error, frames, folder), "")
    traceback = _tried(lambda: traceback_text(error, folder), f"{name}: {text}")
    is_memory = _tried(lambda: is_memory_error(error), False)
    answer = _tried(lambda: _answer(error), _Answer()) if not is_memory else _Answer(507, message=OUT_OF_RESOURCES)
    detail = answer.detail
    return Failure(
        exception=_tried(lambda: str(detail.get("exception") or name), name),
        text=_tried(lambda: str(detail.get("text") or text)[:TEXT_SIZE_MAX], text),
        where=_tried(lambda: str(detail.get("where") or place), place),
        traceback=traceback,
        repeats=_tried(lambda: _repeats(error), False) and not is_memory,
        status=answer.status,
        type=answer.type,
        message=answer.message,
        fix=_tried(lambda: str(detail.get("fix") or "") or _fix(error, folder), ""),
        is_expected=answer.is_expected,
        is_own=bool(detail.get("where")) or any(not frame.owner for frame in frames),
    )


def _tried(make: Callable[[], Part], otherwise: Part) -> Part:
    try:
        return make()
    except HandlerTimeout:
        raise
    except BaseException:
        return otherwise


def _text(error: BaseException) -> str:
    """Its own text; of a group that holds one exception also that one's, which is what happened."""
    text = text_of(error)
    inner: BaseException = error
    for _ in range(GROUP_DEPTH_MAX):
        members = members_of(inner)
        inner = members[0] if len(members) == 1 else inner
    return text if inner is error else f"{text}: {type(inner).__name__}: {text_of(inner)}"


class _Answer(NamedTuple):
    """What an exception is answered with."""

    status: int = 503
    type: str = "InternalServerException"
    message: str = PREDICTION_FAILED
    is_expected: bool = False
    detail: JsonObject = {}


def _answer(error: BaseException) -> _Answer:
    if isinstance(error, HandlerTimeout):
        return _Answer(504, message="The handler was still running at response_timeout")
    if isinstance(error, ServeError):
        status = error.status
        if type(status) is not int or not 200 <= status <= 599:  # a class of the handler's
            status = _Answer().status
        detail = error.detail if isinstance(error.detail, dict) else {}
        return _Answer(status, str(error.type), str(error.message), status < 500, detail)
    if _is_prediction_exception(error):
        status, message, is_expected = _own_answer(error)
        return _Answer(status, message=message, is_expected=is_expected)
    return _Answer()


def _repeats(error: BaseException) -> bool:
    # Networks and machines get better by themselves; a missing file does not.
    if isinstance(error, (HandlerTimeout, TimeoutError, ConnectionError)) or is_of_machine(error):
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
    message = _tried(lambda: str(error.message), PREDICTION_FAILED)  # type: ignore[attr-defined]
    try:
        status = int(error.error_code)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return 500, message, False
    return (status, message, True) if 200 <= status <= 599 else (500, message, False)


# --- fixes ----------------------------------------------------------------------------------------------------------


def _fix(error: BaseException, folder: ArchiveFolder) -> str:
    """What would fix it; names no folder of this machine."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _missing_module(error.name, folder)
    if isinstance(error, ImportError) and "relative import" in text_of(error):
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
    if isinstance(error, TypeError) and "JSON object must be str, bytes or bytearray, not" in text_of(error):
        return "a body sent as application/json arrives parsed; call json.loads only on str, bytes or bytearray"
    if isinstance(error, (TypeError, AttributeError)):
        text = text_of(error)
        if re.search(r"\bbytearray\b", text):
            return (
                "a body that is sent neither as JSON nor as text arrives as bytearray: bytes(value) makes bytes of it, "
                "value.decode() text, io.BytesIO(value) a file"
            )
        if "'str' object has no attribute 'decode'" in text:
            return "a body sent as text arrives as str; decode only bytes and bytearray"
    return fix_for(text_of(error))


def _missing_module(name: str, folder: ArchiveFolder) -> str:
    top = name.partition(".")[0]
    if top == "ts":
        return f"pyserve has no {name}; of TorchServe's modules it has those that handlers use"
    package = package_of(name)
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


def _missing_file(filename: str, folder: ArchiveFolder) -> str:
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
        where = "is the unpacked archive" if real_path(os.getcwd()) == folder.path else "is another folder"
    except OSError:
        where = "does not exist any more"
    return (
        f"the current folder {where}; put paths together from context.system_properties['model_dir'], and pack "
        f"{base} with --extra-files"
    )
