"""Handlers loaded and called in the test's own process, as a worker does it, without a server."""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from pyserve.context import Context
from pyserve.worker.answer import ANSWER, CHUNK, ERROR, LAST, Answer, Parts
from pyserve.worker.entry_point import EntryPoint, load_entry_point
from pyserve.worker.failure import Failure
from pyserve.worker.invoker import Invoker
from pyserve.worker.main import make_context
from pyserve.worker.request import DESCRIBE, Item
from pyserve.worker.spec import WorkerSpec

JSON = "application/json"
# A handler that answers with what it is told to, by the name of a file's function.
ECHO = """
    def handle(data, context):
        if data is not None:
            return [row.get("data", row.get("body")) for row in data]
"""


def write_folder(folder: Path, source: str | None, files: Mapping[str, str] | None = None) -> Path:
    """``folder`` with handler.py and further files by name; sources may be indented."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**({} if source is None else {"handler.py": source}), **(files or {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text).lstrip("\n"))
    return folder


def make_spec(folder: Path, *, config: dict[str, Any] | None = None, **settings: Any) -> WorkerSpec:
    """Of the model in ``folder``.

    Args:
        config: what model-config.yaml says.
    """
    if config:
        settings["config_text"] = yaml.safe_dump(config, sort_keys=False)
    return WorkerSpec(**{"name": "m", "version": "1.0", "model_dir": str(folder), "handler": "handler.py", **settings})


@contextmanager
def entry_of(spec: WorkerSpec) -> Iterator[EntryPoint]:
    """The handler of ``spec``, not initialized. What it did to sys.path and sys.modules is undone afterwards."""
    path, modules = list(sys.path), set(sys.modules)
    try:
        entry = load_entry_point(spec)
        try:
            yield entry
        finally:
            entry.unload()
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None) or ""
            assert not file.startswith(str(spec.model_dir)), f"{name} stayed behind"


def request(
    body: bytes = b"", content_type: str = "", *, query: str = "", headers: Mapping[str, str] | None = None,
    ticket: int = 0, id: str = "", flags: int = 0,
) -> Item:  # fmt: skip
    """An item of a batch, as the server sends it."""
    named = {**(headers or {}), **({"Content-Type": content_type} if content_type else {})}
    text = "\n".join(part for pair in named.items() for part in pair)
    return (ticket, flags, f"{id or f'id-{ticket}'}\0{text}\0{query}".encode(), bytearray(body))


class Told(NamedTuple):
    """One answer, taken apart."""

    kind: int
    status: int
    reason: str
    headers: dict[str, str]
    body: bytes

    @classmethod
    def of(cls, answer: Answer) -> Told:
        _, kind, status, head, body = answer
        reason, *texts = head.decode("latin-1").split("\n")
        return cls(kind, status, reason, dict(zip(texts[::2], texts[1::2], strict=True)), bytes(body))

    @property
    def is_error(self) -> bool:
        return self.kind == ERROR

    @property
    def value(self) -> Any:
        """The body, which is JSON."""
        return json.loads(self.body)

    @property
    def detail(self) -> dict[str, Any]:
        """Of an error."""
        assert self.is_error, self
        found: dict[str, Any] = self.value["detail"]
        return found


class KeptParts(Parts):
    """Keeps the parts of streamed answers; clients can be made to go."""

    def __init__(self) -> None:
        self.sent: list[Answer] = []
        self.gone: set[int] = set()
        self.on_send: Callable[[Answer], None] = lambda answer: None

    def send(self, answer: Answer) -> None:
        self.sent.append(answer)
        self.on_send(answer)

    def is_cancelled(self, ticket: int) -> bool:
        return ticket in self.gone

    def bodies(self, ticket: int = 0) -> list[bytes]:
        """Of the parts that a client got."""
        return [bytes(answer[4]) for answer in self.sent if answer[0] == ticket]


class Loaded:
    """A handler that is ready, and what became of its calls."""

    def __init__(self, spec: WorkerSpec, entry: EntryPoint):
        self.entry = entry
        self.context: Context = make_context(spec)
        entry.initialize(self.context)
        self.parts = KeptParts()
        self.failures: list[tuple[list[str], Failure]] = []
        self.invoker = Invoker(
            spec, entry, self.context, parts=self.parts,
            log_failure=lambda ids, failure: self.failures.append((ids, failure)),
        )  # fmt: skip

    @property
    def module(self) -> Any:
        """The handler's, for what it keeps in globals."""
        return self.entry.code.module

    def run(self, *items: Item) -> list[Told]:
        """The answers in the order of ``items``, whose tickets are set to their places."""
        numbered = [(ticket, item[1], item[2], item[3]) for ticket, item in enumerate(items)]
        answers = self.invoker.run(numbered)
        assert sorted(answer[0] for answer in answers) == list(range(len(items))), "one final answer per item"
        assert all(answer[1] in {ANSWER, ERROR, LAST} for answer in answers)
        return [Told.of(answer) for answer in sorted(answers, key=lambda answer: answer[0])]

    def ask(self, *values: Any) -> list[Told]:
        """The answers to JSON bodies, as one batch."""
        return self.run(*[request(json.dumps(value).encode(), JSON, id=f"r{i}") for i, value in enumerate(values)])

    def describe(self) -> Told:
        """The answer to a description."""
        return self.run(request(flags=DESCRIBE, headers={"describe": "True"}))[0]


Load = Callable[..., Loaded]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """``load(source, files, **settings of the spec)``: a handler in a folder of its own, unloaded after the test."""
    opened: list[AbstractContextManager[EntryPoint]] = []

    def loaded(source: str | None, files: Mapping[str, str] | None = None, **settings: Any) -> Loaded:
        spec = make_spec(write_folder(tmp_path / f"archive{len(opened)}", source, files), **settings)
        entering = entry_of(spec)
        entry = entering.__enter__()
        opened.append(entering)
        return Loaded(spec, entry)

    yield loaded
    for each in reversed(opened):
        each.__exit__(None, None, None)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Texts of the warnings that were logged."""
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


__all__ = ["CHUNK", "ECHO", "JSON", "LAST", "Load", "Loaded", "entry_of", "load", "make_spec", "request", "warnings_in",
           "write_folder"]  # fmt: skip
