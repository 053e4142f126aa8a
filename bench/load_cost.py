"""What it costs to prove that speed changes no answer, when a model is loaded: CPU time of one core."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from pyserve.archive.archive import open_archive
from pyserve.lanes.network import Network
from pyserve.models.loader import load_network


def load(path: Path, batch_size: int) -> Network:
    """The network of an archive, as a server loads it."""
    with open_archive(path) as archive:
        return load_network(
            archive, name=archive.manifest.model_name, devices=["cpu"], batch_size=batch_size,
            cpu_budget=1, limit_max_image_pixels=True, startup_timeout_s=600, progress=lambda text: None,
        )  # fmt: skip


def main() -> None:
    """Prints a line per batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("batch_sizes", type=int, nargs="+", help="such as 1 8")
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    load(parsed.archive, 1)  # converts an eager model, and reads the file into memory
    for batch_size in parsed.batch_sizes:
        began = time.process_time()
        network = load(parsed.archive, batch_size)
        loaded = time.process_time()
        proof = network.batches
        while proof is not None and not proof.is_settled_for(batch_size):
            proof.extend(batch_size)
        settled = time.process_time()
        network.run(network.example)
        item_s = time.process_time() - settled
        print(f"{parsed.archive.stem} batchSize {batch_size}: {loaded - began:.2f} s to load, {settled - loaded:.2f} s "
              f"behind the first requests ({item_s:.3f} s an item)")  # fmt: skip


if __name__ == "__main__":
    main()
