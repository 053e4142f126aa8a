"""``pyserve tune``: measures a model at many settings on this machine, and writes down the best one.

    workers x threads of each  *  batch size  *  precision  ->  items/s, p50, p95  ->  model-config.yaml

The threads follow from the workers as they do in the server: CPUs / workers. A lower precision changes answers, so it
is measured and told, but only chosen with ``--lower-precision``.
"""

from __future__ import annotations

import argparse
import copy
import http.client
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from pyserve.archive.archive import Archive, open_archive
from pyserve.commands import terminal as console
from pyserve.conversion.torchscript import runs_in_python
from pyserve.cpu_budget import cpu_budget
from pyserve.errors import ConfigError, JsonObject, ServeError
from pyserve.server import pid_file
from pyserve.visible import visible

if TYPE_CHECKING:
    from pyserve.commands.tune_measure import Point, Setting

BATCH_SIZES = (1, 2, 4, 8, 16)
PRECISIONS = ("fp32", "bf16")
SECONDS_DEFAULT = 2.0
# Settings this close to the best count as equal; the one with fewer workers and smaller batches is then chosen.
EQUAL_SHARE = 0.03
OUT_DEFAULT = "model-config.yaml"
APPLY_TIMEOUT_S = 300.0


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; ``--pid-file`` comes from the command line itself."""
    add = parser.add_argument
    add("archive", metavar="ARCHIVE", help="with a built-in handler")
    add("--slo-ms", type=_positive, metavar="MS", help="95 %% of requests must be done in this time, at full load")
    add("--batch-sizes", type=_count, nargs="+", metavar="N", default=list(BATCH_SIZES),
        help=f"default: {' '.join(map(str, BATCH_SIZES))}")  # fmt: skip
    add("--workers", type=_count, nargs="+", metavar="N", help="default: 1, 2, 4 ... up to the number of CPUs")
    add("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), default=list(PRECISIONS),
        help=f"default: {' '.join(PRECISIONS)}")  # fmt: skip
    add("--lower-precision", action="store_true", help="let a lower precision be chosen: answers change a little")
    add("--seconds", type=_positive, metavar="S", default=SECONDS_DEFAULT,
        help=f"of each setting (default {SECONDS_DEFAULT:g})")  # fmt: skip
    add("--out", metavar="FILE", default=OUT_DEFAULT,
        help=f"the archive's model-config.yaml with the best setting (default {OUT_DEFAULT})")  # fmt: skip
    add("-f", "--force", action="store_true", help="write over FILE")
    add("--apply", action="store_true", help="give the running server's model these workers and this batch size, too")
    add("--name", metavar="NAME", help="the model of --apply; default: the one in the archive's manifest")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 4096:
        raise ValueError
    return value


def tune_command(parsed: argparse.Namespace, pid_path: Path) -> int:
    """Exit code: 0, or 1 when no setting meets the target.

    Raises:
        ServeError: the archive cannot be measured, or what was asked for cannot be carried out.
    """
    out = Path(parsed.out)
    if out.exists() and not parsed.force:
        raise ConfigError(f"{out} exists; name another file with --out, or write over it with --force")
    budget = cpu_budget()
    with open_archive(parsed.archive) as archive:
        if runs_in_python(archive):
            raise ConfigError(
                f"{archive.name} runs handler code of its own in worker processes; tune measures networks with "
                "built-in handlers. Load-test the server instead, for instance with bench/latency.py"
            )
        points = _measure_all(archive, parsed, budget)
        best = choose(points, slo_ms=parsed.slo_ms, lower_precision=parsed.lower_precision)
        _print_curve(points, best, parsed.slo_ms)
        if best is None:
            return 1
        _hint_at_precision(points, best, parsed)
        text = configuration(archive.config.raw, best)
        name = parsed.name or archive.manifest.model_name
    out.write_text(text)
    print(f"written: {out}; pack it with `pyserve archive --config-file {out} ...`")
    if parsed.apply:
        _apply(name, best.setting, pid_path)
    return 0


def settings_of(parsed: argparse.Namespace, budget: int, precision: str) -> Iterator[Setting]:
    """What is tried at one precision."""
    from pyserve.commands.tune_measure import Setting

    wanted = parsed.workers or sorted({*(1 << i for i in range(budget.bit_length()) if 1 << i <= budget), budget})
    for workers in sorted(set(wanted)):
        for batch_size in sorted(set(parsed.batch_sizes)):
            yield Setting(workers, max(1, budget // workers), batch_size, precision)


def _measure_all(archive: Archive, parsed: argparse.Namespace, budget: int) -> list[Point]:
    from pyserve.commands.tune_measure import Point, Rig
    from pyserve.models.placement import choose_device, gpu_count

    device = choose_device(archive.config, gpu_count(None), [])
    points: list[Point] = []
    total = sum(1 for precision in parsed.precisions for _ in settings_of(parsed, budget, precision))
    with _Bar(total) as bar:
        for precision in dict.fromkeys(parsed.precisions):
            wanted = list(settings_of(parsed, budget, precision))
            bar.show(f"loading {archive.name} as {precision}")
            try:
                network = _load(archive, precision, device, budget)
            except ServeError as error:
                if precision == "fp32":
                    raise
                points += [Point(setting, error=error.message) for setting in wanted]
                bar.advance(len(wanted))
                continue
            capacity = max(setting.workers * setting.batch_size for setting in wanted)
            running_max = budget if device == "cpu" else 1 << 31
            with Rig(network, running_max, capacity) as rig:
                for setting in wanted:
                    bar.show(f"{precision}, {setting.workers} x {setting.threads}, batch size {setting.batch_size}")
                    points.append(rig.measure(setting, parsed.seconds))
                    bar.advance(1)
    return points


def _load(archive: Archive, precision: str, device: str, budget: int) -> Any:
    from pyserve.models.loader import load_network

    subject = copy.copy(archive)
    layout = "channels_last" if precision != "fp32" else archive.config.memory_format
    subject.config = replace(archive.config, precision=precision, memory_format=layout)
    return load_network(
        subject, name=archive.manifest.model_name, device=device, batch_size=1, cpu_budget=budget,
        limit_max_image_pixels=True, startup_timeout_s=600.0, progress=lambda text: None,
    )  # fmt: skip


def choose(points: list[Point], *, slo_ms: float | None, lower_precision: bool) -> Point | None:
    """The best of ``points``: most items per second within the target, the plainest of those that are equal."""
    allowed = [
        point
        for point in points
        if not point.error
        and (slo_ms is None or point.p95_ms <= slo_ms)
        and (lower_precision or point.setting.precision == "fp32")
    ]
    if not allowed:
        return None
    best_rate = max(point.rate for point in allowed)
    equal = [point for point in allowed if point.rate >= best_rate * (1 - EQUAL_SHARE)]
    return min(
        equal, key=lambda each: (each.setting.precision != "fp32", each.setting.batch_size, each.setting.workers)
    )


def configuration(raw: JsonObject, best: Point) -> str:
    """The archive's model-config.yaml with the best setting in it."""
    import yaml

    setting = best.setting
    tuned = {**raw, "minWorkers": setting.workers, "maxWorkers": setting.workers, "batchSize": setting.batch_size}
    if setting.precision != "fp32":
        tuned |= {"precision": setting.precision, "memoryFormat": "channels_last"}
    about = (
        f"# measured by `pyserve tune`: {best.rate:.1f} items/s, p50 {best.p50_ms:.2f} ms, p95 {best.p95_ms:.2f} ms "
        f"with {setting.workers} x {setting.threads} threads\n"
    )
    return about + yaml.safe_dump(tuned, sort_keys=False)


def _print_curve(points: list[Point], best: Point | None, slo_ms: float | None) -> None:
    print(f"{'PRECISION':<10} {'WORKERS':>7} {'THREADS':>7} {'BATCH':>5} {'ITEMS/S':>10} {'P50 MS':>9} {'P95 MS':>9}")
    top = max((point.rate for point in points), default=0.0)
    for point in points:
        setting = point.setting
        row = f"{setting.precision:<10} {setting.workers:>7} {setting.threads:>7} {setting.batch_size:>5}"
        if point.error:
            print(f"{row}  {point.error}")
            continue
        late = "  over the target" if slo_ms is not None and point.p95_ms > slo_ms else ""
        bar = "#" * round(20 * point.rate / top)
        mark = "  <- best" if point is best else late
        print(f"{row} {point.rate:>10.1f} {point.p50_ms:>9.3f} {point.p95_ms:>9.3f}  {bar}{mark}")
    if best is None:
        worked = [point for point in points if not point.error and point.setting.precision == "fp32"]
        if slo_ms is None or not worked:
            print("nothing could be measured", file=sys.stderr)
            return
        fastest = min(worked, key=lambda each: each.p95_ms)
        print(f"no setting is done in {slo_ms:g} ms; the quickest takes {fastest.p95_ms:.2f} ms (p95)", file=sys.stderr)


def _hint_at_precision(points: list[Point], best: Point, parsed: argparse.Namespace) -> None:
    lower = choose(points, slo_ms=parsed.slo_ms, lower_precision=True)
    if lower is not None and lower.setting.precision != best.setting.precision:
        print(
            f"{lower.setting.precision} would give {lower.rate / best.rate:.2f} times as many items/s; the largest "
            f"difference to fp32, relative to the largest number, is {lower.precision_error:.2e}. Choose it with "
            "--lower-precision"
        )


def _apply(name: str, setting: Setting, pid_path: Path) -> None:
    from pyserve.commands.client import Connection, local_address, management_key

    running = pid_file.read(pid_path)
    if running is None:
        raise ConfigError("--apply: pyserve is not currently running")
    address = local_address(running.addresses["management"])
    key = os.environ.get("PYSERVE_TOKEN", "") or management_key(running.key_file)
    query = urlencode({
        "min_worker": setting.workers, "max_worker": setting.workers, "batch_size": setting.batch_size,
        "synchronous": "true",
    })  # fmt: skip
    connection = Connection(address, key, timeout_s=APPLY_TIMEOUT_S)
    try:
        answer = connection.ask("PUT", f"/models/{quote(name, safe='')}?{query}")
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(f"--apply: {address} does not answer: {error}") from None
    finally:
        connection.close()
    if answer.status != 200:
        raise ConfigError(f"--apply: {answer.text}")
    print(f"applied to {name}: {setting.workers} workers, batch size {setting.batch_size}")
    if setting.precision != "fp32":
        print(f"its precision cannot change while it runs: deploy an archive with precision: {setting.precision}")


class _Bar:
    """How far it is: a progress bar on a terminal, a line for each step elsewhere. A context."""

    def __init__(self, total: int):
        self._total = total
        self._done = 0
        self._progress: Any = None
        self._task: Any = None
        self._text = ""

    def __enter__(self) -> _Bar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(file=console.unescaped(sys.stderr)), transient=True)
            self._task = self._progress.add_task("starting", total=self._total)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, text: str) -> None:
        self._text = text
        if self._progress is not None:
            self._progress.update(self._task, description=visible(text))
        else:
            print(f"[{self._done + 1}/{self._total}] {text}", file=sys.stderr, flush=True)

    def advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress.advance(self._task, count)
