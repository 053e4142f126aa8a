"""The ceiling of serving: the same model and preprocessing called directly in one process, without a server.

    python bench/direct.py --archive model-store/densenet161.mar --data kitten.jpg --threads 1x2 2x1
    python bench/direct.py --archive m.mar --data a.jpg --engine openvino --program m.pt2 --torchscript m.pt --probe 1

Each of A Python threads turns the file into a tensor with the archive's handler, runs the frozen TorchScript model with
B intra-op threads, and postprocesses, as fast as it can (``AxB``). All splits are measured in turn, several rounds of
them, so that a noisy machine is unfair to none; the best median is what ``bench/latency.py`` is compared with.
``--engine`` takes another engine than TorchScript (bench/engines.py), made of an exported program of the same network.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.engines import ENGINES, PRECISIONS, EngineError, Source, difference
from pyserve.archive.archive import Archive, open_archive
from pyserve.context import Context
from pyserve.errors import ServeError
from pyserve.handler import Handler
from pyserve.load_test.report import machine
from pyserve.worker.handler_choice import load_handler

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from bench.engines import Runner

WARMUP_CALLS = 3  # TorchScript's profiling executor specialises in the first two calls of each shape
PROBE_CALLS = 3  # that a thread makes at least while a split is only probed
BATCH_SIZE_MAX = 1024
THREADS_MAX = 1024


class UsageError(Exception):
    """The command line cannot be carried out; the text says what to change."""


@dataclass(frozen=True, slots=True)
class Split:
    """``workers`` Python threads with ``intra_op`` threads each, running batches of ``batch_size`` items."""

    workers: int
    intra_op: int
    batch_size: int = 1

    def __str__(self) -> str:
        return f"{self.workers}x{self.intra_op}" + (f" batch {self.batch_size}" if self.batch_size > 1 else "")


@dataclass(slots=True)
class Tally:
    """What one worker of a split did.

    Attributes:
        items: finished by the deadline.
        busy_s: from the common start to the end of its last finished item, so that the item cut off by the
            deadline takes no time from the rate.
        stages: seconds spent in each stage on the finished items.
    """

    items: int = 0
    busy_s: float = 0.0
    stages: dict[str, float] = field(default_factory=lambda: {"preprocess": 0.0, "inference": 0.0, "postprocess": 0.0})


def parse_split(text: str) -> tuple[int, int]:
    """``"2x1"`` -> ``(2, 1)``."""
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})", text)
    if not match or not all(0 < int(part) <= THREADS_MAX for part in match.groups()):
        raise argparse.ArgumentTypeError(f"{text!r}: write workers x intra-op threads, such as 2x1")
    return int(match[1]), int(match[2])


def default_splits(cores: int) -> list[tuple[int, int]]:
    """Every way to give each of ``cores`` one thread: 4 -> 1x4, 2x2, 4x1."""
    return [(workers, cores // workers) for workers in range(1, cores + 1) if cores % workers == 0]


def handler_of(archive: Archive) -> tuple[Handler, Context]:
    """The archive's handler, which knows of nothing yet, and a context."""
    manifest = archive.manifest
    context = Context(manifest.model_name, str(archive.model_dir), manifest.raw, model_yaml_config=archive.config.raw)
    return load_handler(archive), context


def prepared_handler(archive: Archive) -> tuple[Handler, Context]:
    """As `handler_of`; it can preprocess and postprocess, and has no model."""
    handler, context = handler_of(archive)
    handler.prepare(context)
    return handler, context


def load(archive: Archive, torchscript: Path | None) -> tuple[Handler, torch.jit.ScriptModule, Context]:
    """The archive's handler, its model as frozen TorchScript, and a context.

    An eager model is traced with the handler's example input, as the server does.

    Raises:
        UsageError: ``torchscript`` is missing or no TorchScript file.
        ServeError: the archive's model or handler cannot be used.
    """
    handler, context = handler_of(archive)
    model: Any
    if torchscript is not None:
        handler.prepare(context)
        try:
            model = torch.jit.load(str(torchscript), map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UsageError(f"--torchscript {torchscript} is no TorchScript file: {reason}") from None
    else:
        if archive.weights is not None:
            archive.weights.as_file()
        handler.initialize(context)
        model = handler.model  # type: ignore[attr-defined]
        handler.model = None  # type: ignore[attr-defined]
    if not isinstance(model, torch.jit.ScriptModule):
        with torch.no_grad():
            model = torch.jit.trace(model, handler.example_input(context))
    return handler, torch.jit.freeze(model), context


class Direct:
    """Runs splits of one loaded model over the bytes of one file, or of several in turn.

    Args:
        runners: ``(workers, intra-op threads)`` -> what calls the model, one for each worker.
        bodies: of requests, taken in turn.
    """

    def __init__(
        self,
        handler: Handler,
        runners: Callable[[int, int], list[Runner]],
        context: Context,
        bodies: list[bytes],
    ):
        self._handler = handler
        self._runners = runners
        self._context = context
        self._bodies = bodies

    def answer(self, run: Runner, numbers: Iterator[int], batch_size: int, tally: Tally) -> list[Any]:
        """One batch from bytes to answers; adds the time of its stages to ``tally``."""
        begun = time.perf_counter()
        # A row at a time, as the server does; each row is a new copy, as from a socket.
        bodies = [self._bodies[next(numbers) % len(self._bodies)] for _ in range(batch_size)]
        inputs = [self._handler.preprocess([{"body": bytearray(body)}]) for body in bodies]
        prepared = time.perf_counter()
        with torch.inference_mode():
            output = run(inputs[0] if batch_size == 1 else joined(inputs))
        inferred = time.perf_counter()
        answers = self._handler.postprocess(output)
        finished = time.perf_counter()
        tally.stages["preprocess"] += prepared - begun
        tally.stages["inference"] += inferred - prepared
        tally.stages["postprocess"] += finished - inferred
        return answers

    def measure(self, split: Split, duration_s: float, calls_min: int = 1) -> dict[str, Any]:
        """Runs one split for ``duration_s`` seconds, or longer until each of its threads, which are warm before, has
        made ``calls_min`` calls.

        Returns:
            ``items_per_s``, ``items``, and ``stage_s``: seconds per item of each stage as one thread saw them.
        """
        # postprocess reads the batch's context; all batches of a split are alike, so they share one.
        empty_headers: list[list[tuple[str, str]]] = [[] for _ in range(split.batch_size)]
        self._handler.context = self._context.for_batch([""] * split.batch_size, empty_headers)
        tallies = [Tally() for _ in range(split.workers)]
        gate = threading.Barrier(split.workers + 1)
        deadline = [0.0]
        errors: list[BaseException] = []
        runners = self._runners(split.workers, split.intra_op)
        # Sizes that differ are all met before it counts, as a server has met them.
        warm_up_calls = max(WARMUP_CALLS, -(-len(self._bodies) // split.batch_size))

        def work(run: Runner, tally: Tally) -> None:
            numbers = itertools.count()
            try:
                torch.set_num_threads(split.intra_op)  # OpenMP keeps this number per calling thread
                for _ in range(warm_up_calls):
                    self.answer(run, numbers, split.batch_size, Tally())
                gate.wait()
                gate.wait()
                while True:
                    part = Tally()
                    self.answer(run, numbers, split.batch_size, part)
                    now = time.perf_counter()
                    if now > deadline[0] and tally.items >= calls_min * split.batch_size:
                        return
                    tally.busy_s = now - (deadline[0] - duration_s)
                    tally.items += split.batch_size
                    for name, seconds in part.stages.items():
                        tally.stages[name] += seconds
            except threading.BrokenBarrierError:
                return
            except BaseException as error:
                errors.append(error)
                gate.abort()

        threads = [
            threading.Thread(target=work, args=(run, tally), daemon=True)
            for run, tally in zip(runners, tallies, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            gate.wait()
            deadline[0] = time.perf_counter() + duration_s
            gate.wait()
        except threading.BrokenBarrierError:
            pass
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        items = sum(tally.items for tally in tallies)
        stages = {
            name: sum(tally.stages[name] for tally in tallies) / items if items else 0.0 for name in tallies[0].stages
        }
        rate = sum(tally.items / tally.busy_s for tally in tallies if tally.items)
        return {"items_per_s": rate, "items": items, "stage_s": stages}


def joined(inputs: list[Tensor]) -> Tensor:
    """Tensors [1, ...] -> [n, ...]; sequences of numbers of unlike length are filled up with 0."""
    if len({each.shape for each in inputs}) == 1:
        return torch.cat(inputs)
    return torch.nn.utils.rnn.pad_sequence([each[0] for each in inputs], batch_first=True)


def probed(direct: Direct, splits: list[Split], duration_s: float) -> list[Split]:
    """The split that is the fastest in a short look at each of them."""
    rates = {split: direct.measure(split, duration_s, PROBE_CALLS)["items_per_s"] for split in splits}
    return [max(rates, key=lambda split: rates[split])]


def measure_all(
    direct: Direct, splits: list[Split], rounds: int, duration_s: float, on_result: Callable[[Split, float], None]
) -> list[dict[str, Any]]:
    """All splits in turn, ``rounds`` times; one entry per split, best median first."""
    runs: dict[Split, list[dict[str, Any]]] = {split: [] for split in splits}
    for number in range(rounds):
        # Every other round goes backwards, so that a machine that slows down is unfair to none.
        for split in splits if number % 2 == 0 else reversed(splits):
            result = direct.measure(split, duration_s)
            runs[split].append(result)
            on_result(split, result["items_per_s"])
    measured = [
        {
            "split": f"{split.workers}x{split.intra_op}",
            "batch_size": split.batch_size,
            "items_per_s": statistics.median(run["items_per_s"] for run in results),
            "rounds": [run["items_per_s"] for run in results],
            "stage_ms": {
                name: statistics.median(run["stage_s"][name] for run in results) * 1000
                for name in results[0]["stage_s"]
            },
        }
        for split, results in runs.items()
    ]
    return sorted(measured, key=lambda entry: -entry["items_per_s"])


def print_table(measured: list[dict[str, Any]]) -> None:
    print(
        f"{'split':>8} {'batch':>6} {'items/s':>9} {'lowest':>9} {'highest':>9}   ms per item in one thread: "
        "preprocess  inference  postprocess"
    )
    for entry in measured:
        stages = entry["stage_ms"]
        print(
            f"{entry['split']:>8} {entry['batch_size']:>6} {entry['items_per_s']:>9.2f} {min(entry['rounds']):>9.2f} "
            f"{max(entry['rounds']):>9.2f}   {'':27}{stages['preprocess']:>11.2f} {stages['inference']:>10.2f} "
            f"{stages['postprocess']:>12.2f}"
        )
    best = measured[0]
    print(f"best: {best['split']} with batch size {best['batch_size']}, {best['items_per_s']:.2f} items/s")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, metavar="FILE.mar")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        nargs="+",
        metavar="FILE",
        help="one request's body; several are sent in turn",
    )
    parser.add_argument("--torchscript", type=Path, metavar="FILE.pt", help="use this model instead of the archive's")
    parser.add_argument("--engine", choices=ENGINES, help="another engine; needs --program and --torchscript")
    parser.add_argument("--program", type=Path, metavar="FILE.pt2", help="the same network, by torch.export.save")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of --engine (default: %(default)s)")
    parser.add_argument(
        "--samples", type=Path, nargs="+", default=[], metavar="FILE", help="bodies to calibrate int8 with"
    )
    parser.add_argument(
        "--kept", type=Path, default=Path("bench/out/engines"), metavar="DIR",
        help="for what engines make of a network (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--probe", type=float, metavar="S", help="look at each split for this long, and measure only the best"
    )
    parser.add_argument(
        "--threads",
        nargs="+",
        type=parse_split,
        metavar="AxB",
        help="A Python threads with B intra-op threads each (default: all splits of the cores)",
    )
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[1], metavar="N", help="items per call of the model (default: 1)"
    )
    parser.add_argument("--duration", type=float, default=10.0, metavar="S", help="of one split (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each is run (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def check_limits(args: argparse.Namespace) -> None:
    """Refuses numbers that cannot be measured with."""
    if not (args.duration > 0 and args.rounds >= 1):
        raise UsageError("--duration must be above 0 s and --rounds at least 1")
    if not all(1 <= size <= BATCH_SIZE_MAX for size in args.batch_sizes):
        raise UsageError(f"--batch-sizes must lie between 1 and {BATCH_SIZE_MAX}")
    if args.engine:
        if missing := ENGINES[args.engine].missing():
            raise UsageError(f"--engine {args.engine} needs {missing}, which is not installed: pip install {missing}")
        if args.program is None or args.torchscript is None:
            raise UsageError("--engine needs the network as --program FILE.pt2 and as --torchscript FILE.pt")
        if args.precision not in ENGINES[args.engine].precisions:
            known = ", ".join(ENGINES[args.engine].precisions)
            raise UsageError(f"--engine {args.engine} has no --precision {args.precision} here; it has {known}")
    elif args.precision != "fp32":
        raise UsageError("--precision needs --engine; without it an archive has its own")


def bodies_of(paths: list[Path], flag: str) -> list[bytes]:
    """The files' bytes; UsageError names one that cannot be read."""
    bodies = []
    for path in paths:
        try:
            bodies.append(path.read_bytes())
        except OSError as error:
            raise UsageError(f"cannot read {flag} {path}: {error.strerror}") from None
    return bodies


def itself(model: torch.jit.ScriptModule) -> Callable[[int, int], list[Runner]]:
    """One model for all workers."""
    return lambda workers, intra_op: [model] * workers


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    found: dict[str, Any] = {}
    runners: Callable[[int, int], list[Runner]]
    try:
        check_limits(args)
        bodies, samples = bodies_of(args.data, "--data"), bodies_of(args.samples, "--samples")
        with open_archive(args.archive) as archive:
            if args.engine:
                handler, context = prepared_handler(archive)
                source = Source(
                    args.program, args.torchscript, args.precision, args.kept,
                    tuple(handler.preprocess([{"body": bytearray(body)}]) for body in samples),
                )  # fmt: skip
                engine = ENGINES[args.engine](source)
                runners = engine.runners
                first_body = handler.preprocess([{"body": bytearray(bodies[0])}])
                found["difference"] = difference(engine, first_body)
            else:
                handler, model, context = load(archive, args.torchscript)
                runners = itself(model)
            direct = Direct(handler, runners, context, bodies)
            threads = args.threads or default_splits(machine()["cores"])
            splits = [Split(workers, intra_op, size) for size in args.batch_sizes for workers, intra_op in threads]
            if args.probe:
                splits = probed(direct, splits, args.probe)
            measured = measure_all(
                direct,
                list(dict.fromkeys(splits)),
                args.rounds,
                args.duration,
                lambda split, rate: print(f"  {split}: {rate:.2f} items/s", file=sys.stderr, flush=True),
            )
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ServeError, EngineError) as error:
        print(f"error: {getattr(error, 'message', error)}", file=sys.stderr)
        return 1
    print_table(measured)
    if args.json:
        settings = {
            "archive": args.archive.name,
            "data": [each.name for each in args.data],
            "duration_s": args.duration,
            "rounds": args.rounds,
            "torchscript": args.torchscript.name if args.torchscript else None,
            "engine": args.engine,
            "precision": args.precision,
        }
        result = {"schema": 1, "settings": settings, "machine": machine(), "splits": measured, **found}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
