"""``pyserve tune``: what it tries, how it chooses, what it writes, and that it works on a real archive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from pyserve.commands import cli, tune
from pyserve.commands.tune_measure import Point, Setting
from pyserve.zoo import DigitsNet
from tests.support.handler_archives import write_handler
from tests.support.serving import Server
from tests.support.serving_models import write_eager, write_linear, write_torchscript

QUICK = ["--seconds", "0.2", "--batch-sizes", "1", "4"]


class OnlySmall(nn.Module):
    """Cannot run a batch of more than two."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 2:
            raise ValueError("too many")
        return x + 1


def point(rate: float, *setting: Any, p95_ms: float = 1.0, error: str = "") -> Point:
    return Point(Setting(*setting), rate, p95_ms / 2, p95_ms, error=error)


POINTS = [
    point(100, 1, 2, 1, p95_ms=5), point(195, 1, 2, 4, p95_ms=20), point(200, 2, 1, 8, p95_ms=60),
    point(400, 2, 1, 8, "bf16", p95_ms=30), point(900, 2, 1, 16, error="no memory"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 195),  # as good as the best, with fewer workers and smaller batches
        ({"slo_ms": 10}, 100),
        ({"slo_ms": 4}, None),
        ({"lower_precision": True}, 400),
        ({"lower_precision": True, "slo_ms": 25}, 195),
    ],
)
def test_the_best_is_the_plainest_within_the_target(options: dict[str, Any], rate: float | None) -> None:
    best = tune.choose(POINTS, **{"slo_ms": None, "lower_precision": False, **options})
    assert (best.rate if best is not None else None) == rate


def test_the_rest_of_the_configuration_stays() -> None:
    raw = {"input": {"shape": [4]}, "batchSize": 1, "handler": {"own": True}}
    best = point(10, 2, 1, 8, "bf16")
    text = tune.configuration(raw, best)
    assert text.startswith("# measured by `pyserve tune`: 10.0 items/s")
    assert yaml.safe_load(text) == {
        "input": {"shape": [4]}, "batchSize": 8, "handler": {"own": True}, "minWorkers": 2, "maxWorkers": 2,
        "precision": "bf16", "memoryFormat": "channels_last",
    }  # fmt: skip
    assert "precision" not in yaml.safe_load(tune.configuration(raw, point(10, 1, 1, 1)))


@pytest.mark.slow
def test_an_archive_is_measured_at_every_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "cpu_budget", lambda: 3)
    archive = write_linear(tmp_path)
    out = tmp_path / "tuned.yaml"
    assert cli.main(["tune", str(archive), "--out", str(out), *QUICK]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith(("fp32", "bf16"))]
    tried = [tuple(row[:4]) for row in rows if row[1].isdigit()]
    assert tried == [
        (precision, workers, threads, size)
        for precision in ("fp32", "bf16") for workers, threads in (("1", "3"), ("2", "1"), ("3", "1"))
        for size in ("1", "4")
    ]  # fmt: skip
    assert all(float(row[4]) > 0 and 0 <= float(row[6]) < 10_000 for row in rows if row[1].isdigit())
    assert printed.count("<- best") == 1
    tuned = yaml.safe_load(out.read_text())
    assert tuned["minWorkers"] == tuned["maxWorkers"] and tuned["batchSize"] in (1, 4) and "precision" not in tuned
    assert tuned["input"] == {"dtype": "float32", "shape": [4]}

    assert cli.main(["tune", str(archive), "--out", str(out), *QUICK]) == 1
    assert "--force" in capsys.readouterr().err


@pytest.mark.slow
def test_an_eager_model_is_measured_in_a_lower_precision_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    source = "from pyserve.zoo import DigitsNet\n\n\nclass Digits(DigitsNet):\n    pass\n"
    config = {"input": {"dtype": "float32", "shape": [1, 8, 8]}}
    archive = write_eager(tmp_path, "digits", source, DigitsNet().state_dict(), config=config)
    out = tmp_path / "tuned.yaml"
    command = ["tune", str(archive), "--out", str(out), "--workers", "1", "--batch-sizes", "4", "--seconds", "0.2"]
    assert cli.main([*command, "--precisions", "bf16", "--lower-precision"]) == 0
    assert "<- best" in capsys.readouterr().out
    assert yaml.safe_load(out.read_text())["precision"] == "bf16"
    assert cli.main([*command, "--precisions", "fp32", "--force"]) == 0  # what was traced for bf16 is not taken for it
    assert "precision" not in yaml.safe_load(out.read_text())


def test_a_setting_that_the_model_cannot_run_is_shown_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    archive = write_torchscript(tmp_path, OnlySmall(), "small", config={"input": {"dtype": "float32", "shape": [4]}})
    out = tmp_path / "tuned.yaml"
    assert cli.main(["tune", str(archive), "--out", str(out), "--precisions", "fp32", "--workers", "1", *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "the model cannot run a batch of 4" in printed and "too many" in printed
    assert yaml.safe_load(out.read_text())["batchSize"] == 1


def test_a_target_that_nothing_meets_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "tuned.yaml"
    command = ["tune", str(write_linear(tmp_path)), "--slo-ms", "0.000001", "--out", str(out), *QUICK]
    assert cli.main([*command, "--workers", "1", "--precisions", "fp32"]) == 1
    assert "no setting is done in 1e-06 ms" in capsys.readouterr().err and not out.exists()


def test_handler_code_of_its_own_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = write_handler(tmp_path, "own", "def handle(data, context):\n    return data\n")
    assert cli.main(["tune", str(archive), "--out", str(tmp_path / "x.yaml")]) == 1
    assert "worker processes" in capsys.readouterr().err


@pytest.mark.server
def test_the_best_setting_is_applied_to_the_running_server(tmp_path: Path) -> None:
    server = Server(tmp_path)
    archive = write_linear(server.store)
    server.start("--models", archive.name)
    try:
        tuned = server.run(
            "tune", str(archive), "--apply", "--workers", "2", "--precisions", "fp32", "--seconds", "0.2",
            "--batch-sizes", "4",
        )  # fmt: skip
        assert tuned.returncode == 0, tuned.stderr
        described = server.describe(archive.stem)
        assert (described["minWorkers"], described["batchSize"]) == (2, 4)
        assert len(described["workers"]) == 2
    finally:
        server.run("stop")
