"""New code for a handler that goes on serving: what it holds stays, and code that cannot take over changes nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from pyserve.launch import Reporter
from pyserve.worker.reload import Reloader
from tests.support.loaded_handlers import Load, Loaded, load

__all__ = ["load"]


class Watched:
    """A loaded handler with a reloader, whose reports are kept."""

    def __init__(self, loaded: Loaded):
        self.loaded = loaded
        self._read, write = os.pipe()
        os.set_blocking(self._read, False)
        self._reporter = Reporter(write)
        self._spec = loaded.entry.spec
        self._reloader = Reloader(self._spec, loaded.entry, self._reporter)
        self._age = 0

    def replace(self, old: str, new: str, file: str = "handler.py") -> dict[str, Any]:
        """Saves a file with another text, has it looked at, and gives what was reported."""
        path = Path(self._spec.model_dir, file)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        self._age += 1
        # Another time than before, whatever the file system's clock does.
        os.utime(path, ns=(10**18 + self._age * 10**9, 10**18 + self._age * 10**9))
        self._reloader.look()
        lines = os.read(self._read, 1 << 16).splitlines()
        assert len(lines) == 1
        told: dict[str, Any] = json.loads(lines[0])
        return told

    def answer(self) -> Any:
        """To one request."""
        return self.loaded.ask(1)[0].value


@pytest.fixture
def watch(load: Load) -> Any:
    return lambda source, files=None, **settings: Watched(load(source, files, watch=True, **settings))


HANDLER = """
    import second

    class Handler:
        LAYOUT
        def initialize(self, context):
            self.weights = "loaded once"

        def handle(self, data, context):
            return [["first", self.weights, second.WORD] for row in data]
"""
SECOND = {"second.py": "WORD = 'one'\n"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pass", "__slots__ = ('weights', 'extra')"])
def test_an_instance_takes_on_new_code_and_keeps_what_it_holds(watch: Any, layout: str) -> None:
    watched = watch(HANDLER.replace("LAYOUT", layout), SECOND)
    handler = watched.loaded.entry.handler
    assert watched.answer() == ["first", "loaded once", "one"]
    assert watched.replace('"first"', '"second"') == {"event": "reloaded", "text": "handler.py"}
    assert watched.answer() == ["second", "loaded once", "one"]
    assert watched.replace("one", "two", "second.py")["text"] == "second.py"
    assert watched.answer() == ["second", "loaded once", "two"]
    assert watched.loaded.entry.handler is handler


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("class Handler:", "class Handler:\n    oops(", "SyntaxError"),
        ("import second", "import second, nothing_like_it", "nothing_like_it"),
        ("data, context):", "data):", "it is called with (self, data, context)"),
        ("'extra'", "'another'", "cannot be taken over by its new code"),
        ("__slots__ = ('weights', 'extra')", "pass", "cannot be taken over by its new code"),
        ("class Handler:", "class Handler(dict):", "cannot be taken over by its new code"),
    ],
)
def test_code_that_cannot_take_over_is_told_and_the_old_code_goes_on(watch: Any, old: str, new: str, said: str) -> None:
    watched = watch(HANDLER.replace("LAYOUT", "__slots__ = ('weights', 'extra')"), SECOND)
    told = watched.replace(old, new)
    assert told["event"] == "reload_failed"
    assert said in told["text"]
    assert "reload.py" not in told["text"]
    assert watched.answer() == ["first", "loaded once", "one"]
    # and the fix is taken on
    assert watched.replace(new, old)["event"] == "reloaded"
    assert watched.replace('"first"', '"mended"')["event"] == "reloaded"
    assert watched.answer() == ["mended", "loaded once", "one"]


SERVICE = """
    class Service:
        LAYOUT
        def handle(self, data):
            return [["first", self.weights] for row in data]

    _service = Service()

    def handle(data, context):
        if data is None:
            _service.weights = "loaded once"
            return
        return _service.handle(data)
"""


@pytest.mark.parametrize("layout", ["pass", "__slots__ = ('weights',)"])
def test_a_service_that_the_module_keeps_holds_what_it_held(watch: Any, layout: str) -> None:
    watched = watch(SERVICE.replace("LAYOUT", layout))
    assert watched.answer() == ["first", "loaded once"]
    assert watched.replace('"first"', '"second"')["event"] == "reloaded"
    assert watched.answer() == ["second", "loaded once"]


@pytest.mark.slow
def test_a_service_without_a_place_for_what_it_held_is_told_and_the_old_one_goes_on(watch: Any) -> None:
    watched = watch(SERVICE.replace("LAYOUT", "__slots__ = ('weights',)"))
    told = watched.replace("('weights',)", "('other',)")
    assert told["event"] == "reload_failed"
    assert "Service" in told["text"] and "weights" in told["text"]
    assert watched.answer() == ["first", "loaded once"]


GLOBAL = """
    from dataclasses import dataclass

    LIMIT = 5
    model = None

    @dataclass
    class Model:
        weights: str

        def word(self):
            return "first"

    def handle(data, context):
        global model, made
        if data is None:
            model = Model("loaded once")
            made = ["too"]
            return
        return [[model.word(), model.weights, made, LIMIT] for row in data]
"""


@pytest.mark.slow
def test_what_a_function_put_into_globals_stays_and_what_the_file_says_counts(watch: Any) -> None:
    watched = watch(GLOBAL)
    model = watched.loaded.module.model
    assert watched.answer() == ["first", "loaded once", ["too"], 5]
    assert watched.replace('"first"', '"second"')["event"] == "reloaded"
    assert watched.answer() == ["second", "loaded once", ["too"], 5]
    assert watched.replace("LIMIT = 5", "LIMIT = None")["event"] == "reloaded"
    assert watched.answer() == ["second", "loaded once", ["too"], None]
    assert watched.loaded.module.model is model


@pytest.mark.slow
def test_objects_get_their_old_code_back_when_another_cannot_take_over(watch: Any) -> None:
    source = (
        GLOBAL
        + """
    class Slotted:
        __slots__ = ('weights',)

    kept = None

    def late():
        global kept
        kept = Slotted()
    """
    )
    watched = watch(source)
    watched.loaded.module.late()
    told = watched.replace('"first"', '"second"')
    assert told["event"] == "reloaded"
    path = Path(watched.loaded.entry.spec.model_dir, "handler.py")
    path.write_text(path.read_text().replace('"second"', '"third"'))
    assert watched.replace("('weights',)", "('weights', 'more')")["event"] == "reload_failed"
    assert watched.answer()[0] == "second"
    assert sys.modules["handler"] is watched.loaded.module


def test_nothing_is_reported_when_nothing_changed(load: Load) -> None:
    loaded = load(SERVICE.replace("LAYOUT", "pass"), watch=True)
    read, write = os.pipe()
    os.set_blocking(read, False)
    Reloader(loaded.entry.spec, loaded.entry, Reporter(write)).look()
    with pytest.raises(BlockingIOError):
        os.read(read, 1)


def test_a_traceback_quotes_the_new_file(watch: Any) -> None:
    watched = watch("def handle(data, context):\n    return [1 / x for x in [0] * len(data or ())]\n")
    watched.loaded.ask(1)
    assert "1 / x" in watched.loaded.failures[-1][1].traceback
    watched.replace("1 / x", "2 / x")
    watched.loaded.ask(1)
    assert "2 / x" in watched.loaded.failures[-1][1].traceback
