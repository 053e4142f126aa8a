"""Finding a handler by its name, importing it, and leaving nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pyserve.worker.entry_point import HandlerLoadError, HandlerMemoryError
from pyserve.worker.main import make_context
from tests.support.loaded_handlers import Load, entry_of, load, make_spec, write_folder

__all__ = ["load"]

CLASS = """
    class Handler:
        def initialize(self, context):
            self.word = context.model_name

        def handle(self, data, context):
            return [self.word for row in data]
"""


def failure(folder: Path, source: str | None, files: Any = None, **settings: Any) -> HandlerLoadError:
    """What loading (and, if that works, initializing) a handler raises."""
    spec = make_spec(write_folder(folder, source, files), **settings)
    path, modules = list(sys.path), set(sys.modules)
    with pytest.raises((HandlerLoadError, HandlerMemoryError)) as caught, entry_of(spec) as entry:
        entry.initialize(make_context(spec))
    assert sys.path == path
    assert not {"handler", "second", "third"} & (set(sys.modules) - modules)
    error: HandlerLoadError = caught.value  # type: ignore[assignment]
    return error


# --- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "handler", "name", "place"),
    [
        (CLASS, "handler.py", "Handler in handler.py", "handler.py:5 in handle"),
        (CLASS, "handler", "Handler in handler.py", "handler.py:5 in handle"),
        (CLASS + "\n\n    class Other: pass\n", "handler.py:Handler", "Handler in handler.py",
         "handler.py:5 in handle"),
        (CLASS + "\n\n    import json\n    from pathlib import Path\n", "handler.py", "Handler in handler.py",
         "handler.py:5 in handle"),
        ("def handle(data, context):\n    return ['m' for row in data or ()]", "handler.py", "handle in handler.py",
         "handler.py:1 in handle"),
        ("def predict(data, context):\n    return ['m' for row in data or ()]", "handler.py:predict",
         "predict in handler.py", "handler.py:1 in predict"),
        ("from second import handle", "handler.py", "handle in handler.py", "second.py:1 in handle"),
        ("import functools\ndef f(word, data, context):\n    return [word for row in data or ()]\n"
         "handle = functools.partial(f, 'm')", "handler.py", "handle in handler.py", "handler.py:2 in f"),
        ("class Called:\n    def __call__(self, data, context):\n        return ['m' for row in data or ()]\n"
         "handle = Called()", "handler.py", "handle in handler.py", "handler.py:2 in __call__"),
        ("class Static:\n    def initialize(self, context): pass\n    @staticmethod\n    def handle(data, context):\n"
         "        return ['m' for row in data]", "handler.py", "Static in handler.py", "handler.py:4 in handle"),
        ("async def handle(data, context):\n    return ['m' for row in data or ()]", "handler.py",
         "handle in handler.py", "handler.py:1 in handle"),
    ],
)  # fmt: skip
def test_every_form_of_handler_is_found_and_called(
    load: Load, source: str, handler: str, name: str, place: str
) -> None:
    second = {"second.py": "def handle(data, context):\n    return ['m' for row in data or ()]"}
    loaded = load(source, second, handler=handler)
    assert loaded.entry.name == name
    assert loaded.entry.place == place
    assert loaded.entry.is_coroutine == source.startswith("async")
    assert [answer.body for answer in loaded.ask(1, 2)] == [b"m", b"m"]


def test_a_subclass_of_the_base_handler_inherits_what_it_does_not_define(load: Load) -> None:
    source = """
        import torch
        from ts.torch_handler.base_handler import BaseHandler

        class Doubler(BaseHandler):
            def initialize(self, context):
                self.model = lambda x: x * 2
                self.device = "cpu"
                self.initialized = True

            def preprocess(self, data):
                return torch.tensor([row["body"] for row in data])
    """
    loaded = load(source)
    assert loaded.entry.name == "Doubler in handler.py"
    assert [answer.value for answer in loaded.ask([1, 2], [3, 4])] == [[2, 4], [6, 8]]


@pytest.mark.parametrize("name", ["image_classifier", "ts.torch_handler.image_classifier", "tensor"])
def test_built_in_handlers_are_found_by_name(tmp_path: Path, name: str) -> None:
    with entry_of(make_spec(write_folder(tmp_path, None), handler=name)) as entry:
        assert entry.name.endswith("Handler, built in") or entry.name == "ImageClassifier, built in"
        assert entry.handler is not None


def test_a_file_of_the_archive_goes_before_a_built_in_handler_and_modules_that_are_loaded(load: Load) -> None:
    loaded = load(None, {"image_classifier.py": "def handle(data, context):\n    return ['mine'] * len(data or ())"},
                  handler="image_classifier")  # fmt: skip
    assert loaded.ask(1)[0].body == b"mine"


# --- what is no handler -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "handler", "said", "where"),
    [
        ("def handle(data): pass", "handler.py", ["takes (data)", "called with (data, context)"],
         "handler.py:1 in handle"),
        ("def handle(data, context, more): pass", "handler.py", ["(data, context, more)"], "handler.py:1 in handle"),
        ("class A:\n    def initialize(self, context): pass\n\n    def handle(self, data): pass", "handler.py",
         ["handle of A in handler.py takes (self, data)"], "handler.py:4 in handle"),
        ("class A:\n    def initialize(self): pass\n    def handle(self, data, context): pass", "handler.py",
         ["initialize of A in handler.py takes (self)"], "handler.py:2 in initialize"),
        ("\nclass A:\n    def initialize(self, context): pass", "handler.py", ["no method handle", "BaseHandler"],
         "handler.py:1 in A"),
        ("class A:\n    def __init__(self, size): pass\n    initialize = handle = lambda self, *rest: None",
         "handler.py", ["__init__ needs some", "'size'"], "handler.py:2 in __init__"),
        ("class A: pass\nclass B: pass", "handler.py", ["2 classes (A, B)", "--extra-files"], "handler.py"),
        (CLASS + "\n\n    class Net: pass", "handler.py", ["(Handler, Net)", "--handler handler.py:Handler"],
         "handler.py"),
        ("def predict(data, context): pass", "handler.py", ["handler.py:function", "It defines: predict"],
         "handler.py"),
        ("def predict(data, context): pass", "handler.py:run", ["no function 'run'; it defines: predict"],
         "handler.py"),
        ("x = 1", "handler.py", ["It defines: no function"], "handler.py"),
        (None, "image_clasifier", ["no image_clasifier.py", "image_classifier"], None),
        ("x = 1", "handler.py:x", ["no function 'x'"], "handler.py"),
    ],
)  # fmt: skip
def test_what_is_no_handler_is_told_with_its_place_and_the_mend(
    tmp_path: Path, source: str | None, handler: str, said: list[str], where: str | None
) -> None:
    error = failure(tmp_path, source, handler=handler)
    assert error.repeats
    for text in said:
        assert text in error.message
    if where is not None:
        assert error.detail["where"] == where
    assert "pyserve/" not in error.traceback


def test_an_envelope_that_does_not_exist_is_told(tmp_path: Path) -> None:
    error = failure(tmp_path, CLASS, envelope="kservev3")
    assert "kservev3" in error.message and "kservev2" in error.message


# --- what goes wrong while it is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "repeats", "status"),
    [
        ("ValueError('no')", True, 500),
        ("RuntimeError('CUDA error: an illegal memory access')", True, 500),
        ("SystemExit(3)", True, 500),
        ("FileNotFoundError(2, 'none', 'index.json')", True, 500),
        ("ConnectionResetError('hub')", False, 500),
        ("TimeoutError('hub')", False, 500),
        ("MemoryError()", False, 507),
        ("RuntimeError('[enforce fail at alloc] DefaultCPUAllocator: can\\'t allocate memory: 1')", False, 507),
    ],
)
@pytest.mark.parametrize("form", ["module", "function", "class", "coroutine"])
def test_an_error_while_loading_says_whether_it_would_come_again(
    tmp_path: Path, form: str, raised: str, repeats: bool, status: int
) -> None:
    source = {
        "module": f"raise {raised}",
        "function": f"def handle(data, context):\n    raise {raised}",
        "class": f"class A:\n    def handle(self, d, c): pass\n    def initialize(self, c):\n        raise {raised}",
        "coroutine": f"async def handle(data, context):\n    raise {raised}",
    }[form]
    error = failure(tmp_path, source)
    assert (error.repeats, error.status) == (repeats, status)
    assert error.detail["where"].startswith("handler.py:")
    assert error.detail["exception"] == raised.partition("(")[0]
    assert "raise" in error.traceback


def test_an_import_error_in_the_archives_code_is_its_own_and_no_reason_to_look_elsewhere(tmp_path: Path) -> None:
    error = failure(tmp_path, None, {"image_classifier.py": "import nothing_like_it"}, handler="image_classifier")
    assert error.detail["exception"] == "ModuleNotFoundError"
    assert error.detail["where"] == "image_classifier.py:1"


# --- what it does to the process --------------------------------------------------------------------------------------


def test_two_archives_with_the_same_names_do_not_mix(load: Load) -> None:
    source = "import second\ndef handle(data, context):\n    return [second.WORD] * len(data or ())"
    one = load(source, {"second.py": "WORD = 'one'"})
    answer = one.ask(1)[0].body
    one.entry.unload()
    two = load(source, {"second.py": "WORD = 'two'"})
    assert (answer, two.ask(1)[0].body) == (b"one", b"two")


def test_files_of_the_archive_go_before_loaded_modules_of_the_same_name_but_not_before_pythons_own(load: Load) -> None:
    import json

    source = """
        import conftest
        import json

        def handle(data, context):
            return [[conftest.WORD, json.dumps(1)]] * len(data or ())
    """
    before = sys.modules.get("conftest")
    sys.modules["conftest"] = sys.modules[__name__]
    try:
        loaded = load(source, {"conftest.py": "WORD = 'mine'", "json.py": "dumps = None"})
        assert loaded.ask(1)[0].value == ["mine", "1"]
        loaded.entry.unload()
        assert sys.modules["conftest"] is sys.modules[__name__]
        assert sys.modules["json"] is json
    finally:
        if before is None:
            del sys.modules["conftest"]
        else:
            sys.modules["conftest"] = before


def test_packages_in_the_archive_and_imports_that_come_late_are_found(load: Load) -> None:
    source = """
        def handle(data, context):
            if data is not None:
                from parts.words import word
                return [word()] * len(data)
    """
    files = {"parts/__init__.py": "", "parts/words.py": "from . import more\ndef word(): return more.WORD",
             "parts/more.py": "WORD = 'late'"}  # fmt: skip
    assert load(source, files).ask(1)[0].body == b"late"


def test_sys_path_has_the_archive_first_and_torchserves_names_last(load: Load, tmp_path: Path) -> None:
    before = list(sys.path)
    loaded = load(CLASS)
    assert sys.path[0] == str(tmp_path / "archive0")
    # Behind whatever is installed, where TorchServe's own package may be.
    compat = next(i for i, path in enumerate(sys.path) if path.endswith("pyserve/compat"))
    assert compat > max(i for i, path in enumerate(sys.path) if path.endswith("site-packages"))
    loaded.entry.unload()
    assert sys.path == before
    assert "handler" not in sys.modules


def test_a_folder_behind_a_link_is_the_archive_too(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "real", "def handle(data, context):\n    raise ValueError('no')")
    link = tmp_path / "link"
    link.symlink_to(folder)
    error = failure(link, None)
    assert error.detail["where"] == "handler.py:2 in handle"
    assert str(tmp_path) not in error.traceback


def test_a_method_that_initialize_replaces_is_the_one_that_is_called(load: Load) -> None:
    source = """
        class Handler:
            def initialize(self, context):
                self.handle = self.other

            def handle(self, data, context): pass

            def other(self, data, context):
                return ["other"] * len(data)
    """
    loaded = load(source)
    assert loaded.ask(1)[0].body == b"other"
    assert loaded.entry.place == "handler.py:7 in other"


# --- methods that the instance has ------------------------------------------------------------------------------------

OTHER = """
    class Other:
        def load(self, context): self.word = "ok"
        def run(self, data, context): return [self.word] * len(data)
"""


@pytest.mark.parametrize(
    "source",
    [
        """
        class Handler:
            def __init__(self):
                self.initialize = lambda context: None
                self.handle = lambda data, context: ["ok"] * len(data)
        """,
        """
        import functools

        def answer(word, data, context): return [word] * len(data)

        class Handler:
            initialize = functools.partial(lambda *given: None)
            def __init__(self): self.handle = functools.partial(answer, "ok")
        """,
        """
        from other import Other

        class Handler:
            def __init__(self):
                other = Other()
                self.initialize, self.handle = other.load, other.run
        """,
        """
        class Handler:
            __slots__ = ("initialize", "handle")
            def __init__(self):
                self.initialize = lambda context: None
                self.handle = lambda data, context: ["ok"] * len(data)
        """,
        """
        class Handler:
            @property
            def initialize(self): return lambda context: None
            @property
            def handle(self): return lambda data, context: ["ok"] * len(data)
        """,
        """
        class Handler:
            def __getattr__(self, name):
                if name == "initialize": return lambda context: None
                if name == "handle": return lambda data, context: ["ok"] * len(data)
                raise AttributeError(name)
        """,
        """
        class Handler:
            @classmethod
            def initialize(cls, context): cls.word = "ok"
            @staticmethod
            def handle(data, context): return [Handler.word] * len(data)
        """,
        """
        from other import Other

        class Handler:
            def __new__(cls):
                made = Other()
                made.initialize, made.handle = made.load, made.run
                return made
        """,
        """
        import torch

        class Handler(torch.nn.Sequential):  # empty, which is false
            def initialize(self, context): pass
            def handle(self, data, context): return ["ok"] * len(data)
        """,
        """
        class Handler:
            def initialize(self, context): pass
            def handle(self, data, context): return ["ok"] * len(data)

        Again = Handler  # one class, of two names
        """,
    ],
)  # fmt: skip
@pytest.mark.parametrize("lenient", [False, True])
def test_the_instance_is_asked_for_its_methods(load: Load, source: str, lenient: bool) -> None:
    loaded = load(source, {"other.py": OTHER}, lenient=lenient)
    assert [answer.body for answer in loaded.ask(1, 2)] == [b"ok", b"ok"]
    assert loaded.entry.place.startswith(("handler.py:", "other.py:")) or not loaded.entry.place


def test_an_instance_without_them_and_ones_that_take_too_little_are_told(tmp_path: Path) -> None:
    only = "class Handler:\n    def __init__(self): self.handle = lambda data, context: []"
    assert "has no method initialize;" in failure(tmp_path / "a", only).message
    short = (
        "class Handler:\n    def initialize(self, context): pass\n    def __init__(self): self.handle = lambda data: 1"
    )
    error = failure(tmp_path / "b", short)
    assert "handle of Handler in handler.py takes (data); it is called with (self, data, context)" in error.message
    assert error.detail["where"] == "handler.py:3 in <lambda>"


def test_strict_calls_the_method_that_was_there_before_initialize(load: Load) -> None:
    source = """
        class Handler:
            def initialize(self, context):
                self.handle = lambda data, context: ["replaced"] * len(data)

            def handle(self, data, context):
                return ["first"] * len(data)
    """
    assert load(source).ask(1)[0].body == b"replaced"
    assert load(source, lenient=True).ask(1)[0].body == b"first"


@pytest.mark.parametrize("handler", ["handler.py:missing", "handler.py:made.handle"])
def test_the_one_class_stands_in_for_a_function_that_is_missing(
    load: Load, handler: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = CLASS + "\n    made = Handler()\n    def handle(data, context): return []\n"
    loaded = load(source, handler=handler)
    assert loaded.entry.name == "Handler in handler.py"
    assert f"handler.py has no {handler.partition(':')[2]!r}; its class Handler is called" in caplog.text


def test_nothing_stands_in_for_what_is_no_function_or_one_of_several(tmp_path: Path) -> None:
    error = failure(tmp_path / "a", "predict = 5\nclass Handler: pass", handler="handler.py:predict")
    assert "has no function 'predict'" in error.message
    error = failure(tmp_path / "b", "class A: pass\nclass B: pass", handler="handler.py:predict")
    assert "has no function 'predict'" in error.message
