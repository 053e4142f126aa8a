"""What `pyserve inspect` and `pyserve doctor` say about backends."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pyserve.archive.archive import Archive, open_archive
from pyserve.backends import table
from pyserve.backends.kept import Choice, Made, draft, keep, keep_choice
from pyserve.commands.backend_lines import archive_lines, backend_checks
from pyserve.commands.inspect_archive import inspect_command
from pyserve.cpu_budget import cpu_budget
from tests.support.networks import Affine
from tests.support.serving_models import write_torchscript

INPUT = {"input": {"dtype": "float32", "shape": [16]}}
MISSING = "OpenVINO is not installed here; pip install openvino nncf"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))


def use_row(monkeypatch: pytest.MonkeyPatch, name: str, missing: str) -> None:
    row = dataclasses.replace(table.BACKENDS[name], missing=lambda: missing, version=lambda: "9.9")
    monkeypatch.setitem(table.BACKENDS, name, row)


def keep_made(archive: Archive, made: Made) -> None:
    with draft(archive, made.backend, made.precision) as folder:
        if not made.error:
            with (folder / table.BACKENDS[made.backend].file).open("wb") as file:
                file.truncate(made.size)
        keep(archive, made, folder)


def test_doctor_has_a_line_for_each_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    use_row(monkeypatch, "openvino", MISSING)
    use_row(monkeypatch, "aotinductor", "")
    assert [(check.level, check.text) for check in backend_checks()][1:] == [
        ("NOTE", MISSING),
        ("PASS", "AOTInductor (aotinductor), version 9.9"),
    ]


def test_an_archive_that_was_never_served_here_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_row(monkeypatch, "openvino", MISSING)
    use_row(monkeypatch, "aotinductor", "")
    with open_archive(write_torchscript(tmp_path, Affine(), "m", config=INPUT | {"backend": "auto"})) as archive:
        assert list(archive_lines(archive)) == [
            "auto: none was chosen on this machine yet; a server tries them behind its first requests",
            f"openvino: {MISSING}",
            "aotinductor: not made on this machine yet",
        ]


def test_without_a_word_in_the_archive_the_servers_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_row(monkeypatch, "openvino", "")
    with open_archive(write_torchscript(tmp_path, Affine(), "m", config=INPUT)) as archive:
        keep_made(archive, Made("openvino", "fp32", error="it cannot convert it"))
        assert list(archive_lines(archive)) == [
            "model-config.yaml names none: TorchScript, unless default_backend in config.properties says otherwise",
            "openvino: it cannot be made: it cannot convert it",
        ]


def test_what_was_made_and_chosen_is_shown_with_its_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openvino", "aotinductor"):
        use_row(monkeypatch, name, "")
    with open_archive(write_torchscript(tmp_path, Affine(), "m", config=INPUT | {"batchSize": 8})) as archive:
        keep_made(archive, Made("openvino", "fp32", 3.14, 45_000_000, 5e-6, 14))
        keep_made(archive, Made("aotinductor", "fp32", error="torch.export fails: it counts its words"))
        keep_choice(archive, "fp32", 8, cpu_budget(), Choice("openvino", "17.5 ms for one item"))
        assert list(archive_lines(archive)) == [
            f"openvino was chosen (batch size 8, {cpu_budget()} CPUs): 17.5 ms for one item",
            "openvino: made in 3.1 s, 45.0 MB; largest difference to the model 5.0e-06 (relative) on 14 inputs",
            "aotinductor: it cannot be made: torch.export fails: it counts its words",
        ]
        keep_choice(archive, "fp32", 8, cpu_budget(), Choice("openvino", "17.5 ms for one item", is_final=False))
        assert next(archive_lines(archive)) == (
            f"openvino was chosen so far, and others are still to be tried (batch size 8, {cpu_budget()} CPUs): "
            "17.5 ms for one item"
        )


def test_of_a_backend_that_is_named_only_that_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_row(monkeypatch, "openvino", MISSING)
    use_row(monkeypatch, "aotinductor", "")
    with open_archive(write_torchscript(tmp_path, Affine(), "m", config=INPUT | {"backend": "openvino"})) as archive:
        assert list(archive_lines(archive)) == [
            "model-config.yaml says 'backend: openvino'", f"openvino: {MISSING}",
        ]  # fmt: skip


def test_inspect_prints_them_once_the_archive_was_unpacked_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import argparse

    path = write_torchscript(tmp_path, Affine(), "m", config=INPUT)
    arguments = argparse.Namespace(archive=str(path))
    assert inspect_command(arguments) == 0
    assert "backend:" not in capsys.readouterr().out
    open_archive(path).close()
    assert inspect_command(arguments) == 0
    assert "backend: model-config.yaml names none: TorchScript" in capsys.readouterr().out
