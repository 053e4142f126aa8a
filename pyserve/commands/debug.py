"""``pyserve debug``: calls a model's handler in this very process, so that ``breakpoint()`` and debuggers reach it.

Says what each stage received, what it returned and how long that took, and the answer as its client would get it.
"""

from __future__ import annotations

import argparse
import bdb
import functools
import inspect
import logging
import os
import pdb
import re
import sys
import time
from collections.abc import Callable
from itertools import groupby
from typing import Any, TextIO, cast

from pyserve import devices
from pyserve.commands import terminal as console
from pyserve.commands import trial as dry_run
from pyserve.commands.escaping import unescaped_output
from pyserve.commands.model_arguments import given_in
from pyserve.commands.trial import Input, Subject
from pyserve.errors import HandlerError
from pyserve.visible import visible

STAGES = ("preprocess", "inference", "postprocess", "explain_handle", "handle")
BODY_SHOWN_MAX = 4000
_ITEMS_SHOWN_MAX = 3
_TEXT_SHOWN_MAX = 60
_DEPTH_MAX = 4
# Of all answers alike, and no work of the handler's.
_HEADERS_NOT_SHOWN = frozenset(
    {"x-request-id", "pragma", "cache-control", "expires", "date", "content-length", "connection"}
)
# What shows the stages is called between them.
_OUR_FRAMES = re.compile(r"^  \.\.\. \d+ frames? of pyserve\n", re.MULTILINE)
# Whoever steps out of the handler's code does not want to walk through ours.
_NOT_STEPPED_INTO = [
    "pyserve.commands.debug", "pyserve.worker.invoker", "pyserve.worker.entry_point", "pyserve.worker.imported_code",
    "pyserve.commands.trial", "pyserve.commands.cli", "pyserve.commands.terminal", "pyserve.visible",
]  # fmt: skip


def add_debug_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``pyserve debug``."""
    dry_run.add_model_arguments(parser)
    dry_run.add_input_arguments(parser)
    parser.add_argument("-n", "--batch", type=_count, metavar="N", help="a batch of N; the inputs are taken in turn")


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 65_536:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 65536")
    return int(text)


def debug_command(parsed: argparse.Namespace) -> int:
    """Loads and calls the handler. Exit code: 0, or 1 if that failed, with the handler's own frames on stderr.

    Raises:
        ServeError, OSError: the archive or an input cannot be read.
    """
    subject = dry_run.open_subject(parsed.archive, ts_config=parsed.ts_config, given=given_in(parsed))
    console.warn(subject.config.warnings)
    for note in subject.notes:
        print(note)
    interpreter = dry_run.interpreter_for(subject, lambda text: print(text, file=sys.stderr))
    if interpreter != sys.executable:
        sys.stdout.flush()
        os.execv(interpreter, [interpreter, "-m", "pyserve", *sys.argv[1:]])
    inputs = dry_run.read_inputs(parsed) or dry_run.own_samples(subject)[:1]
    try:
        with unescaped_output():
            return _Run(subject).run(inputs, parsed.batch)
    finally:
        subject.archive.close()


def _print(text: str = "", *, file: TextIO | None = None, flush: bool = False) -> None:
    """Prints what was made of a request, an answer or an error."""
    print(visible(text), file=file, flush=flush)


class _Run:
    """One load and one call."""

    def __init__(self, subject: Subject):
        self._subject = subject
        self._spec = dry_run.on_device(subject)
        self._was_left = False

    def run(self, inputs: list[Input], size: int | None) -> int:
        """Returns the exit code."""
        from pyserve.worker.entry_point import HandlerLoadError, HandlerMemoryError, load_entry_point
        from pyserve.worker.main import make_context

        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        logging.captureWarnings(True)
        dry_run.enter(self._spec, self._subject.config)
        _set_breakpoint_hook()
        context = make_context(self._spec)
        try:
            entry = load_entry_point(self._spec)
            _print(f"{self._subject.label}: {entry.name}, on {_device(self._spec.gpu_id)}")
            if not inputs and not dry_run.makes_samples(entry.handler):
                raise dry_run.UsageError(dry_run.NO_INPUT)
            began = time.perf_counter()
            entry.initialize(context)
            _print(f"initialize   {_time(time.perf_counter() - began)}")
        except (HandlerLoadError, HandlerMemoryError) as error:
            if isinstance(error.__cause__, bdb.BdbQuit):
                return 1
            _print(f"\n{error.traceback}\n", file=sys.stderr)
            _print(f"pyserve: error: {self._subject.label} cannot be loaded: {error.reason()}", file=sys.stderr)
            return 1
        inputs = inputs or [dry_run.sample_input(entry.handler, context)]
        return self._call(entry, context, dry_run.fill_batch(inputs, size or len(inputs)))

    def _call(self, entry: Any, context: Any, batch: list[Input]) -> int:
        from pyserve.worker.answer import ERROR, Parts
        from pyserve.worker.invoker import Invoker

        class ShownParts(Parts):
            """Parts of streamed answers, shown as they come."""

            def send(self, answer: Any) -> None:
                """Shows one part."""
                _print(f"answer {answer[0] + 1}, a part: {shown(bytes(answer[4]))}", flush=True)

        told = [f"{each.label}, {len(each.body)} bytes, content-type: {each.content_type or 'none'}" for each in batch]
        for numbers, text in _same_together(told):
            _print(f"request{numbers}: {text}")
        _show_stages(entry)
        invoker = Invoker(self._spec, entry, context, parts=ShownParts(), log_failure=self._tell_failure)
        answers = invoker.run([each.item(number) for number, each in enumerate(batch)])
        if self._was_left:
            return 1
        shown_answers = [self._answer_text(answer) for answer in sorted(answers, key=lambda answer: answer[0])]
        for numbers, text in _same_together(shown_answers):
            _print(f"\nanswer{numbers}:\n{text}")
        failed = sum(answer[1] == ERROR for answer in answers)
        runs_again = self._subject.config.isolate_errors and not (
            entry.has_side_effects or self._subject.archive.config.side_effects
        )
        if failed and len(batch) > 1 and runs_again:
            _print("a server would now call the handler again with each request alone, so that the others get answers")
        return 1 if failed else 0

    def _tell_failure(self, ids: list[str], failure: Any) -> None:
        sys.stdout.flush()
        if failure.exception == "BdbQuit":
            self._was_left = True
            return
        if failure.where and failure.where in failure.traceback:
            _print(f"\n{_OUR_FRAMES.sub('', failure.traceback)}", file=sys.stderr)
        else:  # what was returned is at fault, and only the server's own code was running
            _print(f"\n{f'  {failure.where}' if failure.where else ''}", file=sys.stderr)
            _print(f"{failure.exception}: {failure.text}", file=sys.stderr)
        if failure.fix:
            _print(f"fix: {failure.fix}", file=sys.stderr)
        _print(file=sys.stderr, flush=True)

    def _answer_text(self, answer: Any) -> str:
        from pyserve.http1.answer import AnswerWriter

        response = self._response(answer)
        head = AnswerWriter().head(response, "", True, len(response.body)).decode("latin-1").strip().splitlines()
        kept = [line.rstrip() for line in head if line.partition(":")[0].lower() not in _HEADERS_NOT_SHOWN]
        body = _body_text(bytes(response.body if answer[4] is not None else b"")).splitlines()
        return "\n".join(f"  {line}".rstrip() for line in (*kept, "", *body))

    def _response(self, answer: Any) -> Any:
        import json

        from pyserve.request.messages import ErrorFormat, Response
        from pyserve.worker.answer import ERROR

        _, kind, status, head, body = answer
        if kind == ERROR:
            told = json.loads(bytes(body))
            error = HandlerError(told["message"], detail=told["detail"])
            error.status, error.type = told["status"], told["type"]
            config = self._subject.config
            with_detail = config.compat != "strict" and config.error_detail != "none"
            return ErrorFormat(with_detail=with_detail).response(error, "made-up")
        reason, *rest = head.decode("latin-1").split("\n")
        headers = dict(zip(rest[::2], rest[1::2], strict=False))
        content_type = headers.pop("content-type", None)
        return Response(status, body, content_type=content_type, reason=reason, headers=headers)


# --- breakpoints ------------------------------------------------------------------------------------------------------


def _set_breakpoint_hook() -> None:
    """``breakpoint()`` stops in the handler's code, and stepping out of it does not lead through the server's.

    A debugger's own hook, of an IDE or in $PYTHONBREAKPOINT, stays.
    """
    if sys.breakpointhook is not sys.__breakpointhook__ or "PYTHONBREAKPOINT" in os.environ:
        return
    debuggers: list[pdb.Pdb] = []

    def stop(*_: Any, **__: Any) -> None:
        if not debuggers:
            debuggers.append(pdb.Pdb(skip=_NOT_STEPPED_INTO))
        sys.stdout.flush()
        debuggers[0].set_trace(sys._getframe(1))

    sys.breakpointhook = stop


# --- stages -----------------------------------------------------------------------------------------------------------


def _show_stages(entry: Any) -> None:
    """From now on each call of a stage says what it got and gave."""
    if entry.code.function is not None:
        entry.code.function = _shown_call("handle", entry.code.function)
        return
    for name in STAGES:
        method = getattr(entry.handler, name, None)
        if not callable(method):
            continue
        try:
            setattr(entry.handler, name, _shown_call(name, method))
        except AttributeError:
            continue  # a class with __slots__


def _shown_call(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    label = f"{name:<12} "

    def before(arguments: tuple[Any, ...]) -> float:
        _print(f"{label}received  {shown(arguments[0]) if arguments else 'nothing'}", flush=True)
        return time.perf_counter()

    def after(began: float, result: Any) -> Any:
        _print(f"{label}returned  {shown(result)}   {_time(time.perf_counter() - began)}", flush=True)
        return result

    def failed(began: float, error: BaseException) -> None:
        took = _time(time.perf_counter() - began)
        _print(f"{label}raised    {type(error).__name__}   {took}", flush=True)

    def call(*arguments: Any, **named: Any) -> Any:
        began = before(arguments)
        try:
            result = function(*arguments, **named)
        except BaseException as error:
            failed(began, error)
            raise
        return after(began, result)

    async def call_coroutine(*arguments: Any, **named: Any) -> Any:
        began = before(arguments)
        try:
            result = await function(*arguments, **named)
        except BaseException as error:
            failed(began, error)
            raise
        return after(began, result)

    wrapped: Any = call_coroutine if inspect.iscoroutinefunction(function) else call
    # Not functools.wraps as it is: BaseHandler takes what has __wrapped__ for a stage that measures itself.
    functools.update_wrapper(wrapped, function, updated=())
    if name not in ("handle", "explain_handle") and not hasattr(function, "__wrapped__"):
        del wrapped.__wrapped__
    return cast(Callable[..., Any], wrapped)


def _same_together(texts: list[str]) -> list[tuple[str, str]]:
    """Each text with its numbers, `` 2``, or ``s 2 to 5`` of those in a row that are the same."""
    told, first = [], 1
    for text, group in groupby(texts):
        last = first + len(list(group)) - 1
        told.append((f" {first}" if first == last else f"s {first} to {last}", text))
        first = last + 1
    return told


# --- values, for people -----------------------------------------------------------------------------------------------


def shown(value: Any, depth: int = 0) -> str:
    """Type, shape and beginning of ``value``, short enough for a line."""
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return _shown_text(value)
    if isinstance(value, (bool, int, float, complex, type(None))):
        return repr(value)
    kind = type(value).__name__
    if isinstance(value, dict):
        pairs = [f"{_shown_text(str(key))}: {shown(each, depth + 1)}" for key, each in _first(value.items(), depth)]
        return f"{{{', '.join(pairs)}{', ...' * (len(value) > len(pairs))}}}"
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [shown(each, depth + 1) for each in _first(value, depth)]
        if len(value) > len(parts):
            parts.append("...")
        if depth and len(value) <= _ITEMS_SHOWN_MAX and kind == "list":
            return f"[{', '.join(parts)}]"
        return f"{kind} of {len(value)}: [{', '.join(parts)}]"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        device = f" on {value.device}" if hasattr(value, "device") else ""
        try:
            shape = list(value.shape)
        except TypeError:
            shape = []
        return f"{kind} {str(value.dtype).removeprefix('torch.')} {shape}{device}"
    if kind.endswith("Image") and hasattr(value, "size") and hasattr(value, "mode"):
        return f"picture {value.size} {value.mode}"
    return f"<{type(value).__module__}.{type(value).__qualname__}>".replace("<builtins.", "<")


def _first(values: Any, depth: int) -> list[Any]:
    if depth >= _DEPTH_MAX:
        return []
    return [each for each, _ in zip(values, range(_ITEMS_SHOWN_MAX), strict=False)]


def _shown_text(value: Any) -> str:
    if isinstance(value, str):
        return repr(value) if len(value) <= _TEXT_SHOWN_MAX else f"str of {len(value)}: {value[:_TEXT_SHOWN_MAX]!r}..."
    content = bytes(value[:_TEXT_SHOWN_MAX])
    text = content.decode("ascii", "replace")
    begin = repr(text) if text.isprintable() and "\ufffd" not in text else content[:8].hex(" ")
    more = "..." if len(value) > len(content) or begin != repr(text) else ""
    return f"{type(value).__name__} of {len(value)}: {begin}{more}"


def _body_text(body: bytes) -> str:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return _shown_text(body)
    if len(text) > BODY_SHOWN_MAX:
        return f"{text[:BODY_SHOWN_MAX]}\n... {len(body)} bytes in all"
    return text


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _device(gpu_id: int | None) -> str:
    return "the CPU" if gpu_id is None else devices.name_of(gpu_id)
