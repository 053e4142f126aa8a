"""``pyserve tune``: measures a model at many settings on this machine, and writes down the best one.

    backend  *  precision  *  workers x threads of each  *  batch size  ->  items/s, p50, p95  ->  model-config.yaml

On CPUs, the threads follow from the workers as they do in the server: CPUs / workers. Other numbers (``--threads``) are
measured and reported, and never chosen, since the server has no setting for them. On an accelerator, one device is
measured with a few workers, and what is written down is for all devices that the model may have. A lower precision
changes answers, so it is measured and reported, but only chosen with ``--lower-precision``. A backend that is not
installed, or that cannot run the model, is reported with the reason.
"""

from __future__ import annotations

import argparse
import copy
import http.client
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from pyserve.archive.archive import Archive, open_archive
from pyserve.archive.model_config import PRECISIONS as ALL_PRECISIONS
from pyserve.archive.samples import CALIBRATION_FOLDER
from pyserve.backends.table import BACKENDS, TORCHSCRIPT
from pyserve.commands import terminal as console
from pyserve.commands.model_arguments import MODEL_HELP, add_given_arguments, given_in, prepare
from pyserve.commands.tables import Column, Row, as_markup, console_on, print_table
from pyserve.config.model_source import ARCHIVE_SUFFIXES
from pyserve.conversion.torchscript import Progress, runs_in_python
from pyserve.cpu_budget import cpu_budget
from pyserve.errors import ConfigError, JsonObject, ModelLoadError, ServeError
from pyserve.server import pid_file
from pyserve.visible import visible

if TYPE_CHECKING:
    from pyserve.commands.tune_measure import Point, Setting
    from pyserve.lanes.network import Network

BATCH_SIZES = (1, 2, 4, 8, 16)
PRECISIONS = ("fp32", "bf16")
# On an accelerator: a worker has two batches on their way, and the host does little for each of them.
DEVICE_WORKERS = (1, 2, 4)
DEVICE_BATCH_SIZES = (1, 8, 32, 128)
SECONDS_DEFAULT = 2.0
# Settings this close to the best count as equal; the one with fewer workers and smaller batches is then chosen.
EQUAL_SHARE = 0.03
OUT_DEFAULT = "model-config.yaml"
# The bar is the first to go where the window is narrow, what is the same in all rows or follows from another the next.
_CURVE_COLUMNS = (
    Column(""), Column("BACKEND"), Column("PRECISION", importance=5), Column("WORKERS", is_number=True, importance=6),
    Column("THREADS", is_number=True, importance=2), Column("BATCH", is_number=True, importance=6),
    Column("ITEMS/S", is_number=True, importance=6), Column("P50 MS", is_number=True, importance=3),
    Column("P95 MS", is_number=True, importance=6), Column("", importance=1), Column("", importance=4),
)  # fmt: skip
_BAR_SIZE = 20
APPLY_TIMEOUT_S = 300.0
STARTUP_TIMEOUT_S = 600.0


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; ``--pid-file`` comes from the command line itself."""
    add = parser.add_argument
    add("archive", metavar="MODEL", help=f"with a built-in handler: {MODEL_HELP}")
    add_given_arguments(parser)
    add("--slo-ms", type=_positive, metavar="MS", help="95 %% of requests must be done in this time, at full load")
    add("--batch-sizes", type=_count, nargs="+", metavar="N",
        help=f"default: {_listed(BATCH_SIZES)}; on an accelerator {_listed(DEVICE_BATCH_SIZES)}")  # fmt: skip
    add("--workers", type=_count, nargs="+", metavar="N",
        help=f"default: 1, 2, 4 ... up to the number of CPUs; on an accelerator {_listed(DEVICE_WORKERS)}")  # fmt: skip
    add("--threads", type=_count, nargs="+", metavar="N",
        help="of each worker, as far as there are CPUs; default: CPUs / workers, as the server has it")  # fmt: skip
    add("--backends", nargs="+", choices=tuple(BACKENDS), help="default: all that are installed; on an accelerator "
        "torchscript")  # fmt: skip
    add("--precisions", nargs="+", choices=ALL_PRECISIONS,
        help=f"default: {_listed(PRECISIONS)}; on an accelerator {_listed(ALL_PRECISIONS)}")  # fmt: skip
    add("--lower-precision", action="store_true", help="let a lower precision be chosen: answers change a little")
    add("--seconds", type=_positive, metavar="S", default=SECONDS_DEFAULT,
        help=f"of each setting (default {SECONDS_DEFAULT:g})")  # fmt: skip
    add("--out", metavar="FILE", default=OUT_DEFAULT,
        help=f"the archive's model-config.yaml with the best setting (default {OUT_DEFAULT})")  # fmt: skip
    add("-f", "--force", action="store_true", help="write over FILE")
    add("--apply", action="store_true", help="give the running server's model these workers and this batch size, too")
    add("--name", metavar="NAME", help="the model of --apply; default: the one in the archive's manifest")


def _listed(values: Iterable[object]) -> str:
    return " ".join(map(str, values))


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0, such as 50")
    return value


def _count(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to 4096")
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
    console.warn(prepare(Path(parsed.archive), given_in(parsed)), kind="note")
    with open_archive(parsed.archive) as archive:
        if runs_in_python(archive):
            raise ConfigError(
                f"{archive.name} runs handler code of its own in worker processes; tune measures networks with "
                "built-in handlers. Load-test the server instead, for instance with `pyserve bench`"
            )
        device, device_count = _devices(archive)
        points = _measure_all(archive, _completed(archive, parsed, budget, device), budget, device)
        usual = [each for each in points if each.setting.threads == usual_threads(each.setting.workers, budget, device)]
        best = choose(usual, slo_ms=parsed.slo_ms, lower_precision=parsed.lower_precision)
        print_curve(points, best, parsed.slo_ms)
        if best is None:
            return 1
        setting = best.setting
        print(f"best: {setting.backend}, {setting.precision}, {setting.workers} x {setting.threads} threads, "
              f"batch size {setting.batch_size}")  # fmt: skip
        _hint_at_precision(usual, best, parsed)
        backends = {each.setting.backend for each in points}
        text = configuration(archive.config.raw, best, device_count, chooses_backend=len(backends) > 1)
        if device_count > 1:
            print(f"measured on {device}; with {device_count} devices {best.setting.workers} workers each")
        name = parsed.name or archive.manifest.model_name
    out.write_text(text)
    is_bare = Path(parsed.archive).is_file() and not parsed.archive.endswith(ARCHIVE_SUFFIXES)
    use = f"start {parsed.archive} --config-file {out}" if is_bare else f"archive --config-file {out} ..."
    print(f"written: {out}; {'serve' if is_bare else 'pack'} it with `pyserve {use}`")
    if parsed.apply:
        _apply(name, best.setting, pid_path, device_count)
    return 0


def _devices(archive: Archive) -> tuple[str, int]:
    """The device to measure on, and how many of its kind the model may have when it is served."""
    from pyserve.models.placement import allowed_devices, gpu_count, ordered_devices

    allowed = allowed_devices(archive.config, gpu_count(None), label=archive.name)
    return ordered_devices(allowed)[0], max(1, len(allowed))


def _completed(archive: Archive, parsed: argparse.Namespace, budget: int, device: str) -> argparse.Namespace:
    """With what is tried where nothing was said."""
    is_cpu = device == "cpu"
    usual = (*PRECISIONS, *(["int8"] if (archive.model_dir / CALIBRATION_FOLDER).is_dir() else []))
    completed = copy.copy(parsed)
    completed.batch_sizes = parsed.batch_sizes or (BATCH_SIZES if is_cpu else DEVICE_BATCH_SIZES)
    completed.precisions = parsed.precisions or [each for each in ALL_PRECISIONS if not is_cpu or each in usual]
    completed.backends = parsed.backends or _usual_backends(archive, device)
    powers = (1 << i for i in range(budget.bit_length()) if 1 << i <= budget)
    completed.workers = parsed.workers or ({*powers, budget} if is_cpu else DEVICE_WORKERS)
    return completed


def settings_of(
    parsed: argparse.Namespace, budget: int, precision: str, device: str = "cpu", backend: str = "torchscript"
) -> Iterator[Setting]:
    """What is tried of one backend at one precision."""
    from pyserve.commands.tune_measure import Setting

    for workers in sorted(set(parsed.workers)):
        usual = usual_threads(workers, budget, device)
        for threads in sorted({each for each in parsed.threads or (usual,) if each <= usual} or {usual}):
            for batch_size in sorted(set(parsed.batch_sizes)):
                yield Setting(workers, threads, batch_size, precision, backend)


def usual_threads(workers: int, budget: int, device: str) -> int:
    """Of each worker, as the server has it."""
    return max(1, budget // workers) if device == "cpu" else 1


def _usual_backends(archive: Archive, device: str) -> list[str]:
    """All that are installed, where there is something to choose."""
    weights = archive.weights
    is_compiled = archive.manifest.model_file is None and weights is not None and weights.suffix == ".pt2"
    if device != "cpu" or is_compiled:
        return [TORCHSCRIPT]
    return [name for name, backend in BACKENDS.items() if not backend.missing()]


def _measure_all(archive: Archive, parsed: argparse.Namespace, budget: int, device: str) -> list[Point]:
    from pyserve.commands.tune_measure import Point, Rig

    points: list[Point] = []
    pairs = [
        (backend, precision)
        for backend in dict.fromkeys(parsed.backends) for precision in dict.fromkeys(parsed.precisions)
        if precision in BACKENDS[backend].precisions
    ]  # fmt: skip
    wanted_of = {pair: list(settings_of(parsed, budget, pair[1], device, pair[0])) for pair in pairs}
    with _Bar(sum(map(len, wanted_of.values()))) as bar:
        for (backend, precision), wanted in wanted_of.items():
            bar.show(f"loading {archive.name} as {precision} on {BACKENDS[backend].label}")
            try:
                network = _load(archive, backend, precision, device=device, budget=budget,
                                batch_size=max(parsed.batch_sizes), show=bar.show)  # fmt: skip
            except ServeError as error:
                if precision == "fp32" and backend == TORCHSCRIPT:
                    raise
                points += [Point(setting, error=error.message) for setting in wanted]
                bar.advance(len(wanted))
                continue
            running_max = budget if device == "cpu" else 1 << 31
            with Rig(network, running_max, wanted) as rig:
                for setting in wanted:
                    bar.show(f"{backend}, {precision}, {setting.workers} x {setting.threads}, batch size "
                             f"{setting.batch_size}")  # fmt: skip
                    points.append(rig.measure(setting, parsed.seconds))
                    bar.advance(1)
    return points


def _load(
    archive: Archive, backend: str, precision: str, *, device: str, budget: int, batch_size: int, show: Progress
) -> Network:
    """The network as a backend runs it, shown to answer like the plain one.

    Raises:
        ServeError: it cannot be made, or answers otherwise.
    """
    from pyserve.models.loader import load_network

    subject = copy.copy(archive)
    is_plain = backend == TORCHSCRIPT
    layout = "channels_last" if precision != "fp32" and is_plain else archive.config.memory_format
    subject.config = replace(archive.config, precision=precision, memory_format=layout, backend=backend)
    network = load_network(
        subject, name=archive.manifest.model_name, devices=[device], batch_size=1 if is_plain else batch_size,
        cpu_budget=budget, limit_max_image_pixels=True, startup_timeout_s=STARTUP_TIMEOUT_S, progress=show,
    )  # fmt: skip
    found = network.findings.get("backend", {})
    if not is_plain and found.get("chosen") != backend:
        network.release()
        raise ModelLoadError(str(found.get("reason") or f"it cannot run on {BACKENDS[backend].label}"))
    return network


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
    return min(equal, key=lambda each: _plainness(each.setting))


def _plainness(setting: Setting) -> tuple[bool, bool, int, int]:
    return setting.precision != "fp32", setting.backend != TORCHSCRIPT, setting.batch_size, setting.workers


def frontier(points: Iterable[Point]) -> list[Point]:
    """Those that none of ``points`` beats: no other has as many items per second and as short a p95, and more of one;
    the most items per second come first."""
    found: list[Point] = []
    worked = [point for point in points if not point.error]
    for point in sorted(worked, key=lambda each: (-each.rate, each.p95_ms, _plainness(each.setting))):
        if not found or point.p95_ms < found[-1].p95_ms:
            found.append(point)
    return found


def configuration(raw: JsonObject, best: Point, device_count: int = 1, *, chooses_backend: bool = False) -> str:
    """The archive's model-config.yaml with the best setting in it.

    Args:
        device_count: devices with as many workers each.
        chooses_backend: whether several were measured.
    """
    import yaml

    setting = best.setting
    workers = setting.workers * device_count
    tuned = {**raw, "minWorkers": workers, "maxWorkers": workers, "batchSize": setting.batch_size}
    if setting.precision != "fp32":
        tuned["precision"] = setting.precision
        if setting.backend == TORCHSCRIPT:
            tuned["memoryFormat"] = "channels_last"
    if chooses_backend:
        tuned["backend"] = setting.backend
    about = (
        f"# measured by `pyserve tune`: {best.rate:.1f} items/s, p50 {best.p50_ms:.2f} ms, p95 {best.p95_ms:.2f} ms "
        f"with {setting.workers} x {setting.threads} threads{' on each device' if device_count > 1 else ''}\n"
    )
    return about + yaml.safe_dump(tuned, sort_keys=False)


def print_curve(points: list[Point], best: Point | None, slo_ms: float | None) -> None:
    """Every setting with what it gave; ``*`` stands before those of the `frontier`."""
    top = max((point.rate for point in points), default=0.0)
    unbeaten = frontier(points)
    rows = []
    for point in points:
        star = "*" if any(point is each for each in unbeaten) else ""
        late = "over the target" if slo_ms is not None and point.p95_ms > slo_ms else ""
        mark = "<- best" if point is best else late
        rows.append(_curve_row(point, star, mark, point.rate / top if top else 0.0))
    print_table(_CURVE_COLUMNS, rows)
    if unbeaten:
        print("* no other setting gives more items/s at as short a p95")
    if best is None:
        worked = [point for point in points if not point.error and point.setting.precision == "fp32"]
        if slo_ms is None or not worked:
            print("nothing could be measured", file=sys.stderr)
            return
        fastest = min(worked, key=lambda each: each.p95_ms)
        print(f"no setting is done in {slo_ms:g} ms; the quickest takes {fastest.p95_ms:.2f} ms (p95)", file=sys.stderr)


def _curve_row(point: Point, star: str, mark: str, share: float) -> Row:
    """``share``: of the most items per second."""
    setting = point.setting
    said = [star, setting.backend, setting.precision, *map(str, (setting.workers, setting.threads, setting.batch_size))]
    if point.error:
        return Row([*said, "", "", "", "", ""], below=[point.error])
    measured = f"{point.rate:.1f}", f"{point.p50_ms:.3f}", f"{point.p95_ms:.3f}"
    return Row([*said, *measured, "#" * round(_BAR_SIZE * share), mark])


def _hint_at_precision(points: list[Point], best: Point, parsed: argparse.Namespace) -> None:
    lower = choose(points, slo_ms=parsed.slo_ms, lower_precision=True)
    if lower is not None and lower.setting.precision != best.setting.precision:
        print(
            f"{lower.setting.precision} would give {lower.rate / best.rate:.2f} times as many items/s; the largest "
            f"difference to fp32, relative to the largest number, is {lower.precision_error:.2e}. Choose it with "
            "--lower-precision"
        )


def _apply(name: str, setting: Setting, pid_path: Path, device_count: int) -> None:
    from pyserve.commands.client import Connection, local_address, management_key

    running = pid_file.read(pid_path)
    if running is None:
        raise ConfigError("--apply: pyserve is not currently running")
    address = local_address(running.addresses["management"])
    key = os.environ.get("PYSERVE_TOKEN", "") or management_key(running.key_file)
    workers = setting.workers * device_count
    query = urlencode({
        "min_worker": workers, "max_worker": workers, "batch_size": setting.batch_size,
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
    print(f"applied to {name}: {workers} workers, batch size {setting.batch_size}")
    if setting.precision != "fp32" or setting.backend != TORCHSCRIPT:
        print(f"its precision and backend cannot be set while it runs: deploy an archive with precision: "
              f"{setting.precision}, backend: {setting.backend}")  # fmt: skip


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
            from rich.progress import Progress

            self._progress = Progress(console=console_on(sys.stderr), transient=True)
            self._task = self._progress.add_task("starting", total=self._total)
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, text: str) -> None:
        self._text = text
        if self._progress is not None:
            self._progress.update(self._task, description=as_markup(visible(text)))
        else:
            print(f"[{self._done + 1}/{self._total}] {text}", file=sys.stderr, flush=True)

    def advance(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress.advance(self._task, count)
