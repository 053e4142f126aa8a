"""``pyserve tune``: what it tries, how it chooses, what it writes, and that it works on a real archive."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from torch import nn

from pyserve.archive.archive import Archive
from pyserve.backends.table import BACKENDS, OPENVINO
from pyserve.commands import cli, tune
from pyserve.commands.tables import table_text
from pyserve.commands.tune_measure import Point, Setting
from pyserve.zoo import DigitsNet
from tests.support.handler_archives import write_handler
from tests.support.serving import Server
from tests.support.serving_models import write_eager, write_linear, write_torchscript

PLAIN = ["--backends", "torchscript"]
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


def test_of_equal_ones_the_backend_that_is_served_anyway_is_taken() -> None:
    equal = [point(100, 1, 1, 1, "fp32", "openvino"), point(99, 1, 1, 4, "fp32", "torchscript")]
    best = tune.choose(equal, slo_ms=None, lower_precision=False)
    assert best is equal[1]


def test_the_frontier_is_what_no_other_setting_beats(seed: int) -> None:
    dice = random.Random(seed)
    points = [point(dice.randint(1, 9), 1, 1, number, p95_ms=dice.randint(1, 9)) for number in range(1, 40)]
    points.append(point(99, 1, 1, 40, p95_ms=0.1, error="no memory"))
    found = tune.frontier(points)
    worked = [each for each in points if not each.error]

    def beats(one: Point, other: Point) -> bool:
        values = (one.rate, -one.p95_ms), (other.rate, -other.p95_ms)
        return all(mine >= its for mine, its in zip(*values, strict=True)) and values[0] != values[1]

    unbeaten = [each for each in worked if not any(beats(other, each) for other in worked)]
    assert {(each.rate, each.p95_ms) for each in found} == {(each.rate, each.p95_ms) for each in unbeaten}
    assert [each.rate for each in found] == sorted({each.rate for each in found}, reverse=True)


def test_the_curve_shows_the_frontier_the_best_and_what_could_not_be_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    points = [
        point(100, 1, 2, 1, p95_ms=5), point(90, 1, 2, 4, p95_ms=9), point(150, 2, 1, 4, "fp32", "openvino", p95_ms=20),
        point(0, 2, 1, 4, "bf16", "aotinductor", error="AOTInductor: a C++ compiler (g++) is not here"),
    ]  # fmt: skip
    tune.print_curve(points, points[2], None)
    header, *rows, why, legend = capsys.readouterr().out.splitlines()
    assert header.split()[:6] == ["BACKEND", "PRECISION", "WORKERS", "THREADS", "BATCH", "ITEMS/S"]
    assert [" ".join(row.split()[:6]) for row in rows[:3]] == [
        "* torchscript fp32 1 2 1", "torchscript fp32 1 2 4 90.0", "* openvino fp32 2 1 4",
    ]  # fmt: skip
    assert rows[2].endswith("<- best") and why.endswith("a C++ compiler (g++) is not here")
    assert legend.startswith("* ")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_curve_fits_its_window_and_keeps_what_counts(width: int) -> None:
    points = [point(12345.6, 16, 2, 128, "bf16", "torchscript", p95_ms=123.456), point(0, 1, 1, 1, error="why " * 30)]
    rows = [tune._curve_row(each, "*", "<- best", 1.0) for each in points]
    lines = table_text(tune._CURVE_COLUMNS, rows, width=width).split("\n")
    assert max(map(len, lines)) <= width, lines
    assert all(each in lines[1] for each in ("torchscript", "bf16", "128", "12345.6", "123.456"))


def test_the_backend_is_written_down_where_several_were_measured() -> None:
    best = point(10, 1, 2, 8, "bf16", "openvino")
    text = tune.configuration({"batchSize": 1}, best, chooses_backend=True)
    assert yaml.safe_load(text) == {
        "batchSize": 8, "minWorkers": 1, "maxWorkers": 1, "precision": "bf16", "backend": "openvino",
    }  # fmt: skip


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
    on_three = tune.configuration(raw, best, 3)
    assert "2 x 1 threads on each device" in on_three and yaml.safe_load(on_three)["minWorkers"] == 6


def rows_of(printed: str) -> list[list[str]]:
    """The curve's rows, without the star of the frontier."""
    lines = (line.lstrip("* ") for line in printed.splitlines())
    return [line.split() for line in lines if line.startswith(("torchscript", "aotinductor", "openvino"))]


@pytest.mark.slow
def test_an_archive_is_measured_at_every_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "cpu_budget", lambda: 3)
    archive = write_linear(tmp_path)
    out = tmp_path / "tuned.yaml"
    assert cli.main(["tune", str(archive), "--out", str(out), *PLAIN, *QUICK]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    tried = [tuple(row[1:5]) for row in rows]
    assert tried == [
        (precision, workers, threads, size)
        for precision in ("fp32", "bf16") for workers, threads in (("1", "3"), ("2", "1"), ("3", "1"))
        for size in ("1", "4")
    ]  # fmt: skip
    assert all(float(row[5]) > 0 and 0 <= float(row[7]) < 10_000 for row in rows)
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
    command = [
        "tune",
        str(archive),
        "--out",
        str(out),
        "--workers",
        "1",
        "--batch-sizes",
        "4",
        "--seconds",
        "0.2",
        *PLAIN,
    ]
    assert cli.main([*command, "--precisions", "bf16", "--lower-precision"]) == 0
    assert "<- best" in capsys.readouterr().out
    assert yaml.safe_load(out.read_text())["precision"] == "bf16"
    assert cli.main([*command, "--precisions", "fp32", "--force"]) == 0  # what was traced for bf16 is not taken for it
    assert "precision" not in yaml.safe_load(out.read_text())


@pytest.mark.slow
@pytest.mark.skipif(bool(BACKENDS[OPENVINO].missing()), reason="OpenVINO is not installed")
def test_backends_are_measured_beside_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "cpu_budget", lambda: 2)
    out = tmp_path / "tuned.yaml"
    command = ["tune", str(write_linear(tmp_path)), "--out", str(out), "--backends", "torchscript", "openvino", *QUICK]
    assert cli.main([*command, "--precisions", "fp32"]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert {row[0] for row in rows} == {"torchscript", "openvino"}, printed
    assert [row[2:5] for row in rows if row[0] == "openvino"] == [["1", "2", "1"], ["1", "2", "4"], ["2", "1", "1"],
                                                                  ["2", "1", "4"]]  # fmt: skip
    assert all(float(row[5]) > 0 for row in rows), printed
    best = next(row for row in rows if "best" in row)
    assert yaml.safe_load(out.read_text())["backend"] == best[0]


def tried_on(device: str, *arguments: str) -> list[Setting]:
    parser = argparse.ArgumentParser()
    tune.add_tune_arguments(parser)
    archive = cast(
        Archive, SimpleNamespace(model_dir=Path("/nowhere"), weights=None, manifest=SimpleNamespace(model_file=None))
    )
    parsed = tune._completed(archive, parser.parse_args(["m.mar", *arguments]), 6, device)
    return [each for precision in parsed.precisions for each in tune.settings_of(parsed, 6, precision, device)]


def test_threads_that_are_asked_for_are_tried_as_far_as_there_are_cpus() -> None:
    tried = tried_on("cpu", "--workers", "1", "3", "--threads", "1", "2", "6")
    assert {(each.workers, each.threads) for each in tried} == {(1, 1), (1, 2), (1, 6), (3, 1), (3, 2)}


def test_an_accelerator_is_tried_with_few_workers_large_batches_and_all_precisions() -> None:
    tried = tried_on("cuda:1")
    assert {each.workers for each in tried} == {1, 2, 4} and {each.threads for each in tried} == {1}
    assert {each.batch_size for each in tried} == {1, 8, 32, 128}
    assert {each.precision for each in tried} == set(tune.ALL_PRECISIONS)
    assert len(tried) == len(set(tried)) == 3 * 4 * len(tune.ALL_PRECISIONS)
    assert {(each.workers, each.threads) for each in tried_on("cpu")} == {(1, 6), (2, 3), (4, 1), (6, 1)}
    assert tried_on("cuda:0", "--workers", "3", "--batch-sizes", "5", "--precisions", "fp32") == [Setting(3, 1, 5)]


@pytest.mark.slow
def test_the_accelerator_is_measured_and_not_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, simdev: Any
) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "_devices", lambda archive: ("simdev:1", 2))
    out = tmp_path / "tuned.yaml"
    command = ["tune", str(write_linear(tmp_path)), "--out", str(out), "--seconds", "0.2"]
    assert cli.main([*command, "--workers", "1", "2", "--batch-sizes", "1", "4", "--precisions", "fp32"]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert [tuple(row[2:5]) for row in rows] == [("1", "1", "1"), ("1", "1", "4"), ("2", "1", "1"), ("2", "1", "4")]
    assert all(float(row[5]) > 0 for row in rows), printed
    counters = simdev.counters(1)
    assert counters["h2d"] > 100, "batches went to the device"
    tuned = yaml.safe_load(out.read_text())
    best = next(row for row in rows if "best" in row)
    assert (tuned["minWorkers"], tuned["batchSize"]) == (2 * int(best[2]), int(best[4])), "on each of two devices"


def test_a_setting_that_the_model_cannot_run_is_shown_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    archive = write_torchscript(tmp_path, OnlySmall(), "small", config={"input": {"dtype": "float32", "shape": [4]}})
    out = tmp_path / "tuned.yaml"
    assert (
        cli.main(["tune", str(archive), "--out", str(out), "--precisions", "fp32", "--workers", "1", *PLAIN, *QUICK])
        == 0
    )
    printed = capsys.readouterr().out
    assert "the model cannot run a batch of 4" in printed and "too many" in printed
    assert yaml.safe_load(out.read_text())["batchSize"] == 1


def test_a_target_that_nothing_meets_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "tuned.yaml"
    command = ["tune", str(write_linear(tmp_path)), "--slo-ms", "0.000001", "--out", str(out), *PLAIN, *QUICK]
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
            "--batch-sizes", "4", *PLAIN,
        )  # fmt: skip
        assert tuned.returncode == 0, tuned.stderr
        described = server.describe(archive.stem)
        assert (described["minWorkers"], described["batchSize"]) == (2, 4)
        assert len(described["workers"]) == 2
    finally:
        server.run("stop")
