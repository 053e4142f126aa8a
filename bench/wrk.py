"""wrk as the load generator, where it is installed: the same report as ``bench/latency.py`` for a closed loop.

wrk is C and takes less of the cores that it shares with the server, so a model that costs nothing shows more of the
server. Its latencies are of the closed loop, in whole microseconds. It begins with nothing under way and leaves out
what is under way at its end, which counts where a request takes a good part of a run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Sends requests in turn that were made beforehand, and writes what was measured as JSON at the end. Its arguments:
# where to, and a file with the requests, each behind a line with its size.
SCRIPT = r"""
local requests, number = {}, 0
function init(arguments)
  out = arguments[1]
  local file = assert(io.open(arguments[2], "rb"))
  while true do
    local size = file:read("*n", 1)
    if not size then break end
    requests[#requests + 1] = file:read(size)
  end
  file:close()
end
function request()
  number = number + 1
  return requests[(number - 1) % #requests + 1]
end
local threads = {}
function setup(thread)
  threads[#threads + 1] = thread
end
function done(summary, latency, _)
  local errors = summary.errors
  local file = assert(io.open(threads[1]:get("out"), "w"))
  file:write(string.format(
    '{"requests": %d, "duration_us": %d, "not_200": %d, "no_answer": %d, "p50": %d, "p99": %d, "p99.9": %d}',
    summary.requests, summary.duration, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99), latency:percentile(99.9)))
  file:close()
end
"""


def is_installed() -> bool:
    return shutil.which("wrk") is not None


def measure(
    url: str,
    bodies: list[bytes],
    headers: dict[str, str],
    *,
    clients: int,
    duration_s: float,
    each: list[dict[str, str]] | None = None,
) -> dict[str, Any]:
    """One closed loop of ``clients`` connections in one thread.

    Args:
        each: further headers, in turn; as many requests are made as there are of these or of bodies.

    Returns:
        The keys ``rates.requests_per_s``, ``latency_ms`` and ``requests.failed`` of a report of ``bench/latency.py``.

    Raises:
        RuntimeError: wrk failed; with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="pyserve-wrk-") as name:
        folder = Path(name)
        script, out, requests = folder / "post.lua", folder / "out.json", folder / "requests"
        script.write_text(SCRIPT)
        with requests.open("wb") as file:
            for request in requests_of(url, bodies, headers, each or [{}]):
                file.write(b"%d\n" % len(request))
                file.write(request)
        done = subprocess.run(
            ["wrk", "--threads", "1", "--connections", str(clients), "--duration", f"{max(1, round(duration_s))}s",
             "--timeout", "60s", "--latency", "--script", str(script), url, "--", str(out), str(requests)],
            capture_output=True, text=True, check=False, timeout=duration_s + 300,
        )  # fmt: skip
        if done.returncode or not out.exists():
            raise RuntimeError(f"wrk ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-500:]}")
        return report_of(json.loads(out.read_text()))


def requests_of(url: str, bodies: list[bytes], headers: dict[str, str], each: list[dict[str, str]]) -> Iterator[bytes]:
    """Whole requests, as many as there are ``bodies`` or ``each``."""
    parts = urlsplit(url)
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    for number in range(max(len(bodies), len(each))):
        body = bodies[number % len(bodies)]
        # A host with the port, as every other client sends it.
        pairs = {"Host": parts.netloc, **headers, **each[number % len(each)], "Content-Length": str(len(body))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in pairs.items())
        yield f"POST {target} HTTP/1.1\r\n{lines}\r\n".encode() + body


def report_of(told: dict[str, Any]) -> dict[str, Any]:
    """What the script wrote, as a report of ``bench/latency.py``."""
    ok = told["requests"] - told["not_200"]
    return {
        "rates": {"requests_per_s": ok / (told["duration_us"] / 1e6)},
        "latency_ms": {key: told[key] / 1000 for key in ("p50", "p99", "p99.9")},
        "requests": {"ok": ok, "failed": told["not_200"] + told["no_answer"]},
    }
