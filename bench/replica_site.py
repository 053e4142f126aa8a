"""One side of `bench/replicas.py`: a Ray on this machine with a deployment, until its stdin ends.

    python bench/replica_site.py WAY PORT ARCHIVE MODEL

WAY is ``direct``, ``haproxy``, ``proxy``, ``batch haproxy`` or ``batch proxy``: pyserve's replica, or a bare deployment
with `@serve.batch` of the same TorchScript file.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

KEY = "bench-" + "k" * 26
BATCH_MAX = 64  # as of the archive


def main() -> None:
    way, port, archive, model = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    # Read when ray is imported.
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled", RAY_SERVE_THROUGHPUT_OPTIMIZED="1",
                      RAY_SERVE_ENABLE_HA_PROXY=str(int("haproxy" in way)))  # fmt: skip
    import ray
    from ray import serve

    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(num_cpus=1, include_dashboard=False, _temp_dir=folder, object_store_memory=100_000_000)
        try:
            proxy_port = port + 1 if way == "direct" else port
            serve.start(http_options={"host": "127.0.0.1", "port": proxy_port})
            app = bare(model) if way.startswith("batch") else engines(archive, port if way == "direct" else 0, folder)
            serve.run(app, route_prefix="/")
            print("ready", flush=True)
            sys.stdin.read()
        finally:
            ray.shutdown()  # not serve's, which waits half a minute for HAProxy


def engines(archive: str, direct_port: int, folder: str) -> Any:
    """pyserve's replica, with tokens, as replicas that listen on all interfaces are to have."""
    import pyserve.cluster

    keys = Path(folder) / "keys.json"
    keys.write_text(json.dumps({scope: {"key": KEY} for scope in ("inference", "management")}))
    args = {"models": [archive], "num_cpus": 1, "config": {"token_file": str(keys)}}
    return pyserve.cluster.app(args | ({"direct_port": direct_port} if direct_port else {}))


def bare(model: str) -> Any:
    """What one writes without pyserve."""
    import numpy as np
    import torch
    from ray import serve
    from starlette.requests import Request
    from starlette.responses import Response

    @serve.deployment(num_replicas=1, max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 1})
    class Model:
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.model = torch.jit.freeze(torch.jit.load(model).eval())

        @serve.batch(max_batch_size=BATCH_MAX, batch_wait_timeout_s=0)
        async def predict(self, bodies: list[bytes]) -> list[bytes]:
            rows = torch.stack([torch.frombuffer(bytearray(each), dtype=torch.float32) for each in bodies])
            with torch.inference_mode():
                answers: np.ndarray = self.model(rows).numpy()
            return [row.tobytes() for row in answers]

        async def __call__(self, request: Request) -> Response:
            return Response(await self.predict(await request.body()), media_type="application/octet-stream")

    return Model.bind()  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
