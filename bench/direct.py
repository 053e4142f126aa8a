"""The ceiling of serving: the same model and preprocessing called directly in one process, without a server.

    python bench/direct.py --archive model-store/densenet161.mar --data kitten.jpg --threads 1x2 2x1

Each of A Python threads turns the file into a tensor with the archive's handler, runs the frozen TorchScript model with
B intra-op threads, and postprocesses, as fast as it can (``AxB``). All splits are measured in turn, several rounds of
them, so that a noisy machine is unfair to none; the best median is what ``bench/latency.py`` is compared with.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.report import machine
from pyserve.archive.archive import Archive, open_archive
from pyserve.context import Context
from pyserve.errors import ServeError
from pyserve.handler import Handler
from pyserve.worker.handler_choice import load_handler

if TYPE_CHECKING:
    from collections.abc import Callable

WARMUP_CALLS = 3  # TorchScript's profiling executor specialises in the first two calls of each shape
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


def load(archive: Archive, torchscript: Path | None) -> tuple[Handler, torch.jit.ScriptModule, Context]:
    """The archive's handler, its model as frozen TorchScript, and a context.

    An eager model is traced with the handler's example input, as the server does.

    Raises:
        UsageError: ``torchscript`` is missing or no TorchScript file.
        ServeError: the archive's model or handler cannot be used.
    """
    manifest = archive.manifest
    context = Context(manifest.model_name, str(archive.model_dir), manifest.raw, model_yaml_config=archive.config.raw)
    handler = load_handler(archive)
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
    """Runs splits of one loaded model over the bytes of one file."""

    def __init__(self, handler: Handler, model: torch.jit.ScriptModule, context: Context, body: bytes):
        self._handler = handler
        self._model = model
        self._context = context
        self._body = body

    def answer(self, batch_size: int, tally: Tally) -> list[Any]:
        """One batch from bytes to answers; adds the time of its stages to ``tally``."""
        begun = time.perf_counter()
        # A row at a time, as the server does; each row is a new copy, as from a socket.
        inputs = [self._handler.preprocess([{"body": bytearray(self._body)}]) for _ in range(batch_size)]
        prepared = time.perf_counter()
        with torch.inference_mode():
            output = self._model(inputs[0] if batch_size == 1 else torch.cat(inputs))
        inferred = time.perf_counter()
        answers = self._handler.postprocess(output)
        finished = time.perf_counter()
        tally.stages["preprocess"] += prepared - begun
        tally.stages["inference"] += inferred - prepared
        tally.stages["postprocess"] += finished - inferred
        return answers

    def measure(self, split: Split, duration_s: float) -> dict[str, Any]:
        """Runs one split for ``duration_s`` seconds after each of its threads is warm.

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

        def work(tally: Tally) -> None:
            try:
                torch.set_num_threads(split.intra_op)  # OpenMP keeps this number per calling thread
                for _ in range(WARMUP_CALLS):
                    self.answer(split.batch_size, Tally())
                gate.wait()
                gate.wait()
                while True:
                    part = Tally()
                    self.answer(split.batch_size, part)
                    now = time.perf_counter()
                    if now > deadline[0]:
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

        threads = [threading.Thread(target=work, args=(tally,), daemon=True) for tally in tallies]
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
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="one request's body")
    parser.add_argument("--torchscript", type=Path, metavar="FILE.pt", help="use this model instead of the archive's")
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


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        check_limits(args)
        try:
            body = args.data.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read --data {args.data}: {error.strerror}") from None
        with open_archive(args.archive) as archive:
            handler, model, context = load(archive, args.torchscript)
            direct = Direct(handler, model, context, body)
            threads = args.threads or default_splits(machine()["cores"])
            splits = [Split(workers, intra_op, size) for size in args.batch_sizes for workers, intra_op in threads]
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
    except ServeError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    print_table(measured)
    if args.json:
        settings = {
            "archive": args.archive.name,
            "data": args.data.name,
            "duration_s": args.duration,
            "rounds": args.rounds,
            "torchscript": args.torchscript.name if args.torchscript else None,
        }
        result = {"schema": 1, "settings": settings, "machine": machine(), "splits": measured}
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
