"""wrk as the load generator, where it is installed: the same report as ``bench/latency.py`` for a closed loop.

wrk is C and takes less of the cores that it shares with the server, so a model that costs nothing shows more of the
server. Its latencies are of the closed loop, in whole microseconds, and it counts no warm-up: a run of its own is made
for that.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

# Posts the files of `bodies` in turn, and writes what was measured as JSON at the end. Its arguments: where to, a file
# with a header "name: value" a line, and the bodies' files.
SCRIPT = r"""
local requests, number = {}, 0
function init(arguments)
  out = arguments[1]
  local headers = {}
  for line in io.lines(arguments[2]) do
    local name, value = line:match("^([^:]+): *(.*)$")
    headers[name] = value
  end
  for index = 3, #arguments do
    local file = assert(io.open(arguments[index], "rb"))
    requests[#requests + 1] = wrk.format("POST", nil, headers, file:read("*a"))
    file:close()
  end
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
    url: str, bodies: list[bytes], headers: dict[str, str], *, clients: int, duration_s: float, warm_up_s: float
) -> dict[str, Any]:
    """One closed loop of ``clients`` connections in one thread.

    Returns:
        The keys ``rates.requests_per_s``, ``latency_ms`` and ``requests.failed`` of a report of ``bench/latency.py``.

    Raises:
        RuntimeError: wrk failed; with what it said.
    """
    with tempfile.TemporaryDirectory(prefix="pyserve-wrk-") as name:
        folder = Path(name)
        script, out, head = folder / "post.lua", folder / "out.json", folder / "headers"
        script.write_text(SCRIPT)
        # A host with the port, as every other client sends it.
        head.write_text(
            "".join(f"{key}: {value}\n" for key, value in {"Host": urlsplit(url).netloc, **headers}.items())
        )
        files = []
        for number, body in enumerate(bodies):
            path = folder / f"body-{number}"
            path.write_bytes(body)
            files.append(str(path))
        for seconds in (warm_up_s, duration_s):
            if seconds <= 0:
                continue
            done = subprocess.run(
                ["wrk", "--threads", "1", "--connections", str(clients), "--duration", f"{max(1, round(seconds))}s",
                 "--timeout", "60s", "--latency", "--script", str(script), url, "--", str(out), str(head), *files],
                capture_output=True, text=True, check=False, timeout=seconds + 300,
            )  # fmt: skip
            if done.returncode or not out.exists():
                raise RuntimeError(f"wrk ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-500:]}")
        return report_of(json.loads(out.read_text()))


def report_of(told: dict[str, Any]) -> dict[str, Any]:
    """What the script wrote, as a report of ``bench/latency.py``."""
    ok = told["requests"] - told["not_200"]
    return {
        "rates": {"requests_per_s": ok / (told["duration_us"] / 1e6)},
        "latency_ms": {key: told[key] / 1000 for key in ("p50", "p99", "p99.9")},
        "requests": {"ok": ok, "failed": told["not_200"] + told["no_answer"]},
    }
