"""What is told about an exception in a handler: its place, a traceback of the user's own code, and the fix."""

from __future__ import annotations

import builtins
import importlib
import json
import os
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.errors import TEXT_SIZE_MAX, HandlerError, InputError, ServeError
from pyserve.request.messages import ErrorFormat
from pyserve.worker.failure import Failure, HandlerTimeout, describe_failure
from pyserve.worker.frames import FRAMES_MAX, describe_place
from tests.support.loaded_handlers import Load, load, request, write_folder

__all__ = ["load"]


def failed(load: Load, body: str, files: Any = None, row: Any = 1) -> Failure:
    """What calling a handler with ``body``, which sees ``row``, ends in."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    loaded = load(f"def handle(data, context):\n    if data is None: return\n    row = data[0]\n{lines}", files)
    loaded.ask(row)
    ((_, failure),) = loaded.failures
    return failure


def caught(act: Callable[[], Any]) -> BaseException:
    """What ``act`` raises."""
    with pytest.raises(BaseException) as info:
        act()
    return info.value


# --- where ------------------------------------------------------------------------------------------------------------


def test_the_place_is_the_innermost_frame_of_the_archive(load: Load) -> None:
    files = {"parts/__init__.py": "", "parts/second.py": "import json\ndef parse(text):\n    return json.loads(text)"}
    failure = failed(load, "from parts import second\nreturn [second.parse('{')]", files)
    assert failure.exception == "JSONDecodeError"
    assert failure.where == "parts/second.py:3 in parse"
    assert failure.is_own
    assert failure.traceback.splitlines()[:4] == [
        "  handler.py:5 in handle", "    return [second.parse('{')]",
        "  parts/second.py:3 in parse", "    return json.loads(text)",
    ]  # fmt: skip


def test_frames_of_the_server_and_of_libraries_are_folded(load: Load) -> None:
    failure = failed(load, "import torch\nreturn torch.nn.Linear(2, 2)(torch.ones(1, 3)).tolist()")
    lines = failure.traceback.splitlines()
    assert lines[0] == "  handler.py:5 in handle"
    assert "invoker" not in failure.traceback and "entry_point" not in failure.traceback
    assert lines[2].startswith("  ... ") and lines[2].endswith(" of torch")
    assert lines[3].startswith("  torch/nn/modules/linear.py:")
    assert lines[-1].startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert len(lines) == 5


def test_causes_are_told_first_and_a_circle_of_them_ends(load: Load) -> None:
    body = "try:\n    {}['key']\nexcept KeyError as error:\n    raise ValueError('wrapped') from error"
    text = failed(load, body).traceback
    assert text.index("KeyError: 'key'") < text.index("which caused:") < text.index("ValueError: wrapped")
    body = "try:\n    {}['key']\nexcept KeyError:\n    raise ValueError('another')"
    assert "while that was handled:" in failed(load, body).traceback
    body = "try:\n    {}['key']\nexcept KeyError:\n    raise ValueError('alone') from None"
    assert "KeyError" not in failed(load, body).traceback
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert describe_failure(first, "/nowhere").traceback.count("ValueError") == 2


def test_a_recursion_is_cut_short(load: Load) -> None:
    failure = failed(load, "def deeper(n):\n    return deeper(n + 1)\nreturn deeper(0)")
    assert failure.exception == "RecursionError"
    assert len(failure.traceback.splitlines()) <= 2 * FRAMES_MAX + 10
    assert " more\n" in failure.traceback


def test_a_syntax_error_is_its_own_place_and_names_it_once(tmp_path: Path) -> None:
    write_folder(tmp_path, "def f(:\n    pass")
    path = str(tmp_path / "handler.py")
    failure = describe_failure(caught(lambda: compile(Path(path).read_text(), path, "exec")), tmp_path)
    assert failure.where == "handler.py:1"
    assert failure.line() == "SyntaxError: invalid syntax (handler.py:1)"
    assert failure.traceback.splitlines() == ["  handler.py:1", "    def f(:", "SyntaxError: invalid syntax"]


def test_no_folder_of_this_machine_is_told(load: Load, tmp_path: Path) -> None:
    failure = failed(load, "import os\nopen(os.path.join(context.system_properties['model_dir'], 'vocab.txt'))")
    told = json.dumps(failure.detail()) + failure.traceback + failure.line()
    assert str(tmp_path) not in told
    assert "'vocab.txt'" in failure.text


def test_a_text_is_bounded_and_one_line_is_one_line(load: Load) -> None:
    failure = failed(load, "raise ValueError('x\\ny' * 100_000)")
    assert len(failure.text) == TEXT_SIZE_MAX
    assert failure.text.endswith("...")
    assert "\n" not in failure.line()


def test_what_pyserve_finds_fault_with_has_no_place_of_its_own() -> None:
    def refuse() -> None:
        raise InputError("the body is no picture")

    failure = describe_failure(caught(refuse), "/nowhere")
    assert (failure.status, failure.is_expected) == (400, True)
    assert "where" not in failure.detail()

    def find_fault() -> None:
        raise HandlerError("message", detail={"text": "text", "where": "handler.py:3 in handle", "fix": "fix"})

    failure = describe_failure(caught(find_fault), "/nowhere")
    assert failure.detail() == {
        "exception": "HandlerError", "text": "text", "where": "handler.py:3 in handle", "fix": "fix"
    }  # fmt: skip
    assert failure.traceback == "HandlerError: message"


def test_the_place_of_a_definition_is_the_line_of_its_def(tmp_path: Path) -> None:
    import importlib.util

    source = """
        import functools

        @functools.lru_cache(
            maxsize=2,
        )
        def decorated(x): return x

        class Box:
            @property
            # the size
            def size(self): return 1
            def __call__(self): return 2

        quick = lambda x: x
    """
    path = write_folder(tmp_path, source) / "handler.py"
    spec = importlib.util.spec_from_file_location("place_of_a_definition", path)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert describe_place(module.decorated, tmp_path) == "handler.py:6 in decorated"
    assert describe_place(module.Box.size.fget, tmp_path) == "handler.py:11 in size"
    assert describe_place(module.Box(), tmp_path) == "handler.py:12 in __call__"
    assert describe_place(module.quick, tmp_path) == "handler.py:14 in <lambda>"
    assert describe_place(None, tmp_path) == describe_place(len, tmp_path) == ""


# --- what it means ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "repeats"),
    [
        (ValueError("no"), 503, True),
        (RuntimeError("CUDA error: device-side assert"), 503, True),
        (MemoryError(), 507, False),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), 507, False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), 503, True),
        (HandlerTimeout("over"), 504, False),
        (KeyboardInterrupt(), 503, False),
        (SystemExit(3), 503, True),
        (urllib.error.URLError("hub"), 503, False),
        (ConnectionRefusedError("hub"), 503, False),
    ],
)
def test_the_class_decides_on_status_and_repetition(error: BaseException, status: int, repeats: bool) -> None:
    failure = describe_failure(error, "/nowhere")
    assert (failure.status, failure.repeats) == (status, repeats)


# --- the fix ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "requirements", "fix"),
    [
        ("import nothing_like_it", None, "pip install nothing_like_it where pyserve runs, or pack a requirements.txt"),
        ("import nothing_like_it.deep", None, "pip install nothing_like_it where"),
        ("raise ModuleNotFoundError('no', name='cv2')", None, "pip install opencv-python-headless"),
        ("import nothing_like_it", "nothing-like-it==1\n", "install_py_dep_per_model=true"),
        ("import nothing_like_it", "other\n", "add nothing_like_it to the archive's requirements.txt"),
        ("import ts.nothing_like_it", None, "pyserve has no ts.nothing_like_it"),
        ("raise ImportError('attempted relative import with no known parent package')", None, "without a dot"),
    ],
)
def test_a_missing_module_is_told_with_what_to_install(
    load: Load, body: str, requirements: str | None, fix: str
) -> None:
    failure = failed(load, body, {"requirements.txt": requirements} if requirements else None)
    assert fix in failure.fix
    assert failure.line().count("handler.py:4") == 1


@pytest.mark.parametrize(
    ("opened", "fix"),
    [
        ("context.system_properties['model_dir'] + '/vocab.txt'", "vocab.txt is not in the archive; pack it"),
        ("'/nowhere/at/all/vocab.txt'", "vocab.txt is not on this machine under that path"),
        ("'there.txt'", "os.path.join(context.system_properties['model_dir'], 'there.txt')"),
        ("'vocab.txt'", "put paths together from context.system_properties['model_dir']"),
    ],
)
def test_a_missing_file_is_told_with_where_to_put_it(load: Load, opened: str, fix: str) -> None:
    failure = failed(load, f"open({opened})", {"there.txt": ""})
    assert fix in failure.fix
    assert "/nowhere" not in failure.fix


@pytest.mark.parametrize(
    ("body", "fix"),
    [
        ("import json\nreturn [json.loads(row['body'])]", "arrives parsed"),
        ("return [row['data']]", "row.get('data') or row.get('body')"),
        ("return [row['picture']]", ""),
        ("raise TypeError('another')", ""),
    ],
)
def test_confusions_about_rows_are_told(load: Load, body: str, fix: str) -> None:
    failure = failed(load, body, row={"a": 1})
    assert fix in failure.fix
    assert bool(failure.fix) == bool(fix)
    assert failure.detail().get("fix", "") == failure.fix


@pytest.mark.parametrize(
    ("body", "content_type", "fix"),
    [
        ("return [{value: 1}]", "image/jpeg", "bytes(value) makes bytes"),
        ("return [value + 'text']", "image/jpeg", "value.decode() text"),
        ("return [value.encode()]", "", "arrives as bytearray"),
        ("from PIL import Image\nreturn [Image.open(value)]", "image/jpeg", "io.BytesIO(value) a file"),
        ("return [value.decode()]", "text/plain", "arrives as str"),
    ],
)
def test_bytes_and_text_that_are_taken_for_each_other_are_told(
    load: Load, body: str, content_type: str, fix: str
) -> None:
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    loaded = load(f"def handle(data, context):\n    if data is not None:\n        value = data[0]['body']\n{lines}")
    loaded.run(request(b"\x41", content_type))
    ((_, failure),) = loaded.failures
    assert fix in failure.fix


def test_writing_into_the_archive_is_told(tmp_path: Path) -> None:
    error = PermissionError(13, "Permission denied", str(tmp_path / "cache.bin"))
    assert "tempfile" in describe_failure(error, tmp_path).fix


# --- who is told ------------------------------------------------------------------------------------------------------


def test_a_fix_that_stands_beside_no_exception_is_for_everybody() -> None:
    error = ServeError("full", detail={"reason": "queue full", "text": "of 100", "fix": "retry later"})
    public = json.loads(bytes(ErrorFormat(with_private_detail=False).response(error, "id").body))
    assert public["detail"] == {"reason": "queue full", "fix": "retry later", "request_id": "id"}
    assert error.reason() == "of 100"


def test_a_stranger_sees_neither_text_nor_place_nor_fix(load: Load) -> None:
    failure = failed(load, "import nothing_like_it")
    error = HandlerError(failure.message, detail={**failure.detail(), "reason": "public"})
    private = json.loads(bytes(ErrorFormat().response(error, "id").body))["detail"]
    assert private.keys() == {"exception", "text", "where", "fix", "reason", "request_id"}
    public = json.loads(bytes(ErrorFormat(with_private_detail=False).response(error, "id").body))
    assert public["detail"] == {"reason": "public", "request_id": "id"}
    assert "nothing_like_it" not in json.dumps(public)
    assert os.sep not in public["message"]


# --- what a part of the report needs may be just what has failed ------------------------------------------------------

GONE = """
import os, shutil, tempfile
folder = tempfile.mkdtemp()
os.chdir(folder)
shutil.rmtree(folder)
"""


@pytest.fixture
def here() -> Iterator[None]:
    """The current folder, back after the test."""
    folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    yield
    os.fchdir(folder)
    os.close(folder)


@pytest.mark.usefixtures("here")
def test_a_failure_in_a_folder_that_is_gone_has_text_place_and_traceback(load: Load) -> None:
    failure = failed(load, GONE + "open('labels.txt')")
    assert (failure.exception, failure.where) == ("FileNotFoundError", "handler.py:9 in handle")
    assert failure.text == "[Errno 2] No such file or directory: 'labels.txt'"
    assert "open('labels.txt')" in failure.traceback
    assert failure.fix.startswith("the current folder does not exist any more; put paths together from")


@pytest.mark.usefixtures("here")
def test_code_without_a_file_fails_in_a_folder_that_is_gone(load: Load) -> None:
    failure = failed(load, GONE + "exec(compile('def inner():\\n    1 / 0\\ninner()', 'made.py', 'exec'))")
    assert (failure.exception, failure.where) == ("ZeroDivisionError", "handler.py:9 in handle")
    assert "made.py:2 in inner" in failure.traceback
    assert failed(load, "import sys, types\nsys.modules['odd'] = types.ModuleType('odd')\n"
                        "sys.modules['odd'].__file__ = 'odd.py'\n" + GONE + "raise KeyError(1)").where  # fmt: skip


@pytest.mark.parametrize(
    "act", ["os.remove(__file__)", "with open(__file__, 'w') as file: file.write('# nothing\\n' * 20)"]
)
def test_a_traceback_quotes_the_source_that_was_imported(load: Load, act: str) -> None:
    body = f"import os, linecache, pathlib\n{act}\nlinecache.checkcache()\nreturn [1 / 0 for row in data]"
    failure = failed(load, body)
    assert "    return [1 / 0 for row in data]" in failure.traceback
    assert failure.where == "handler.py:7 in <listcomp>"


def test_the_exceptions_of_a_group_are_told(load: Load) -> None:
    if not hasattr(builtins, "ExceptionGroup"):
        pytest.skip("Python 3.11 brought groups")
    body = "try:\n    {}['key']\nexcept KeyError as error:\n    missing = error\n"
    one = failed(load, body + "raise ExceptionGroup('tasks', [missing])")
    assert one.text == "tasks (1 sub-exception): KeyError: 'key'"
    assert one.where == "handler.py:8 in handle"
    lines = one.traceback.splitlines()
    assert lines[-4:] == ["  -- 1 of 1:", "    handler.py:5 in handle", "      {}['key']", "  KeyError: 'key'"]
    two = failed(load, body + "raise ExceptionGroup('tasks', [ExceptionGroup('inner', [missing]), ValueError('b')])")
    assert two.text == "tasks (2 sub-exceptions)"
    assert "KeyError: 'key'" in two.traceback and "  -- 2 of 2:\n  ValueError: b" in two.traceback


def test_notes_of_an_exception_are_told(load: Load) -> None:
    body = "error = ValueError('x')\nerror.__notes__ = ['while row 3 was read', 5]\nraise error"
    assert failed(load, body).traceback.endswith("ValueError: x\n  while row 3 was read")


ODD = """
    from pyserve.handler import HandlerError
    from ts.utils.util import PredictionException


    class Silent(Exception):
        def __str__(self): raise RuntimeError("no text")
        __repr__ = __str__

    class Blind(Silent):
        def __getattribute__(self, name): raise RuntimeError("no " + name)

    class OddStatus(HandlerError):
        status = "teapot"

    class FarStatus(HandlerError):
        status = 70_000

    def handle(data, context):
        if data is None:
            return
        order = data[0]["body"]
        if order == "silent": raise Silent()
        if order == "blind": raise Blind()
        if order == "cause": raise ValueError("told") from Silent()
        if order == "odd cause": raise ValueError("told") from Blind()
        if order == "odd status": raise OddStatus("told")
        if order == "far status": raise FarStatus("told")
        if order == "odd detail": raise HandlerError("told", detail={"text": Silent(), "where": object()})
        if order == "no detail": raise HandlerError("told", detail=[1])
        if order == "odd message": raise PredictionException(Silent(), 418)
        return [1]
"""


@pytest.mark.parametrize(
    ("order", "status", "exception", "text"),
    [
        ("silent", 503, "Silent", "<Silent whose text cannot be made>"),
        ("blind", 503, "Blind", "<Blind whose text cannot be made>"),
        ("cause", 503, "ValueError", "told"),
        ("odd cause", 503, "ValueError", "told"),
        ("odd status", 503, "OddStatus", "told"),
        ("far status", 503, "FarStatus", "told"),
        ("odd detail", 503, "HandlerError", "told"),
        ("no detail", 503, "HandlerError", "told"),
        ("odd message", 418, "PredictionException", "<PredictionException whose text cannot be made>"),
    ],
)
def test_a_class_that_cannot_be_looked_at_costs_only_what_it_hides(
    load: Load, order: str, status: int, exception: str, text: str
) -> None:
    loaded = load(ODD)
    (answer,) = loaded.ask(order)
    assert answer.is_error and answer.status == status
    assert (answer.detail["exception"], answer.detail["text"]) == (exception, text)
    assert loaded.ask("fine")[0].body == b"1"


def test_the_importers_own_frames_are_folded_where_the_current_folder_is_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker stands in its model's folder, where ``<frozen importlib._bootstrap>`` would be the name of a file."""
    (tmp_path / "imports_missing.py").write_text("import json\nimport nothing_like_it\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError) as raised:
        importlib.import_module("imports_missing")
    told = describe_failure(raised.value, tmp_path).traceback
    assert told.startswith("  imports_missing.py:2\n    import nothing_like_it\n") and "frozen" not in told
