"""`pyserve archive` tries built-in handlers, so that what cannot be served is said when it is packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyserve.commands import cli


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with net.pt, which takes four numbers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    torch.jit.save(torch.jit.script(torch.nn.Linear(4, 2).eval()), "net.pt")
    return tmp_path


def pack(*more: str, handler: str = "tensor") -> int:
    return cli.main(
        ["archive", "--model-name", "m", "-v", "1.0", "--serialized-file", "net.pt", "--handler", handler, *more]
    )


@pytest.mark.slow
def test_a_missing_input_and_a_misspelt_key_are_said_at_pack(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c.yaml").write_text("inputs: {dtype: float32, shape: [4]}\nbatchSizee: 4\nours: 1\n")
    assert pack("-c", "c.yaml") == 1
    error = capsys.readouterr().err
    assert "did you mean input?" in error and "did you mean batchSize?" in error and "ours" not in error
    assert "m.mar is packed, but cannot be served: cannot be loaded: the model's input is not described" in error


@pytest.mark.slow
def test_a_missing_vocabulary_is_said_at_pack(capsys: pytest.CaptureFixture[str]) -> None:
    assert pack(handler="text_classifier") == 1
    assert "source_vocab.pt is not in the archive" in capsys.readouterr().err


@pytest.mark.slow
def test_what_fails_with_a_made_up_input_is_a_warning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c.yaml").write_text("input: {dtype: float32, shape: [5]}\n")
    assert pack("-c", "c.yaml") == 0
    out, error = capsys.readouterr()
    assert out.startswith(str(folder / "m.mar")) and error.count("\n") == 1
    assert error.startswith("warning: ") and "mat1 and mat2 shapes cannot be multiplied" in error
    (folder / "c.yaml").write_text("input: {dtype: float32, shape: [4]}\n")
    assert pack("-c", "c.yaml", "-f") == 0 and not capsys.readouterr().err


def test_without_a_check_nothing_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    assert pack("--no-check") == 0 and not capsys.readouterr().err
