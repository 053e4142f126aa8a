"""Handlers that are loaded and tried in the test's own process, as a worker does it before it counts as loaded."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pyserve.context import Context
from pyserve.worker.batch_trial import Verdict
from pyserve.worker.entry_point import EntryPoint
from pyserve.worker.main import make_context
from pyserve.worker.rehearsal import rehearse
from tests.support.loaded_handlers import entry_of, make_spec, write_folder

INPUT = {"dtype": "float32", "shape": [4]}
MODEL = """
    import torch
    from typing import Any, NamedTuple, Optional

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x, *others):
            self.calls += 1
            return {result}
"""


class Tried:
    """A handler that was tried."""

    def __init__(self, entry: EntryPoint, context: Context, verdict: Verdict):
        self.entry = entry
        self.context = context
        self.verdict = verdict

    @property
    def model(self) -> Any:
        return self.entry.handler.model


Try = Callable[..., Tried]


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[Try]:
    """``attempt(handler, files, config=..., **settings)``: loads and tries a handler in this process.

    ``result`` is what a built-in handler's model gives for ``x``.
    """
    with ExitStack() as stack:

        def tried(
            handler: str = "tensor", files: Mapping[str, str | bytes] | None = None, *, result: str = "x",
            config: dict[str, Any] | None = None, model: dict[str, str] | None = None, **settings: Any,
        ) -> Tried:  # fmt: skip
            folder = write_folder(tmp_path / "archive", None)
            named = {"model.py": MODEL.replace("{result}", result), **(files or {})}
            for name, content in named.items():
                text = textwrap.dedent(content).encode() if isinstance(content, str) else content
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(text)
            manifest = {"model": model or {"modelFile": "model.py"}}
            spec = make_spec(
                folder, handler=handler, manifest=manifest, config={"input": INPUT} if config is None else config,
                **settings,
            )  # fmt: skip
            entry = stack.enter_context(entry_of(spec))
            context = make_context(spec)
            entry.initialize(context)
            return Tried(entry, context, rehearse(spec, entry, context, began=time.monotonic()))

        yield tried
