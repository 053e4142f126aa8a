"""What a lane does when its device breaks, for a process of its own, since such a device stays lost. Prints JSON.

python -m tests.simdev.lost_device_case FAULT...
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from tests.simdev.device import simulated
from tests.simdev.flow import Wide, saved
from tests.support.lane_bench import LaneBench

REQUESTS = 200


def main() -> None:
    from pyserve import _core

    with simulated() as simdev, tempfile.TemporaryDirectory() as folder:
        network = Wide().eval()
        lane = LaneBench(saved(network, Path(folder)), [torch.zeros(1, 64)], device="simdev:0", batch=4, workers=2)
        for line in sys.argv[1:]:
            simdev.fault(line)
        xs = torch.randn(REQUESTS, 1, 64, generator=torch.Generator().manual_seed(2))
        for index, x in enumerate(xs):
            lane.submit(index, x)
        lane.wait(lambda: bool(_core.lost_devices()))
        lane.wait(lambda: set(lane.states()) == {"failed"})
        lane.drain()
        with torch.inference_mode():
            wrong = [
                index for index, answer in lane.answers.items()
                if not isinstance(answer, str) and not torch.allclose(answer, network(xs[index])[0], atol=1e-5)
            ]  # fmt: skip
        found = {
            "codes": Counter(answer if isinstance(answer, str) else "ok" for answer in lane.answers.values()),
            "wrong": wrong,
            "messages": sorted({each.message for each in lane.completions if each.code != "ok"}),
            "lost": _core.lost_devices(),
            "other": _core.probe_device("simdev:1", 30.0)[0],
            "errors": [row["error"] for row in lane.lane.workers()],
            "retried": lane.lane.stats()["retried_singly"],
            "waiting": lane.lane.queue_size,
        }
        print(json.dumps(found), flush=True)
        os._exit(0)  # as the server does: nothing of the device is let go


if __name__ == "__main__":
    main()
