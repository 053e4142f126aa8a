"""``isolation: thread``: an archive's own handler in the server's process, and what cannot run there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyserve.archive.archive import open_archive
from pyserve.context import Context
from pyserve.handler import BUILT_IN, BuiltIn, ModelLoadError
from pyserve.handlers.base_handler import BaseHandler
from pyserve.handlers.image_classifier import ImageClassifier
from pyserve.worker import handler_choice as handler_module
from pyserve.worker.handler_choice import load_handler, load_thread_handler, python_lane_reason

BASE = "from pyserve.handlers.base_handler import BaseHandler\n"
GOOD = """
from pyserve.handlers.image_classifier import ImageClassifier
from labels_of_ours import SUFFIX

class Shouting(ImageClassifier):
    topk = 1

    def prepare(self, context):
        super().prepare(context)
        self.suffix = SUFFIX

    def postprocess(self, data):
        return [label + self.suffix for row in super().postprocess(data) for label in row]
"""


@pytest.fixture(autouse=True)
def path_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def archive_with(
    tmp_path: Path, text: str, *, handler: str = "mine.py", isolation: Any = "thread", **files: str
) -> Any:
    folder = tmp_path / "m"
    (folder / "MAR-INF").mkdir(parents=True, exist_ok=True)
    model = {"modelName": "m", "modelVersion": "1.0", "handler": handler, "configFile": "model-config.yaml"}
    (folder / "MAR-INF" / "MANIFEST.json").write_text(json.dumps({"model": model}))
    (folder / "model-config.yaml").write_text(yaml.safe_dump({"isolation": isolation}))
    (folder / "mine.py").write_text(text)
    for name, content in files.items():
        (folder / f"{name}.py").write_text(content)
    return open_archive(folder, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("handler", ["mine.py", "mine", "mine.py:Shouting"])
def test_handler_of_the_archive_runs_in_this_process(tmp_path: Path, handler: str) -> None:
    import torch

    with archive_with(tmp_path, GOOD, handler=handler, labels_of_ours="SUFFIX = '!'") as archive:
        assert python_lane_reason(archive) == ""
        loaded = load_handler(archive)
        loaded.prepare(Context("m", str(archive.model_dir), {"model": {}}))
        assert isinstance(loaded, ImageClassifier)
        assert loaded.postprocess(torch.eye(2)) == ["0!", "1!"]
        assert not {"mine", "labels_of_ours"} & set(sys.modules)


def test_two_archives_with_files_of_one_name_do_not_mix(tmp_path: Path) -> None:
    suffixes = []
    for suffix in "!?":
        with archive_with(tmp_path / str(ord(suffix)), GOOD, labels_of_ours=f"SUFFIX = '{suffix}'") as archive:
            loaded: Any = load_thread_handler(archive)
            loaded.prepare(Context("m", str(archive.model_dir), {"model": {}}))
            suffixes.append(loaded.suffix)
    assert suffixes == ["!", "?"]


def test_names_of_torchserve_can_be_imported_now_and_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compat = tmp_path / "compat"
    compat.mkdir()
    (compat / "stand_in_for_ts.py").write_text(f"{BASE}LATER = 7\n")
    monkeypatch.setattr(handler_module, "COMPAT_DIR", str(compat))
    text = """
from stand_in_for_ts import BaseHandler

class Mine(BaseHandler):
    def preprocess(self, data):
        from stand_in_for_ts import LATER
        return LATER
"""
    for _ in range(2):
        with archive_with(tmp_path, text) as archive:
            assert load_thread_handler(archive).preprocess([]) == 7
    assert sys.path.count(str(compat)) == 1 and sys.path[-1] == str(compat)
    monkeypatch.delitem(sys.modules, "stand_in_for_ts")


@pytest.mark.parametrize("method", handler_module._NOT_IN_A_THREAD)
def test_method_that_the_native_lane_replaces_may_not_be_overridden(tmp_path: Path, method: str) -> None:
    text = f"{BASE}class Mine(BaseHandler):\n    def {method}(self, *args):\n        return super().{method}(*args)\n"
    with archive_with(tmp_path, text) as archive, pytest.raises(ModelLoadError) as caught:
        load_handler(archive)
    for part in ("Mine in mine.py", f"it defines {method}", "Drop 'isolation: thread'"):
        assert part in caught.value.message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def handle(data, context):\n    return data\n", "a function is a whole handler"),
        ("x = 1\n", "exactly one class"),
        (f"{BASE}class A(BaseHandler): pass\nclass B(BaseHandler): pass\n", "found: A, B"),
        ("class Mine:\n    def handle(self, data, context): return data\n", "not derived from BaseHandler"),
        (f"{BASE}class Mine(BaseHandler):\n  def __init__(self):\n    self.handle = print\n", "replaces handle"),
        ("from pyserve.handlers.object_detector import ObjectDetector\nclass Mine(ObjectDetector): pass\n",
         "ObjectDetector, which it is derived from, calls the model in Python"),
    ],
)  # fmt: skip
def test_handler_that_needs_a_process_says_why(tmp_path: Path, text: str, reason: str) -> None:
    with archive_with(tmp_path, text) as archive, pytest.raises(ModelLoadError) as caught:
        load_handler(archive)
    assert reason in caught.value.message and "Drop 'isolation: thread'" in caught.value.message


@pytest.mark.parametrize("name", [*BUILT_IN, "text_handler"])
def test_handler_derived_from_a_built_in_one_runs_where_that_one_does(tmp_path: Path, name: str) -> None:
    built_in = BUILT_IN.get(name, BuiltIn("pyserve.handlers.text_handler", "TextHandler", "python"))
    text = f"from {built_in.module} import {built_in.class_name} as Base\nclass Mine(Base): pass\n"
    with archive_with(tmp_path, text) as archive:
        if built_in.lane == "native":
            assert isinstance(load_handler(archive), built_in.import_class())
            return
        with pytest.raises(ModelLoadError, match=f"{built_in.class_name}, which it is derived from, calls the model"):
            load_handler(archive)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("import missing_module_xyz\n", ("ModuleNotFoundError", "missing_module_xyz", "mine.py:1")),
        ("def f(:\n", ("SyntaxError",)),
        (f"{BASE}\nclass Mine(BaseHandler):\n  def __init__(self):\n    raise ValueError('no')\n",
         ("ValueError: no", "mine.py:5")),
    ],
)  # fmt: skip
def test_handler_that_cannot_be_imported_says_where(tmp_path: Path, text: str, parts: tuple[str, ...]) -> None:
    with archive_with(tmp_path, text) as archive, pytest.raises(ModelLoadError) as caught:
        load_handler(archive)
    assert all(part in caught.value.message for part in parts)
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize("isolation", [None, "process"])
def test_without_it_the_handler_runs_in_a_process(tmp_path: Path, isolation: Any) -> None:
    with archive_with(tmp_path, GOOD, isolation=isolation) as archive:
        assert python_lane_reason(archive) == "mine.py is handler code of its own"


def test_unknown_isolation_is_named_and_left_out(tmp_path: Path) -> None:
    with archive_with(tmp_path, GOOD, isolation="threads") as archive:
        assert any("isolation must be process" in each and "threads" in each for each in archive.config.warnings)
        assert python_lane_reason(archive)  # in worker processes, which is the default


def test_prepare_alone_is_what_base_handler_leaves_to_subclasses() -> None:
    assert not {"prepare", "preprocess", "postprocess", "example_input", "get_insights"} & set(
        handler_module._NOT_IN_A_THREAD
    )
    assert all(callable(getattr(BaseHandler, name)) for name in handler_module._NOT_IN_A_THREAD)
