"""Ray Serve: bytes in and out through Starlette's request and response, one replica per worker, @serve.batch.

https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html (max_batch_size, batch_wait_timeout_s) and
.../performance.html (`max_ongoing_requests`, each replica's share of the cores, RAY_SERVE_THROUGHPUT_OPTIMIZED);
.../cluster/kubernetes/user-guides/kuberay-serve-high-throughput.html (RAY_SERVE_ENABLE_HA_PROXY: HAProxy, which comes
with ray[serve], in front of the replicas; measured here 13 times as many requests/s as without).
"""

import os
import signal
import sys
import tempfile

# Read when ray is imported. Its token is for clusters, and would be written to the home folder.
os.environ.update(
    RAY_SERVE_THROUGHPUT_OPTIMIZED="1", RAY_SERVE_ENABLE_HA_PROXY="1", RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
)  # fmt: skip

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response
from work import Work, setting

THREADS = setting("THREADS", 1)


@serve.deployment(
    num_replicas=setting("WORKERS"),
    max_ongoing_requests=setting("QUEUE"),
    ray_actor_options={"num_cpus": THREADS},
)
class Model:
    def __init__(self):
        self.work = Work()

    @serve.batch(max_batch_size=setting("BATCH"), batch_wait_timeout_s=setting("DELAY_MS") / 1000)
    async def predict(self, bodies):
        return self.work.forward([self.work.preprocess(body) for body in bodies])

    async def __call__(self, request: Request):
        return Response(await self.predict(await request.body()), media_type="application/octet-stream")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:  # its own would stay
        ray.init(num_cpus=THREADS * setting("WORKERS"), include_dashboard=False, _temp_dir=folder)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # init sets one of its own
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": setting("PORT")})
            serve.run(Model.bind(), route_prefix="/")
            signal.pause()
        finally:
            ray.shutdown()  # not serve's, which waits half a minute for HAProxy
