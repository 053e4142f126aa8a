"""Engines called directly, for `bench/compare.py`: each in a process of its own, at its best split of the threads.

The best split of an engine is looked for once; later rounds measure only that. What engines make of a network is kept
for later runs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.engines import ENGINES
from bench.servers import ROOT, python_path
from bench.workloads import Workload

PROBE_S = 1.0
TIMEOUT_S = 900.0  # with everything that has to be made: AOTInductor takes minutes for a large network
CALLED = "called directly"


def label_of(engine: str, precision: str) -> str:
    """``OpenVINO called directly, bf16``."""
    name = f"{ENGINES[engine].label} {CALLED}"
    return name if precision == "fp32" else f"{name}, {precision}"


class DirectSides:
    """All engines that are installed, for one workload, in every precision that both know.

    Args:
        folder: for files of this run.
        kept: for what is used by later runs, too.
        duration_s: of one measurement.
        only: names of engines; empty for all.
    """

    def __init__(
        self, load: Workload, folder: Path, kept: Path, *, cores: int, duration_s: float, only: tuple[str, ...] = ()
    ):
        self.load = load
        self.folder = folder
        self.kept = kept
        self.duration_s = duration_s
        self.splits = list(dict.fromkeys([f"1x{cores}", f"{cores}x1"]))
        self.best: dict[tuple[str, str], tuple[str, int]] = {}
        self.failed: set[tuple[str, str]] = set()
        self.wanted = [
            (engine, precision)
            for precision in load.precisions
            for engine, kind in ENGINES.items()
            if precision in kind.precisions and not kind.missing() and engine in (only or ENGINES)
        ]

    def measure(self) -> Iterator[tuple[str, float, str]]:
        """Label, requests/s and a remark for each, one round."""
        for engine, precision in self.wanted:
            if (engine, precision) in self.failed:
                continue
            label = label_of(engine, precision)
            try:
                report = self.call(engine, precision)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                # The other sides' figures are not worth less for it.
                self.failed.add((engine, precision))
                print(f"{self.load.name}: {label} could not be measured: {error}", file=sys.stderr)
                continue
            best = report["splits"][0]
            self.best[engine, precision] = best["split"], best["batch_size"]
            remark = f"{best['split']}, batches of {best['batch_size']}, difference {report['difference']:.1e}"
            yield label, best["items_per_s"], remark

    def call(self, engine: str, precision: str) -> dict[str, Any]:
        """The report of one run of ``direct.py``; RuntimeError with what it said."""
        out = self.folder / "direct.json"
        out.unlink(missing_ok=True)
        known = self.best.get((engine, precision))
        splits = [known[0]] if known else self.splits
        sizes = [known[1]] if known else sorted({1, self.load.batch_size})
        command = [
            sys.executable, str(ROOT / "bench" / "direct.py"), "--archive", str(self.load.archives["fp32"]),
            "--engine", engine, "--precision", precision, "--program", str(self.load.program()), "--torchscript",
            str(self.load.model), "--kept", str(self.kept), "--threads", *splits, "--batch-sizes", *map(str, sizes),
            "--rounds", "1", "--duration", str(self.duration_s), "--json", str(out),
            *self.files("--data", self.load.bodies),
            *(self.files("--samples", self.load.samples) if precision == "int8" else []),
            *([] if known else ["--probe", str(min(PROBE_S, self.duration_s))]),
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": python_path()}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )  # fmt: skip
        if done.returncode or not out.exists():
            lines = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr).strip().splitlines()
            raise RuntimeError(f"direct.py ended with {done.returncode}: {' '.join(lines[-3:])[-600:]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    def files(self, flag: str, bodies: list[bytes]) -> list[str]:
        """The bodies as files behind a flag."""
        paths = []
        for number, body in enumerate(bodies):
            path = self.folder / f"direct{flag}-{number}"
            path.write_bytes(body)
            paths.append(str(path))
        return [flag, *paths]
