"""One load test: what is sent, by whom, for how long, from the flags of a command line to the recording.

`pyserve bench` and ``bench/latency.py`` share the flags of `add_load_arguments`; what they send they find each in their
own way.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import signal
import socket
import ssl
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop

from pyserve.errors import ConfigError
from pyserve.load_test.load import Plan
from pyserve.load_test.recording import NS_PER_S, Recording, merge, value_at
from pyserve.load_test.wire import Driver, Target, request_bytes
from pyserve.regular_file import read_whole

PROGRESS_S = 0.5
SECONDS_MAX = 1_000_000
# A generator process sends some ten thousand requests/s, and has a port for each connection.
_MOST = {
    "concurrency": 60_000, "rate": 1_000_000, "in_flight_max": 60_000, "requests": 1_000_000_000,
    "duration": SECONDS_MAX, "timeout": SECONDS_MAX, "processes": 1000,
}  # fmt: skip
TOKEN_CHARACTERS = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


class LoadTestError(ConfigError):
    """The load test cannot be run as it was asked for; the text says what to change.

    Attributes:
        exit_code: of the command.
    """

    exit_code = 1


def add_load_arguments(parser: argparse.ArgumentParser) -> None:
    """How the load is made, whatever is sent."""
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("-c", "--concurrency", "--clients", type=int, metavar="N",
        help="closed loop: N clients, each with one request at a time (default: 1)")  # fmt: skip
    add("--rate", type=float, metavar="R", help="open loop: R requests per second, answered or not")
    add("--arrivals", choices=("constant", "poisson"), default="constant", help="open loop only")
    add("--in-flight-max", type=int, default=512, metavar="N",
        help="most connections of the open loop (default: %(default)s)")  # fmt: skip
    add("-n", "--requests", type=int, metavar="N", help="stop after N counted requests")
    add("-d", "--duration", "--seconds", type=float, metavar="S", help="measure for S seconds (default: 10)")
    add("--warmup", default="2s", metavar="S|N",
        help="not counted: '5s' is seconds, '100' is requests (default: %(default)s)")  # fmt: skip
    add("--timeout", type=float, default=60.0, metavar="S", help="per request (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the Poisson arrivals")
    add("--processes", type=int, default=1, metavar="P", help="generator processes that share the load")


def make_plan(args: argparse.Namespace) -> Plan:
    """The checked plan of one whole run, before it is shared among processes."""
    for name, most in _MOST.items():
        value = getattr(args, name)
        if value is not None and not 0 < value <= most:
            raise LoadTestError(f"--{name.replace('_', '-')} must be above 0 and at most {most}, not {value}")
    if args.rate is not None and args.concurrency is not None:
        raise LoadTestError(
            "--rate (open loop) and --concurrency (closed loop) exclude each other; "
            "--in-flight-max bounds the connections of the open loop"
        )
    if args.requests is not None and args.duration is not None:
        raise LoadTestError("give --requests or --duration, not both")
    text = args.warmup.strip()
    try:
        warmup_s = float(text[:-1]) if text.endswith("s") else 0.0
        warmup_requests = 0 if text.endswith("s") else int(text)
        if not (0 <= warmup_s <= SECONDS_MAX and warmup_requests >= 0):
            raise ValueError
    except ValueError:
        raise LoadTestError(f"--warmup takes seconds ('5s') or a number of requests ('100'), not {text!r}") from None
    concurrency = args.concurrency or 1
    for name, value in (
        ("concurrency", concurrency if args.rate is None else args.in_flight_max),
        ("requests", args.requests),
    ):
        if value is not None and value < args.processes:
            raise LoadTestError(f"--{name} {value} cannot be shared among --processes {args.processes}")
    duration_s = None if args.requests is not None else (args.duration or 10.0)
    return Plan(
        concurrency=concurrency,
        rate=args.rate,
        arrivals=args.arrivals,
        requests=args.requests,
        duration=None if duration_s is None else int(duration_s * NS_PER_S),
        warmup_requests=warmup_requests,
        warmup=int(warmup_s * NS_PER_S),
        timeout=int(args.timeout * NS_PER_S),
        in_flight_max=args.in_flight_max,
        seed=args.seed,
    )


def share(plan: Plan, number: int, processes: int) -> Plan:
    """The part of ``plan`` that generator ``number`` of ``processes`` carries out."""

    def part(total: int) -> int:
        return total // processes + (number < total % processes)

    return Plan(
        concurrency=part(plan.concurrency),
        rate=None if plan.rate is None else plan.rate / processes,
        arrivals=plan.arrivals,
        phase=number / processes,
        requests=None if plan.requests is None else part(plan.requests),
        duration=plan.duration,
        warmup_requests=part(plan.warmup_requests),
        warmup=plan.warmup,
        timeout=plan.timeout,
        in_flight_max=part(plan.in_flight_max),
        seed=plan.seed * processes + number,
    )


def http_requests(url: str, bodies: list[bytes], headers: list[tuple[str, str]]) -> list[bytes]:
    """The bytes of a POST of each body; of one GET without any.

    Raises:
        LoadTestError: a header cannot be sent.
    """
    for name, value in headers:
        if not name or not TOKEN_CHARACTERS.issuperset(name):
            raise LoadTestError(f"--header {name + ': ' + value!r} must look like 'Name: value'")
        if any(ord(character) > 255 or character in "\r\n\0" for character in value):
            raise LoadTestError(f"the value of header {name} holds characters that a header cannot carry")
    parts = urlsplit(url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2] or "localhost"
    posts = [request_bytes("POST", path, host, headers, body) for body in bodies]
    return posts or [request_bytes("GET", path, host, headers, b"")]


def read_bodies(files: list[Path], flag: str) -> list[bytes]:
    """What the files hold.

    Args:
        flag: that named them.

    Raises:
        LoadTestError: one cannot be read.
    """
    bodies = []
    for file in files:
        try:
            bodies.append(read_whole(file))
        except OSError as error:
            raise LoadTestError(f"cannot read {flag} {file}: {error.strerror}") from None
    return bodies


def find_server(url: str, timeout_s: float, insecure: bool) -> Target:
    """An address of the URL's host that accepts connections.

    Raises:
        LoadTestError: the name is unknown, or nothing listens there.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    tls = None
    if parts.scheme == "https":
        tls = ssl.create_default_context()
        if insecure:
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LoadTestError(f"cannot reach {url}: the name {host} is unknown ({error}); check --url") from None
    reason: OSError | None = None
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as probe:
            probe.settimeout(min(timeout_s, 5.0))
            try:
                probe.connect(address)
                return Target(str(address[0]), port, host, tls)
            except OSError as error:
                reason = error
    text = reason.strerror or str(reason) if reason else "no address"
    raise LoadTestError(
        f"cannot reach {url}: {text}. Start a server (pyserve start --model-store model-store --models all) "
        "or name a running one with --url"
    )


async def generate(plan: Plan, target: Target, payloads: list[bytes], start_at: int, show: bool) -> Recording:
    """One generator's run on the running loop. SIGINT and SIGTERM end it early with what was measured."""
    recording = Recording()
    driver = Driver(plan, target, payloads, recording)
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, driver.load.stop)
    progress = asyncio.create_task(_show_progress(recording)) if show else None
    try:
        await driver.run(start_at)
    finally:
        if progress is not None:
            progress.cancel()
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return recording


async def _show_progress(recording: Recording) -> None:
    while True:
        now = time.monotonic_ns()
        text = "warm-up"
        if now >= recording.started_at:
            passed = (now - recording.started_at) / NS_PER_S
            counts = recording.recent_counts()  # of the whole run it would cost more each time
            text = (
                f"{passed:6.1f} s  {recording.ok} ok  {recording.failures} failed  "
                f"{recording.ok_in_window / max(passed, 1e-9):.1f}/s  "
                f"p50 {value_at(counts, 50) / 1000:.2f} ms"
            )
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        await asyncio.sleep(PROGRESS_S)


def _generate_in_child(pipe: Connection, *arguments: Any) -> None:
    pipe.send(uvloop.run(generate(*arguments)))
    pipe.close()


def run(plan: Plan, target: Target, payloads: list[bytes], processes: int) -> Recording:
    """The whole run, in this process or in several that start together."""
    show = sys.stderr.isatty()
    if processes == 1:
        return uvloop.run(generate(plan, target, payloads, 0, show))
    context = multiprocessing.get_context("fork")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to the children too; they end the run
    start_at = time.monotonic_ns() + NS_PER_S // 5
    children = []
    for number in range(processes):
        ours, theirs = context.Pipe(duplex=False)
        arguments = (theirs, share(plan, number, processes), target, payloads, start_at, show and number == 0)
        child = context.Process(target=_generate_in_child, args=arguments)
        child.start()
        theirs.close()
        children.append((child, ours))
    try:
        recordings = [pipe.recv() for _, pipe in children]
    except EOFError:
        raise LoadTestError("a generator process ended without a result; its own message is above") from None
    for child, _ in children:
        child.join()
    return merge(recordings)


def load_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of `add_load_arguments` as they go into the JSON."""
    return {
        "loop": "closed" if args.rate is None else "open",
        "concurrency": (args.concurrency or 1) if args.rate is None else None,
        "rate": args.rate,
        "arrivals": args.arrivals if args.rate else None,
        "in_flight_max": args.in_flight_max,
        "requests": args.requests,
        "duration_s": args.duration,
        "warmup": args.warmup,
        "timeout_s": args.timeout,
        "seed": args.seed,
        "processes": args.processes,
    }


def load_text(args: argparse.Namespace) -> str:
    """The same for people."""
    clients = args.concurrency or 1
    return f"{clients} client{'s' if clients > 1 else ''}" if args.rate is None else f"{args.rate:g}/s {args.arrivals}"
