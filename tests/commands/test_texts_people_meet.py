"""Texts that people read when they have typed something slightly wrong: each says what it is, and what to do."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from pyserve.archive.archive import open_archive
from pyserve.archive.model_config import ModelConfig
from pyserve.commands import deploy, status
from pyserve.commands import terminal as console
from pyserve.commands.client import ApiAnswer
from pyserve.commands.model_table import table_lines
from pyserve.config.address import Address
from pyserve.config.config import Config
from pyserve.config.model_source import nearest_file
from pyserve.errors import BadRequestError, ModelNotFoundError
from pyserve.fetch.sources import _find
from pyserve.handler import InputError
from pyserve.handlers.rows import found, row_value
from pyserve.handlers.tensor_spec import TensorSpec
from pyserve.models.sample import packed_sample_arguments
from pyserve.models.served_names import what_was_meant
from pyserve.request.codec import FORM_TYPES, decode_request
from pyserve.request.messages import Request
from pyserve.server.start_table import _is_model


@pytest.mark.parametrize(
    ("name", "near"),
    [("iris", "iris.mar"), ("irsi.mar", "iris.mar"), ("irsi", "iris.mar"), ("cats", "cats.tar.gz"), ("x", "")],
)
def test_a_file_that_was_meant_is_found(name: str, near: str) -> None:
    assert nearest_file(name, ["cats.tar.gz", "iris.mar", "other"]) == near


def test_a_model_that_was_meant_is_named() -> None:
    assert what_was_meant("nett", ["net", "other"]) == {"fix": "did you mean net?"}
    assert what_was_meant("zzz", ["net", "other"]) == {"fix": "the models here are net, other"}
    assert what_was_meant("zzz", [f"m{n}" for n in range(9)])["fix"].endswith("m4, and 4 more")
    assert "no model is served" in what_was_meant("m", [])["fix"]
    assert "the models here" in what_was_meant("n" * 100_000, ["net"])["fix"]


def test_a_file_that_is_not_in_the_store_is_named_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "iris.mar").write_bytes(b"")
    for url, fix in [("irsi.mar", "did you mean iris.mar?"), ("zzz.mar", "put the archive into the model store")]:
        with pytest.raises(ModelNotFoundError) as caught:
            _find(tmp_path, url)
        assert caught.value.message == f"Model not found at: {url}"
        assert caught.value.detail["reason"] == "the model store has no such file"
        assert fix in caught.value.detail["fix"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "18 bytes, a NumPy file (.npy)"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01", "12 bytes, a JPEG picture"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00", "14 bytes, a HEIC picture"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00", "14 bytes, an MP4 file"),
        ({"a": 1}, "a JSON object with 1 member ('a')"),
        ({"a": 1, "b": 2}, "a JSON object with 2 members ('a', 'b')"),
    ],
)
def test_what_was_sent_is_called_what_it_is(body: object, text: str) -> None:
    assert found(body).startswith(text)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("x", "'x'"), ("\ufffd" * 400 + "\x07" * 30, "(430 bytes of binary)"), ("n" * 41, f"'{'n' * 37}...'"),
     ("[1,2,3,4]", "'[1,2,3,4]'"), ("\x1b[2J", "(4 bytes of binary)")],
)  # fmt: skip
def test_a_form_without_input_says_first_what_to_type(name: str, shown: str) -> None:
    with pytest.raises(InputError) as caught:
        row_value({name: b""})
    text = str(caught.value)
    assert text.index("curl -d sends a form") < text.index("curl -T FILE") < text.index(f"its fields: {shown}")
    assert len(text) < 260 and text.isprintable()


@pytest.mark.parametrize("body", [b"\xff\xd8\xff\xe0\x10JFIF=&=&x", b"\x93NUMPY\x01v&&=1", b"a\x01=1&=2"])
def test_a_file_that_was_sent_as_a_form_is_called_that(body: bytes) -> None:
    request = Request("POST", "/", headers=[("content-type", FORM_TYPES[1])], body=bytearray(body))
    with pytest.raises(BadRequestError, match=f"the body is {len(body)} bytes of binary, but was sent as a form"):
        decode_request(request)


def test_what_is_a_form_keeps_its_own_errors() -> None:
    for body, text in [("=1&grün=2", "no name before its '='"), ("a=1&a=2", "more than one field 'a'")]:
        request = Request("POST", "/", headers=[("content-type", FORM_TYPES[1])], body=bytearray(body.encode()))
        with pytest.raises(BadRequestError, match=text):
            decode_request(request)


def test_several_items_are_told_how_to_be_sent() -> None:
    spec = TensorSpec.from_config({"input": {"dtype": "float32", "shape": [4]}})
    for value, is_told in [([[1, 2, 3, 4]] * 2, True), ([[1, 2, 3, 4]], True), ([1, 2, 3], False), ([[[1]]], False)]:
        with pytest.raises(InputError) as caught:
            spec.from_nested(value)
        assert ("instances" in str(caught.value)) is is_told


def test_only_models_of_the_store_are_offered(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "model" / "MAR-INF").mkdir(parents=True)
    (tmp_path / "model" / "MAR-INF" / "MANIFEST.json").write_text("{}")
    (tmp_path / "a.mar").write_bytes(b"")
    config = Config(model_store=str(tmp_path))
    assert [file for file in config.store_files() if _is_model(config, file)] == ["a.mar", "model"]


def test_the_line_to_paste_sends_the_archives_own_sample(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    (folder / "MAR-INF").mkdir(parents=True)
    (folder / "MAR-INF" / "MANIFEST.json").write_text('{"model": {"modelName": "m", "handler": "h.py"}}')
    with open_archive(folder) as archive:
        assert packed_sample_arguments(archive, tmp_path / "samples") == "-T FILE"
        (folder / "sample_input.json").write_text("[1]")
        path = tmp_path / "samples" / "sample_input.json"
        assert (
            packed_sample_arguments(archive, tmp_path / "samples") == f"-H 'Content-Type: application/json' -T {path}"
        )
        assert json.loads(path.read_text()) == [1]


def test_workers_that_count_only_together_are_named() -> None:
    [warning] = ModelConfig.parse(b"minWorkers: 2\n", "m.mar").warnings
    assert "minWorkers counts only together with maxWorkers" in warning
    assert not ModelConfig.parse(b"minWorkers: 2\nmaxWorkers: 2\n", "m.mar").warnings


def test_the_default_version_is_shown_if_there_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = [{"modelName": "m", "modelVersion": each, "minWorkers": 1, "workers": []} for each in ("1.0", "2.0")]
    answers = {"/models?limit=100": {"models": [{"modelName": "m"}]}, "/models/m/all": versions,
               "/models/m": versions[1:]}  # fmt: skip
    monkeypatch.setattr(status, "_get", lambda connection, path: answers[path])
    rows = status.model_rows(Address("127.0.0.1", 1), "")
    assert [row["default"] for row in rows] == [False, True]
    lines = table_lines(rows)
    assert "2.0 (default)" in lines[2] and "(default)" not in lines[1]


def test_what_cannot_be_deleted_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    for default, advised in [("1.0", False), ("2.0", True)]:
        deployment = object.__new__(deploy._Deployment)
        deployment._name, deployment._version = "m", "1.0"
        deployment._target = argparse.Namespace(management=Address("127.0.0.1", 1))  # type: ignore[assignment]
        versions = [{"modelVersion": each, "state": "READY", "minWorkers": 1, "workers": []} for each in ("1.0", "2.0")]
        of_default = [each for each in versions if each["modelVersion"] == default]

        def ask(method: str, rest: str, ok: tuple[int, ...] = (200,)) -> ApiAnswer:
            return ApiAnswer(200, "", versions if rest == "/all" else of_default, b"")  # noqa: B023

        monkeypatch.setattr(deployment, "_ask", ask)
        with pytest.raises(deploy.DeployError, match=r"m 1\.0 is served already") as caught:
            deployment._look_at_what_is_served()
        assert ("DELETE" in caught.value.message) is advised


def test_a_warning_begins_with_the_name_of_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, name in [("/x/bin/pyserve", "pyserve"), ("/x/bin/torchserve", "torchserve")]:
        monkeypatch.setattr(sys, "argv", [path])
        console.warn(["w"])
        assert capsys.readouterr().err == f"{name}: warning: w\n"
