"""The figures of bench/README.md, each measured beside what it is compared with in one run.

    python bench/figures.py                      # all of them, about 15 minutes on 2 cores
    python bench/figures.py throughput start     # some
    python bench/figures.py start --torchserve VENV/bin

Prints a Markdown table per figure; ``--json FILE`` keeps the raw numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.servers import ROOT, free_ports, pyserve, resident_mb, torchserve
from pyserve.load_test.report import machine

BENCH = Path(__file__).parent
Result = dict[str, Any]


class Run:
    """Folder, archives and options of one run of this script."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder = folder
        self.options = options
        self.picture = folder / "sample.jpg"
        self.densenet = folder / "store" / "densenet161.mar"
        self.nothing = folder / "store" / "nothing.mar"
        self.floats = folder / "floats.bin"

    def prepare(self) -> None:
        """Makes the picture and the archives."""
        import torch

        from pyserve.archive.packing import ArchiverConfig, write_archive
        from pyserve.commands.example import write_example
        from pyserve.models.sample import write_sample_picture

        write_sample_picture(self.picture)
        write_example("densenet161", self.densenet.parent)
        self.floats.write_bytes(b"\0\0\x80\x3f" * 16)
        weights = self.folder / "nothing.pt"
        torch.jit.save(torch.jit.trace(torch.nn.Identity(), torch.zeros(1, 16)), str(weights))
        yaml = self.folder / "nothing.yaml"
        yaml.write_text("input: {dtype: float32, shape: [16]}\nbatchSize: 64\nmaxBatchDelay: 0\n")
        write_archive(ArchiverConfig(
            model_name="nothing", version="1.0", handler="tensor", serialized_file=str(weights), config_file=str(yaml),
            export_path=str(self.nothing.parent), force=True,
        ))  # fmt: skip

    def load(self, url: str, *flags: str, data: Path | None = None, duration_s: float = 0) -> Result:
        """One closed-loop load test."""
        out = self.folder / "latency.json"
        out.unlink(missing_ok=True)
        subprocess.run(
            [sys.executable, str(BENCH / "latency.py"), "--url", url, "--data", str(data or self.picture),
             "--duration", str(duration_s or self.options.duration), "--json", str(out), *flags],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        report: Result = json.loads(out.read_text())
        if report["requests"]["failed"]:
            raise RuntimeError(f"{report['requests']['failed']} requests failed: {report['statuses']}")
        return report


def show(title: str, unit: str, numbers: dict[str, list[float]], *, digits: int) -> None:
    """A Markdown table, one row per side of the comparison."""
    print(f"\n### {title}\n\n| | {unit} median (lowest to highest) |\n|---|---|")
    for name, values in numbers.items():
        low, middle, high = (f"{each:.{digits}f}" for each in (min(values), statistics.median(values), max(values)))
        print(f"| {name} | {middle} ({low} to {high}) |")


def throughput(run: Run) -> Result:
    """densenet161, JPEG in, JSON out, 8 clients: workers 1, 2, 4 beside the direct call, in turn."""
    numbers: dict[str, list[float]] = {}
    with pyserve(run.folder / "throughput", [run.densenet]) as server:
        server.first_answer_s("densenet161", run.picture.read_bytes())
        for _ in range(run.options.rounds):
            for name, rate in _direct(run).items():
                numbers.setdefault(name, []).append(rate)
            for workers in (1, 2, 4):
                server.set("densenet161", f"min_worker={workers}&max_worker={workers}")
                report = run.load(server.url("/predictions/densenet161"), "--concurrency", "8", "--warmup", "3s")
                numbers.setdefault(f"{workers} workers", []).append(report["rates"]["requests_per_s"])
    medians = {name: statistics.median(values) for name, values in numbers.items()}
    best_direct = max(value for name, value in medians.items() if name.startswith("direct"))
    show("densenet161, JPEG, 8 clients", "images/s", numbers, digits=2)
    for name in numbers:
        print(f"| {name}, of the best direct call | {medians[name] / best_direct:.2f} |")
    return {"images_per_s": numbers}


def _direct(run: Run) -> dict[str, float]:
    out = run.folder / "direct.json"
    subprocess.run(
        [sys.executable, str(BENCH / "direct.py"), "--archive", str(run.densenet), "--data", str(run.picture),
         "--threads", "1x2", "2x1", "--rounds", "1", "--duration", str(run.options.duration), "--json", str(out)],
        check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    report = json.loads(out.read_text())
    return {f"direct {row['split']}": row["items_per_s"] for row in report["splits"]}


def memory(run: Run) -> Result:
    """RSS of all server processes after load, with 1 and with 4 workers, each in its own server."""
    numbers: dict[str, list[float]] = {"1": [], "4": []}
    for _ in range(run.options.rounds):
        for workers in ("1", "4"):
            folder = run.folder / "memory"
            with pyserve(folder, [run.densenet], cache=run.folder / "throughput" / "cache") as server:
                server.first_answer_s("densenet161", run.picture.read_bytes())
                server.set("densenet161", f"min_worker={workers}&max_worker={workers}")
                run.load(server.url("/predictions/densenet161"), "--concurrency", "8", duration_s=8)
                # The handover names the server process's part: same folder, torch loaded.
                numbers[workers].append(resident_mb("pyserve.server.main"))
    one, four = (statistics.median(numbers[each]) for each in ("1", "4"))
    show("Resident memory after load, densenet161, by workers", "MB", numbers, digits=0)
    print(f"| 4 workers / 1 worker | {four / one:.3f} |")
    return {"resident_mb": numbers}


def lone_client(run: Run) -> Result:
    """One client: batch_size=8 with max_batch_delay=1000 beside batch_size=1, in turn."""
    numbers: dict[str, list[float]] = {}
    settings = ("batch_size=1&max_batch_delay=0", "batch_size=8&max_batch_delay=1000")
    with pyserve(run.folder / "lone", [run.densenet], cache=run.folder / "throughput" / "cache") as server:
        server.first_answer_s("densenet161", run.picture.read_bytes())
        for _ in range(run.options.rounds):
            for query in settings:
                server.set("densenet161", query)
                report = run.load(server.url("/predictions/densenet161"), "--concurrency", "1")
                numbers.setdefault(query, []).append(report["latency_ms"]["p50"])
    show("One client, densenet161", "p50 in ms", numbers, digits=1)
    return {"p50_ms": numbers}


def start(run: Run) -> Result:
    """From the command to the first 200 of a prediction: first start ever, later starts, and TorchServe."""
    body = run.picture.read_bytes()
    numbers: dict[str, list[float]] = {"pyserve, first start": [], "pyserve, later start": []}
    bin_folder = run.options.torchserve
    archive = _torchserve_archive(run, bin_folder) if bin_folder else None
    for number in range(run.options.rounds):
        cache = run.folder / f"start-cache-{number}"
        for name in ("pyserve, first start", "pyserve, later start"):
            with pyserve(run.folder / "start", [run.densenet], cache=cache) as server:
                numbers[name].append(server.first_answer_s("densenet161", body))
        if archive is not None:
            with torchserve(run.folder / "torchserve", bin_folder, archive) as server:
                numbers.setdefault("TorchServe", []).append(server.first_answer_s("densenet161", body))
    show("Start to first 200, densenet161 (eager archive)", "s", numbers, digits=1)
    return {"first_answer_s": numbers}


def _torchserve_archive(run: Run, bin_folder: Path) -> Path:
    """The same model file and weights, with a handler that needs no torchvision."""
    from pyserve.archive.archive import open_archive

    source = open_archive(run.densenet)
    assert source.weights is not None and source.manifest.model_file is not None
    # TorchServe imports the model file with its own interpreter, which has no pyserve: the zoo goes along.
    model_file = run.folder / "model.py"
    text = (source.model_dir / source.manifest.model_file).read_text().replace("from pyserve.zoo", "from zoo")
    model_file.write_text(text)
    store = run.folder / "torchserve-store"
    store.mkdir(exist_ok=True)
    subprocess.run(
        [str(bin_folder / "torch-model-archiver"), "--model-name", "densenet161", "--version", "1.0", "--force",
         "--model-file", str(model_file), "--serialized-file", str(source.weights.as_file()),
         "--handler", str(BENCH / "peers" / "torchserve_classifier.py"),
         "--extra-files", str(ROOT / "pyserve" / "zoo.py"),
         "--archive-format", "zip-store", "--export-path", str(store)],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    return store / "densenet161.mar"


def nothing(run: Run) -> Result:
    """A model that costs nothing, 16 floats raw in and out: requests/s beside the bare echo, in turn."""
    numbers: dict[str, list[float]] = {}
    (port,) = free_ports(1)
    echo = subprocess.Popen([sys.executable, str(BENCH / "echo.py"), "--port", str(port)], stdout=subprocess.DEVNULL)
    flags = ("--content-type", "application/octet-stream")
    try:
        with pyserve(run.folder / "nothing", [run.nothing]) as server:
            server.first_answer_s("nothing", run.floats.read_bytes())
            urls = {"echo": f"http://127.0.0.1:{port}/", "pyserve": server.url("/predictions/nothing")}
            for _ in range(run.options.rounds):
                for clients in (1, 64):
                    for name, url in urls.items():
                        report = run.load(url, "--concurrency", str(clients), *flags, data=run.floats)
                        key = f"{name}, {clients} client{'s' if clients > 1 else ''}"
                        numbers.setdefault(f"{key}: requests/s", []).append(report["rates"]["requests_per_s"])
                        numbers.setdefault(f"{key}: p50 ms", []).append(report["latency_ms"]["p50"])
    finally:
        echo.terminate()
        echo.wait()
    show("A model that costs nothing, 16 floats raw", "", numbers, digits=3)
    rates = [statistics.median(numbers[f"{name}, 64 clients: requests/s"]) for name in ("pyserve", "echo")]
    print(f"| pyserve / echo, 64 clients | {rates[0] / rates[1]:.2f} |")
    return numbers


FIGURES: dict[str, Callable[[Run], Result]] = {
    "throughput": throughput, "memory": memory, "lone_client": lone_client, "start": start, "nothing": nothing,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help=f"any of {', '.join(FIGURES)}; default: all")
    parser.add_argument("--rounds", type=int, default=3, help="repeats, interleaved (default: 3)")
    parser.add_argument("--duration", type=float, default=15, help="seconds of one load test (default: 15)")
    parser.add_argument("--torchserve", type=Path, metavar="VENV/bin", help="measure this TorchServe beside ours")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    unknown = set(options.figures) - FIGURES.keys()
    if unknown:
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    if options.torchserve is not None:
        options.torchserve = options.torchserve.absolute()
    results: Result = {
        "machine": machine(), "load_average_before": os.getloadavg(), "at": time.strftime("%FT%TZ", time.gmtime())
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="pyserve-bench-") as folder:
        run = Run(Path(folder), options)
        run.prepare()
        for name in options.figures or FIGURES:
            results[name] = FIGURES[name](run)
            sys.stdout.flush()
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
