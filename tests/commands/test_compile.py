"""`pyserve archive --compile` makes what it can, and says what became of each backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.backends.kept import Made
from pyserve.commands import archive as command
from pyserve.commands.cli import main
from tests.support.networks import save_script
from tests.support.packing import TENSOR_CONFIG


class Making:
    """Stands in for the real one: one backend is made, the other fails."""

    given: tuple[Any, ...] = ()

    def __init__(self, archive: Any, backends: list[str], precision: str, batch_size_max: int, *, nice: int):
        Making.given = backends, precision, batch_size_max, nice

    def wait(self, progress: Any, timeout_s: float, *, advice: str) -> list[Made]:
        progress("making it")
        return [Made("openvino", "fp32", 2.4, 2048, 3e-6), Made("aotinductor", "fp32", error="no compiler\nis here")]

    def stop(self) -> None:
        pass


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "Making", Making)
    save_script(torch.nn.Linear(4, 2), Path("net.pt"))
    Path("config.yaml").write_text(f"{TENSOR_CONFIG}batchSize: 8\n")
    Path("own.py").write_text("def handle(data, context):\n    return data\n")
    return tmp_path


def pack(*arguments: str) -> int:
    return main(["archive", "--model-name", "m", "--version", "1.0", "-c", "config.yaml", "--serialized-file", "net.pt",
                 "--compile", *arguments])  # fmt: skip


def test_each_backend_has_a_line_and_one_that_fails_is_no_failure(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack("--handler", "tensor") == 0
    path, *lines = capsys.readouterr().out.splitlines()
    assert path.startswith(f"{sources / 'm.mar'} (")
    assert lines == [
        "OpenVINO: made in 2 s, 2.0 KiB, largest difference to the model 3e-06",
        "AOTInductor: not made: no compiler is here",
    ]
    assert Making.given == (["openvino", "aotinductor"], "fp32", 8, 0), "somebody waits for it"


def test_nothing_is_made_for_worker_processes(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Making.given = ()
    assert pack("--handler", "own.py:handle") == 0
    assert "nothing is compiled: its handler own.py:handle runs in worker processes" in capsys.readouterr().out
    assert Making.given == ()
