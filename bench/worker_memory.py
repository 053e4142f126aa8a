"""Memory of a whole server by the number of workers, for each backend: PSS of all its processes.

    python bench/worker_memory.py                             # densenet161, batches of up to 8, 1 and 4 workers
    python bench/worker_memory.py --network resnet18 --backends torchscript openvino --batch-size 1

Each figure is a server of its own: it loads, its workers are set, and 8 clients post pictures for some seconds, again
and again until two readings in a row are alike: for other workers OpenVINO's model is compiled anew, beside the one
before. Then nobody asks for a minute, until what batches have left free is given back. A reading is what every process
of it holds, pages that several share once (`Pss` of /proc/PID/smaps_rollup). What backends make is kept in the folder
of ``--cache``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zipfile
from pathlib import Path

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
import torch

from bench.backend_costs import SETTLED_TIMEOUT_S, Clients
from bench.servers import Server, pyserve
from pyserve.archive.packing import ArchiverConfig, write_archive
from pyserve.commands.example import write_example
from pyserve.memory_at_rest import REST_S
from pyserve.models.sample import write_sample_picture

AIM = 1.15
CLIENTS = 8
ROUNDS_MAX = 20
STEADY = 0.02
KINDS = ("Pss", "Pss_Anon", "Pss_File", "Pss_Shmem")


def main() -> int:
    """Prints a table for bench/README.md. Returns 1 if a backend does not run or is above the aim."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="densenet161", help="as `pyserve example` names them")
    parser.add_argument("--backends", nargs="+", default=["torchscript", "openvino", "aotinductor"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8.0, help="of requests before memory is read")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "out" / "cache")
    options = parser.parse_args()
    is_fine = True
    print("| backend | | " + " | ".join(f"{count} workers, MB" for count in options.workers) + " | last / first |")
    print("|---|---|" + "---|" * (len(options.workers) + 1), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for backend in options.backends:
            try:
                used = [measure(Path(folder), backend, count, options) for count in options.workers]
            except RuntimeError as error:
                print(f"{backend}: {error}", file=sys.stderr)
                is_fine = False
                continue
            for when in ("under load", "at rest"):
                ratio = used[-1][when]["Pss"] / used[0][when]["Pss"]
                is_fine &= ratio <= AIM
                readings = [each[when] for each in used]
                cells = " | ".join(f"{each['Pss']:.0f} ({each['Pss_Anon']:.0f} of its own)" for each in readings)
                print(f"| {backend} | {when} | {cells} | {ratio:.3f} |", flush=True)
    return 0 if is_fine else 1


def measure(folder: Path, backend: str, workers: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """MB of each of `KINDS`, with ``workers`` workers on ``backend``: under load, and at rest."""
    archive = archive_of(folder, backend, options.network, options.batch_size)
    body = write_sample_picture(folder / "picture.jpg").read_bytes()
    options.cache.mkdir(parents=True, exist_ok=True)
    with pyserve(folder / "server", [archive], cache=options.cache.absolute()) as server:
        server.first_answer_s(archive.stem, body, SETTLED_TIMEOUT_S)
        if (chosen := server.chosen_backend(archive.stem)) != backend:
            raise RuntimeError(f"it is served on {chosen}")
        server.set(archive.stem, f"min_worker={workers}&max_worker={workers}")
        before = 0.0
        for _ in range(ROUNDS_MAX):
            with Clients(server, archive.stem, body, CLIENTS):
                time.sleep(options.seconds)
            used = memory_of(server)
            if abs(used["Pss"] - before) < STEADY * before:
                time.sleep(2 * REST_S + 5)
                return {"under load": used, "at rest": memory_of(server)}
            before = used["Pss"]
    raise RuntimeError(f"with {workers} workers its memory did not come to rest")


def archive_of(folder: Path, backend: str, network: str, batch_size: int) -> Path:
    """An archive of the example with its backend named; written once."""
    name = f"{network}_{backend}"
    path = folder / f"{name}.mar"
    if path.exists():
        return path
    source = folder / "example"
    torch.manual_seed(0)  # what the cache has for these weights is found again
    with zipfile.ZipFile(write_example(network, source, force=True)) as example:
        example.extractall(source)
    config = folder / f"{name}.yaml"
    config.write_text(f"batchSize: {batch_size}\nmaxBatchDelay: 0\nbackend: {backend}\nstartupTimeout: 3600\n")
    return write_archive(ArchiverConfig(
        name, "image_classifier", model_file=str(next(source.glob("*.py"))),
        serialized_file=str(next(source.glob("*.pth"))), config_file=str(config), export_path=str(folder),
    ))  # fmt: skip


def memory_of(server: Server) -> dict[str, float]:
    """Of the server's command and all that it has started, MB by kind."""
    found = dict.fromkeys(KINDS, 0.0)
    root = psutil.Process(server.pid)
    for process in (root, *root.children(recursive=True)):
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue  # it has ended
        for name, value in (line.split()[:2] for line in lines):
            if name.rstrip(":") in found:
                found[name.rstrip(":")] += int(value) / 1000
    return found


if __name__ == "__main__":
    sys.exit(main())
