"""The child of `pyserve check`: loads a handler, calls it with several batch sizes and reports what it finds.

It may crash or never end, as somebody's code may; the parent (`commands.check`) sees to that. Reports, one a line:

    step        {"text": "a batch of 2"}                 what is about to be done
    finding     {"kind", "what", "where", "fix"}
    note        {"text"}                                 worth knowing, no defect
    call        {"batch": 2, "ms": 3.1}
    done        {"was_called": bool}
"""

from __future__ import annotations

import atexit
import base64
import faulthandler
import gc
import os
import sys
import sysconfig
import time
from pathlib import Path
from types import FrameType
from typing import Any

from pyserve import launch
from pyserve.archive.import_scan import missing_imports, scan_folder
from pyserve.commands import trial as dry_run
from pyserve.commands.answer_differences import AnswersDiffer, describe_difference
from pyserve.commands.trial import Input
from pyserve.config.config import Config
from pyserve.errors import JsonObject, ServeError
from pyserve.request.json_encoding import find_not_json
from pyserve.worker.failure import describe_failure
from pyserve.worker.result_check import explain_shape
from pyserve.worker.spec import BATCH, WorkerSpec

VARIABLE = "PYSERVE_CHECK"
# Envelopes that are for one request at a time.
_SINGLE_ENVELOPES = ("kserve", "kservev2")
_STDLIB_DIR = os.path.realpath(sysconfig.get_path("stdlib"))


def handover(spec: WorkerSpec, config: Config, inputs: list[Input], *, calls: bool, trace_file: str) -> JsonObject:
    """What the child needs to know.

    Args:
        calls: load the model and call the handler; else its code is imported only.
        trace_file: where the child's stack is written when it crashes or is asked for it (`launch.INTERRUPT`).
    """
    return {
        "spec": spec.to_json(),
        "config": config.to_json(),
        "inputs": [
            {"body": base64.b64encode(each.body).decode(), "headers": each.headers, "label": each.label,
             "query": each.query} for each in inputs
        ],
        "calls": calls,
        "trace_file": trace_file,
        "parent_pid": os.getpid(),
    }  # fmt: skip


def main() -> int:
    atexit.register(gc.freeze)  # to look through torch's objects at the end takes 0.4 s, for nothing
    given, reports = launch.receive(VARIABLE)
    launch.die_with_parent(given["parent_pid"])
    trace = open(given["trace_file"], "w")  # noqa: SIM115 - open until the end
    faulthandler.enable(trace)
    faulthandler.register(launch.INTERRUPT, trace)
    spec = WorkerSpec.from_json(given["spec"])
    inputs = [
        Input(base64.b64decode(each["body"]), [(name, value) for name, value in each["headers"]], each["label"],
              each["query"]) for each in given["inputs"]
    ]  # fmt: skip
    examination = Examination(spec, Config.from_json(given["config"]), reports)
    was_called = examination.run(inputs, calls=given["calls"])
    reports.send("done", was_called=was_called)
    return 0


class Examination:
    """One model, examined from its files to batches of several sizes."""

    def __init__(self, spec: WorkerSpec, config: Config, reports: launch.Reporter):
        self._spec = spec
        self._config = config
        self._reports = reports
        self._said: set[str] = set()
        self._is_sample = False
        self._opened = _OpenedFiles(Path(os.path.realpath(spec.model_dir)))

    def run(self, inputs: list[Input], *, calls: bool) -> bool:
        """Returns whether the handler could be called."""
        # Before the first step: torch takes a while to import, and the steps have a time limit.
        from pyserve.worker.entry_point import HandlerLoadError, HandlerMemoryError, load_entry_point
        from pyserve.worker.main import make_context

        folder = Path(self._spec.model_dir)
        self._step("reading its files")
        imports, broken = scan_folder(folder)
        for each in broken:
            self._find("syntax", f"SyntaxError: {each.text}", each.place, "fix it, or take it out of the archive")
        for module, places in missing_imports(imports, folder).items():
            failure = describe_failure(ModuleNotFoundError(f"No module named {module!r}", name=module), folder)
            what = f"no module named {module!r}, imported at {', '.join(places)}"
            self._find("import", what, places[0], failure.fix, key=f"import {module}")
        self._step("importing the handler")
        dry_run.enter(self._spec, self._config)
        sys.addaudithook(self._opened.watch)
        sys.breakpointhook = self._find_breakpoint
        context = make_context(self._spec)
        try:
            entry = load_entry_point(self._spec)
            if not calls:
                return False
            self._step("loading the model")
            entry.initialize(context)
            if not inputs:
                if not dry_run.makes_samples(entry.handler):
                    self._note(f"the handler was loaded, but not called: {dry_run.NO_INPUT}")
                    return False
                inputs = [dry_run.sample_input(entry.handler, context)]
                self._is_sample = True
        except (HandlerLoadError, HandlerMemoryError) as error:
            self._find_load_error(error)
            return False
        except dry_run.UsageError as error:
            self._note(error.message)
            return False
        finally:
            self._find_opened()
        _Calls(self, entry, context, inputs).run()
        self._find_opened()
        return True

    # --- what is told ---------------------------------------------------------------------------------------------

    def _step(self, text: str) -> None:
        self._reports.send("step", text=text)

    def _note(self, text: str) -> None:
        self._reports.send("note", text=text)

    def _find(self, kind: str, what: str, where: str, fix: str, *, key: str = "") -> None:
        key = key or f"{kind} {where}"
        if key not in self._said:
            self._said.add(key)
            self._reports.send("finding", kind=kind, what=what, where=where, fix=fix)

    def _find_load_error(self, error: ServeError) -> None:
        detail = error.detail
        where = str(detail.get("where", ""))
        if detail.get("exception") == "ModuleNotFoundError" and any(key.startswith("import ") for key in self._said):
            return  # told with all the others
        if detail.get("exception") == "SyntaxError" and f"syntax {where}" in self._said:
            return
        if "text" in detail and not isinstance(error.__cause__, ServeError):
            what = f"{detail.get('exception', 'error')}: {detail['text']}"
        else:
            what = error.message
        self._find("load", f"cannot be loaded: {what}", where, str(detail.get("fix", "")))

    def _find_breakpoint(self, *_: Any, **__: Any) -> None:
        """In place of a debugger, which would find no terminal here; the handler continues."""
        frame = sys._getframe(1)
        name = os.path.relpath(os.path.realpath(frame.f_code.co_filename), os.path.realpath(self._spec.model_dir))
        self._find("breakpoint", "calls breakpoint(): a worker process has no terminal, and the call fails",
                   f"{name}:{frame.f_lineno} in {frame.f_code.co_name}",
                   "take it out; `pyserve debug` stops there")  # fmt: skip

    def _find_opened(self) -> None:
        for name, where in self._opened.missing.items():
            path = f"os.path.join(context.system_properties['model_dir'], {name!r})"
            fix = f"pack {name} with --extra-files and open it as {path}"
            self._find("file", f"opens {name!r}, which is not in the archive", where, fix, key=f"file {name}")
        for name, where in self._opened.written.items():
            self._find("file", f"writes {name!r} into the unpacked archive, which all workers share", where,
                       "write to a folder made with tempfile.mkdtemp()", key=f"written {name}")  # fmt: skip


class _OpenedFiles:
    """Files that the archive's own code opens by relative names.

    Attributes:
        missing, written: name -> where it was opened.
    """

    def __init__(self, folder: Path):
        self.missing: dict[str, str] = {}
        self.written: dict[str, str] = {}
        self._folder = f"{folder}/"

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: called for everything that Python opens."""
        if event != "open" or not isinstance(arguments[0], str) or os.path.isabs(arguments[0]):
            return
        name, mode = arguments[0], arguments[1]
        where = self._place()
        if not where or not name:
            return
        if isinstance(mode, str) and any(letter in mode for letter in "wax+"):
            self.written.setdefault(name, where)
        elif not os.path.exists(name):
            self.missing.setdefault(name, where)

    def _place(self) -> str:
        """Where the archive's code is, if it is what opens a file; libraries look for files that need not be there."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(self._folder):
                name = frame.f_code.co_name
                return f"{file[len(self._folder) :]}:{frame.f_lineno}" + (f" in {name}" if name != "<module>" else "")
            if not file.startswith("<") and not os.path.realpath(file).startswith(_STDLIB_DIR + os.sep):
                return ""
            if "site-packages" in file:
                return ""
            frame = frame.f_back
        return ""


class _Entry:
    """An entry point that keeps what the handler returned."""

    def __init__(self, entry: Any):
        self._entry = entry
        self.returned: Any = None
        self.was_returned = False

    def __call__(self, data: Any, context: Any) -> Any:
        self.was_returned = False
        self.returned = self._entry(data, context)
        self.was_returned = True
        return self.returned

    def run(self, coroutine: Any) -> Any:
        """As of `EntryPoint`."""
        self.returned = self._entry.run(coroutine)
        return self.returned

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)


class _Calls:
    """The calls, from one request to a full batch, and what their answers have in common."""

    def __init__(self, examination: Examination, entry: Any, context: Any, inputs: list[Input]):
        from pyserve.worker.answer import Parts
        from pyserve.worker.invoker import Invoker

        class NoParts(Parts):
            """Parts of streamed answers, of which only the last is looked at."""

            def send(self, answer: Any) -> None:
                """Nobody waits for it."""

        self._told = examination
        self._spec = examination._spec
        self._entry = _Entry(entry)
        self._inputs = inputs
        self._place = self._handle_place(entry)
        self._invoker = Invoker(self._spec, self._entry, context, parts=NoParts())  # type: ignore[arg-type]

    def _handle_place(self, entry: Any) -> str:
        """Where the answers are made: ``handler.py:12 in postprocess``."""
        candidates = (
            [entry.code.function]
            if entry.code.function is not None
            else [getattr(type(entry.handler), name, None) for name in ("postprocess", "handle")]
        )
        folder = os.path.realpath(self._spec.model_dir) + os.sep
        for each in candidates:
            code = getattr(each, "__code__", None)
            if code is not None and os.path.realpath(code.co_filename).startswith(folder):
                name = os.path.realpath(code.co_filename)[len(folder) :]
                return f"{name}:{code.co_firstlineno} in {code.co_name}"
        return entry.name

    def run(self) -> None:
        """One request twice, then two, then a full batch, then the first one again."""
        single = [self._call([each], "one request") for each in self._inputs]
        again = self._call(self._inputs[:1], "the same request again")
        if single[0] is None:
            return
        is_steady = again is not None and not describe_difference(single[0][0], again[0])
        if again is not None and not is_steady:
            self._told._note(
                "the same request got two different answers, so that order and kept state were not looked into; if "
                "that is not meant, is the model in training mode? Call model.eval()"
            )
        batches = []
        for size in self._sizes():
            answers = self._call(dry_run.fill_batch(self._inputs, size), f"a batch of {size}")
            if answers is not None:
                batches.append(answers)
        last = self._call(self._inputs[:1], "the first request once more")
        if not is_steady:
            return
        difference = describe_difference(single[0][0], last[0]) if last is not None else ""
        if difference:  # what then differs in a batch may be for the same reason
            self._told._find(
                "state", "the first request is answered in another way after others came: something is kept from call "
                f"to call ({difference})", self._place,
                "keep nothing of a request in self or in globals; empty lists at the beginning of each call",
            )  # fmt: skip
            return
        for answers in batches:
            self._compare(answers, single)

    def _sizes(self) -> list[int]:
        if self._spec.mode != BATCH or self._spec.envelope in _SINGLE_ENVELOPES:
            self._told._note("called with one request at a time only, as it is served")
            return []
        full = self._spec.batch_size if self._spec.batch_size > 1 else 8
        return sorted({2, full})

    def _call(self, batch: list[Input], text: str) -> list[bytes] | None:
        """The answers, or None after a finding."""
        told = self._told
        told._step(text)
        began = time.perf_counter()
        answers = self._invoker.run([each.item(number) for number, each in enumerate(batch)])
        told._reports.send("call", batch=len(batch), ms=round((time.perf_counter() - began) * 1e3, 2))
        returned = self._entry.returned
        failed = [answer for answer in sorted(answers, key=lambda answer: answer[0]) if answer[1] == 1]
        if not failed:
            return [bytes(answer[4]) for answer in sorted(answers, key=lambda answer: answer[0])]
        if self._entry.was_returned:
            shape = explain_shape(returned, len(batch))
            if shape is not None:
                told._find("shape", f"{text}: {shape.what}", self._place, shape.fix, key=f"shape {shape.kind}")
                return None
        self._find_failed(failed[0], returned, text, len(batch))
        return None

    def _find_failed(self, answer: Any, returned: Any, text: str, size: int) -> None:
        import json

        told = self._told
        ticket = answer[0]
        error = json.loads(bytes(answer[4]))
        detail = error.get("detail", {})
        where = str(detail.get("where") or self._place)
        if self._entry.was_returned and isinstance(returned, list):
            value = returned[ticket]
            as_it_is = isinstance(value, (bytes, bytearray, memoryview, str)) or type(value).__module__ == "torch"
            found = None if as_it_is else find_not_json(value)
            if found is not None:
                told._find("element", f"{text}: element {ticket} of the result holds {found.type}{found.place}; it "
                           "cannot become JSON", self._place, found.fix)  # fmt: skip
                return
            where = self._place
        what = f"{detail.get('exception', 'error')}: {detail.get('text') or error['message']}"
        fix = str(detail.get("fix", ""))
        if self._told._is_sample:
            fix = f"{fix}. " * bool(fix) + "the input was made up: give a real one with -i"
        elif error["status"] < 500:
            fix = fix or "the input was refused: give one that fits with -i"
        elif size > 1 and not fix:
            fix = f"it works for one request; look at what it does with the {size} rows of data"
        told._find("call", f"{text}: {what}", where, fix)

    def _compare(self, answers: list[bytes], single: list[list[bytes] | None]) -> None:
        """The answers of a batch beside those to the same requests alone."""
        told = self._told
        count, size = len(self._inputs), len(answers)
        expected = [single[number % count] for number in range(size)]
        outcome = AnswersDiffer.of(answers, [each[0] if each is not None else None for each in expected])
        if outcome is None:
            return
        if outcome.is_order:
            what = f"request {outcome.at} got the answer to request {outcome.other}: the order is mixed up"
            fix = "return one element per element of data, in the order of data"
        else:
            what = f"the answer to request {outcome.at} is not the one it gets alone ({outcome.text})"
            fix = (
                "an answer must not depend on what else is in the batch: look at paddings, sums and maxima over the "
                "first dimension, and at data[0]"
            )
        told._find("order" if outcome.is_order else "batch", f"a batch of {size}: {what}", self._place, fix)


if __name__ == "__main__":
    sys.exit(main())
