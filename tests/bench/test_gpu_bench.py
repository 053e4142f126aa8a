"""`bench/gpu.py`: whatever a step does the others run, the budget is kept, and every step works in tiny sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench import gpu
from bench.gpu import STEPS, Outcome, Step, read_rows
from bench.gpu_steps import ratios, trace
from bench.gpu_steps.closed_loop import engine_loop, load, saved_file
from bench.gpu_steps.loops import WAYS, DirectLoop, form_of
from bench.gpu_steps.networks import Network, saved
from bench.gpu_steps.networks import build as build_network
from bench.gpu_steps.settings import Row
from bench.gpu_steps.spans import Span, merged, shared, summary
from bench.gpu_steps.truth import WrongAnswer, truth_of
from tests.simdev import build

ROOT = Path(__file__).resolve().parents[2]
ON_A_DEVICE = [step.name for step in STEPS if step.needs_device]


def python(code: str) -> tuple[str, ...]:
    """A step that runs ``code``; ``rows`` is its file for rows, open for writing."""
    head = (
        "import json, os, signal, sys, time; sys.path.insert(0, os.getcwd());"
        "from bench.gpu_steps.settings import Settings;"
        "settings = Settings.of_json(sys.argv[-1]); rows = open(settings.rows_path, 'w', buffering=1)\n"
    )
    return (sys.executable, "-c", head + code)


def fake(name: str, code: str, *, usual_s: float = 0.1, limit_s: float = 20.0, after: str = "") -> Step:
    return Step(name, usual_s, limit_s, needs_device=False, after=after, command=python(code))


def run(steps: list[Step], folder: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """(exit code, what summary.json holds)."""
    code = gpu.main(["--out", str(folder), *flags], steps)
    return code, json.loads((folder / "summary.json").read_text())


def statuses(summary: dict[str, Any]) -> dict[str, str]:
    return {step["step"]: step["status"] for step in summary["steps"]}


# Of a step that has to write a row before it is ended: the longer ones for machines that begin it late.
LIMITS_S = (1.5, 15.0, 60.0)
GOOD = "print('{}', file=rows)"
RUBBISH = """print('{"a":', '[1]', chr(0), '{"b": NaN}', sep=chr(10), file=rows); print('{' * 10**6)"""


def test_a_step_that_fails_hangs_or_prints_rubbish_does_not_stop_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [
        fake("raises", "raise ValueError('no such wheel')"),
        fake("crashes", "print(json.dumps({'a': 1}), file=rows); os.kill(os.getpid(), signal.SIGSEGV)"),
        fake("hangs", "print(json.dumps({'a': 2}), file=rows); time.sleep(600)", limit_s=1.5),
        fake("is deaf", "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)", limit_s=1.5),
        fake("rubbish", RUBBISH),
        Step("absent", 0.1, 5, needs_device=False, command=("/no/such/program",)),
        fake("lacks", "print(json.dumps({'lacks': 'a decoder'}), file=rows)"),
        fake("bad rows", "print(json.dumps({'failed': 'out of memory'}), file=rows)"),
        fake("good", GOOD),
    ]
    code, summary = run(steps, tmp_path)
    assert code == 1
    assert statuses(summary) == {
        "raises": "failed", "crashes": "failed", "hangs": "timeout", "is deaf": "timeout", "rubbish": "ok",
        "absent": "failed", "lacks": "lacks", "bad rows": "failed", "good": "ok",
    }  # fmt: skip
    notes = {step["step"]: step["note"] for step in summary["steps"]}
    assert notes["raises"] == "ValueError: no such wheel"
    assert notes["rubbish"] == "3 lines were no rows"
    assert notes["lacks"] == "a decoder"
    assert notes["bad rows"] == "1 of 1 rows failed"
    assert "could not be started" in notes["absent"]
    # What was measured before the end counts.
    assert summary["rows"]["crashes"] == [{"a": 1}]
    assert summary["rows"]["hangs"] == [{"a": 2}]
    assert summary["rows"]["rubbish"] == [{"b": None}]
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {"step": "hangs", "a": 2} in kept
    out = capsys.readouterr().out
    assert [json.loads(line)["step"] for line in out.splitlines()[: len(steps)]] == [step.name for step in steps]
    assert out.endswith((tmp_path / "table.md").read_text())


def test_a_step_takes_with_it_what_it_has_started(tmp_path: Path) -> None:
    code = (
        "import subprocess; child = subprocess.Popen(['sleep', '600']);"
        "print(json.dumps({'pid': child.pid}), file=rows); time.sleep(600)"
    )
    for limit_s in LIMITS_S:
        _, summary = run([fake("starts", code, limit_s=limit_s)], tmp_path)
        if summary["rows"]["starts"]:
            break
    [row] = summary["rows"]["starts"]
    end = time.monotonic() + 60
    while is_alive(row["pid"]):
        assert time.monotonic() < end, "what a step has started outlives it"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_what_no_longer_fits_is_skipped_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RESERVE_S", 0.5)
    steps = [
        fake("long", "time.sleep(600)", usual_s=0.1, limit_s=600),
        fake("short", GOOD, usual_s=100),
        fake("none left", GOOD, usual_s=0.1),
    ]
    began = time.monotonic()
    code, summary = run(steps, tmp_path, "--budget", "3")
    assert code == 1
    assert statuses(summary) == {"long": "timeout", "short": "skipped", "none left": "skipped"}
    assert "takes 100 s" in summary["steps"][1]["note"]
    assert time.monotonic() - began < 60, "600 were asked for"


def test_the_steps_fit_into_the_budget_and_what_can_be_spared_comes_last() -> None:
    assert sum(step.usual_s for step in STEPS) <= gpu.BUDGET_S - gpu.RESERVE_S
    assert gpu.BUDGET_S <= 540
    assert all(step.usual_s <= step.limit_s for step in STEPS)
    names = [step.name for step in STEPS]
    assert names.index("engine") < names.index("faults") < names.index("sanitizer")
    for step in STEPS:
        assert (ROOT / "bench" / "gpu_steps" / f"{step.name}.py").exists()
        assert not step.after or names.index(step.after) < names.index(step.name)


def test_what_needs_a_build_is_not_tried_without_one(tmp_path: Path) -> None:
    steps = [fake("build", "sys.exit('error: no compiler')"), fake("engine", GOOD, after="build"), fake("copies", GOOD)]
    _, summary = run(steps, tmp_path)
    assert statuses(summary) == {"build": "failed", "engine": "skipped", "copies": "ok"}
    assert summary["steps"][1]["note"] == "build did not succeed"
    # Where it is not asked for it was built before.
    _, summary = run(steps, tmp_path, "--steps", "engine")
    assert statuses(summary) == {"engine": "ok"}


def test_an_unknown_step_is_refused_with_the_names_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--steps", "engine,motor"])
    assert "no such step: motor; there are env, build" in capsys.readouterr().err


def test_torn_rows_and_huge_files_are_read_as_far_as_they_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows"
    assert read_rows(path) == ([], 0)
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    assert read_rows(path) == ([{"a": 1}], 1)
    monkeypatch.setattr(gpu, "ROWS_SIZE_MAX", 12)
    path.write_bytes(b'{"a": 1}\n' * 100)
    assert read_rows(path) == ([{"a": 1}], 1)


def engine_row(workers: int, clients: int, rate: float, **more: Any) -> Row:
    return {
        "network": "n", "precision": "fp16", "batch": 32, "workers": workers, "clients": clients, "p50_ms": 1.0,
        "items_per_s": {"median": rate, "low": rate - 5, "high": rate + 5}, "error": 0.001, "allowed": 0.01, **more,
    }  # fmt: skip


def anchor_row(rate: float, when: str, batch: int = 32, alone_ms: float = 1.0) -> Row:
    row = engine_row(0, 0, rate)
    for name in ("workers", "clients", "p50_ms"):
        del row[name]
    return {**row, "anchor": "graph", "when": when, "batch": batch, "alone_ms": alone_ms}


def test_the_aims_are_worked_out_from_the_rows() -> None:
    rows = {
        "engine": [
            anchor_row(900, "before"), engine_row(1, 128, 960), engine_row(1, 64, 890),
            engine_row(2, 128, 955, counted={"pageable_copies": 3}),
            anchor_row(1000, "after"), engine_row(1, 1, 50, batch=1, p50_ms=1.125),
            anchor_row(9, "before", 1, alone_ms=1.25), anchor_row(9, "after", 1, alone_ms=1.0),
        ],
        "direct": [{"network": "n", "precision": "fp16", "batch": 32, "way": "graph", "alone_ms": 5.0,
                    "memory": {"reserved_peak": 100},
                    "items_per_s": {"median": 1, "low": 1, "high": 1}, "error": 0.02, "allowed": 0.01},
                   {"left_out": ["n fp16 batch 1 sync"]}],
        "memory": [{"network": "n", "precision": "fp16", "batch": 32, "memory": {"reserved_peak": 109}}],
        "trace": [{"gap_share": 0.01}, {"gap_share": 0.06}],
    }  # fmt: skip
    found = {aim.what: (aim.measured, aim.is_reached) for aim in ratios.work_out(rows)}
    assert found == {
        "n fp16, batch 32, 4 x in flight: of direct": (pytest.approx(0.96), True),  # of the better anchor
        "n fp16, batch 32, 2 x in flight: of direct": (pytest.approx(0.89), False),
        "n fp16, batch 32: 2 workers of 1": (pytest.approx(955 / 960), True),  # the ranges overlap
        "n fp16, batch 32: memory of direct": (pytest.approx(1.09), True),
        "n fp16, 1 client: p50 above direct, ms": (pytest.approx(0.125), True),
        "idle gaps of the device under load": (0.06, False),
        "answers: error of that of the precision": (pytest.approx(2.0), False),
        "HTTP, raw uint8, 256 clients: of the engine alone": (None, None),
        "batches copied from pageable memory": (3.0, False),
        "rows that failed": (0.0, True),
    }


def test_an_aim_without_its_figures_stays_open() -> None:
    rows = {"engine": [engine_row(1, 128, 960), {**anchor_row(1, "before"), "failed": "lacks graphs"}]}
    found = {aim.what: aim.row()["verdict"] for aim in ratios.work_out(rows)}
    assert found["n fp16, batch 32, 4 x in flight: of direct"] == "open"
    assert found["n fp16, 1 client: p50 above direct, ms"] == "open"
    assert found["idle gaps of the device under load"] == "open"
    assert found["rows that failed"] == "missed"
    assert {aim.row()["verdict"] for aim in ratios.work_out({})} == {"open"}


def test_tiny_sizes_are_not_judged_by_their_speed() -> None:
    rows = {"engine": [engine_row(1, 128, 960), anchor_row(1, "before")], "trace": [{"gap_share": 0.5}]}
    _, aims = ratios.table([], rows, is_tiny=True)
    found = {aim["aim"]: aim["verdict"] for aim in aims}
    assert found["n fp16, batch 32, 4 x in flight: of direct"] == "not judged"
    assert found["idle gaps of the device under load"] == "not judged"
    assert found["answers: error of that of the precision"] == "reached"
    assert found["rows that failed"] == "reached"


def test_the_table_is_never_larger_than_what_a_terminal_keeps() -> None:
    rows = {"engine": [engine_row(1, n, 960.0, long="x" * 500) for n in range(1000)]}
    steps = [Outcome("engine", "failed", note="| " * 1000).line()]
    text, aims = ratios.table(steps, rows, is_tiny=False)
    assert len(text) <= ratios.SIZE_MAX
    assert text.splitlines()[-1].endswith("more lines: summary.json has all)")
    assert "| idle gaps of the device under load |" in text
    assert all(aim["aim"] in text for aim in aims)


def test_gaps_and_overlap_of_spans() -> None:
    assert merged([(5, 6), (0, 2), (1, 3)]) == [(0, 3), (5, 6)]
    assert shared([(0, 3), (5, 6)], [(2, 5.5)]) == 1.5
    spans = [
        Span("compute", "kernel", 0, 40), Span("compute", "kernel", 30, 50), Span("compute", "kernel", 60, 100),
        Span("up", "up", -20, 0), Span("up", "up", 10, 30), Span("back", "down", 55, 60), Span("x", "other", 0, 500),
    ]  # fmt: skip
    found = summary(spans, batches=2)
    assert found["gap_share"] == 0.1
    assert found["longest_gap_us"] == 10
    assert found["kernels_per_batch"] == 1.5
    assert found["copies_under_kernels"] == pytest.approx(20 / 45, abs=1e-4)
    assert summary([], batches=1) == {"kernels": 0, "gap_share": None}


def test_a_trace_of_the_profiler_is_read() -> None:
    events: list[dict[str, Any]] = [
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 1, "dur": 2, "args": {"stream": 7}},
        {
            "ph": "X",
            "cat": "gpu_memcpy",
            "name": "Memcpy HtoD (Pinned -> Device)",
            "ts": 3,
            "dur": 1,
            "args": {"stream": 8},
        },
        {
            "ph": "X",
            "cat": "gpu_memcpy",
            "name": "Memcpy DtoD (Device -> Device)",
            "ts": 3,
            "dur": 1,
            "args": {"stream": 7},
        },
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 9},
        {"ph": "M", "name": "process_name"},
    ]
    assert trace.spans_of_chrome(events) == [
        Span("7", "kernel", 1, 3), Span("8", "up", 3, 4), Span("7", "other", 3, 4),
    ]  # fmt: skip


@pytest.fixture
def slow_device(simdev: Any) -> Iterator[torch.device]:
    """Copies and operators that take their time, so that what is not waited for is not there yet."""
    for kind in ("h2d", "op", "d2h"):
        simdev.fault(f"delay kind={kind} us=3000")
    yield torch.device("simdev:0")


@pytest.fixture(scope="module")
def network() -> Network:
    return build_network("resnet50", tiny=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("missing", ["", "up", "compute", "back"])
def test_a_direct_loop_that_does_not_wait_is_caught(
    way: str, missing: str, slow_device: torch.device, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``missing``: the stream that waits for nothing."""
    truth = truth_of(network, "fp32", 4, torch.device("cpu"))
    loop = DirectLoop(form_of(network, "fp32", slow_device), truth, way, 2)
    assert loop.error() <= truth.allowed
    if not missing or way == "sync":
        return
    stream = getattr(loop, f"_{missing}")
    monkeypatch.setattr(loop, "_wait", lambda by, event: None if by is stream else by.wait_event(event))
    # `up` only has to wait for the batch before in its slot, which the host has waited for already.
    with contextlib.nullcontext() if missing == "up" else pytest.raises(WrongAnswer):
        for _ in range(1 if missing == "up" else 50):  # a host that is kept waiting comes when it is there
            loop.error()


@pytest.mark.slow
def test_an_engine_whose_answers_are_anothers_is_caught(
    accelerator: str, network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = truth_of(network, "fp32", 16, torch.device("cpu"))
    path = saved_file(tmp_path, network, saved(network))
    with engine_loop(load(network, path, "fp32", accelerator), truth, 4) as loop:
        loop.set_workers(1)
        assert loop.check(16) <= truth.allowed
        windows, error = loop.windows(8, 0.02, 2)
        assert error <= truth.allowed
        assert len(windows) == 2 and all(window.batches for window in windows)
        # The items in another order than their answers.
        monkeypatch.setattr(loop, "_items", loop._items[1:] + loop._items[:1])
        with pytest.raises(WrongAnswer, match="off by"):
            loop.check(16)
        with pytest.raises(WrongAnswer, match="off by"):
            loop.windows(8, 0.02, 2)


def test_inputs_whose_answers_are_too_near_to_one_another_are_refused(network: Network) -> None:
    class Blurred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1e-6))

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return 1 + self.scale * pictures.flatten(1)[:, :4]

    blurred = dataclasses.replace(network, module=Blurred())
    with pytest.raises(WrongAnswer, match="two answers differ by"):
        truth_of(blurred, "fp32", 4, torch.device("cpu"))


@pytest.mark.slow
def test_on_a_plain_cpu_it_says_what_it_lacks(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "SIMDEV"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = gpu_command(tmp_path, environment, "--tiny")
    assert done.returncode == 1, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = statuses(summary)
    assert {found[name] for name in ON_A_DEVICE} == {"lacks"}
    assert {step["note"] for step in summary["steps"] if step["step"] in ON_A_DEVICE} == {
        "an accelerator: torch finds none on this machine"
    }
    assert summary["rows"]["env"][0]["device"] is None
    assert "nvidia-smi" in summary["rows"]["env"][2]["missing"]
    assert {aim["verdict"] for aim in summary["aims"]} == {"open"}


def gpu_command(out: Path, environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--out", str(out), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.accelerator
@pytest.mark.parametrize(
    "steps",
    [
        "env,copies,direct",
        "engine,engine_tests",
        "stalls,trace,memory",
        *(pytest.param(step, marks=pytest.mark.server) for step in ("over_http", "faults")),
    ],
)
def test_every_step_works_on_the_simulated_accelerator(steps: str, tmp_path: Path) -> None:
    environment = {**os.environ, **build.environment()}
    done = gpu_command(tmp_path, environment, "--tiny", "--budget", "300", "--steps", steps)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text(errors="replace")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert statuses(summary) == dict.fromkeys(steps.split(","), "ok")
    checked = [row for rows in summary["rows"].values() for row in rows if "error" in row]
    assert all(row["error"] <= row["allowed"] for row in checked)
    assert not any("failed" in row or "left_out" in row for rows in summary["rows"].values() for row in rows)
    # The engine is compared at its best, or the ratios would be those of something else.
    if "engine" in steps.split(","):
        rows = summary["rows"]["engine"]
        assert {row["graphs"] for row in rows if "graphs" in row} == {"in use"}
        counts = [row["counted"] for row in rows if "clients" in row]
        assert counts and all(count["graph_replays"] > 0 for count in counts)
        assert not [name for count in counts for name in count if name.startswith("eager")]
