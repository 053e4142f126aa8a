"""Load test for any model on any pyserve or TorchServe server.

    python bench/latency.py --model densenet161 --data kitten.jpg --concurrency 8       # closed loop
    python bench/latency.py --model densenet161 --data kitten.jpg --rate 5 --duration 60  # open loop

Exit status: 0, 1 wrong use or no server, 2 every request failed, 130 interrupted. The method is in bench/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import math
import mimetypes
import multiprocessing
import signal
import socket
import ssl
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import uvloop

from bench import report
from bench.load import Plan
from bench.recording import NS_PER_S, Recording, merge, value_at
from bench.wire import Driver, Target, request_bytes

DEFAULT_URL = "http://127.0.0.1:8080/predictions/{model}"
PROGRESS_S = 0.5
TOKEN_CHARACTERS = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


class UsageError(Exception):
    """The command line cannot be carried out; the text says what to change."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """As argparse does, but with status 1: status 2 says that every request failed."""
        self.print_usage(sys.stderr)
        self.exit(1, f"error: {message}\n")


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is sent")
    what.add_argument("--model", help="model name; fills {model} in --url")
    what.add_argument("--model-version", help="version, added to the path")
    what.add_argument(
        "--data",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="request body; several are used in turn; without any, GET is sent to --url",
    )
    what.add_argument("--url", default=DEFAULT_URL, help="default: %(default)s")
    what.add_argument("--content-type", help="none is sent by default, as curl -T does")
    what.add_argument("--header", action="append", default=[], metavar="'NAME: VALUE'", help="further header")
    what.add_argument("--insecure", action="store_true", help="https without checking the certificate")
    how = parser.add_argument_group("how")
    how.add_argument("--concurrency", type=int, metavar="N", help="closed loop with N clients (default: 1)")
    how.add_argument("--rate", type=float, metavar="R", help="open loop with R requests per second")
    how.add_argument("--arrivals", choices=("constant", "poisson"), default="constant", help="open loop only")
    how.add_argument(
        "--in-flight-max",
        type=int,
        default=512,
        metavar="N",
        help="most connections of the open loop (default: %(default)s)",
    )
    how.add_argument("--requests", type=int, metavar="N", help="stop after N counted requests")
    how.add_argument("--duration", type=float, metavar="S", help="measure for S seconds (default: 10)")
    how.add_argument(
        "--warmup",
        default="2s",
        metavar="S|N",
        help="not counted: '5s' is seconds, '100' is requests (default: %(default)s)",
    )
    how.add_argument("--timeout", type=float, default=60.0, metavar="S", help="per request (default: %(default)s)")
    how.add_argument("--seed", type=int, default=0, help="of the Poisson arrivals")
    how.add_argument("--processes", type=int, default=1, metavar="P", help="generator processes that share the load")
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="FILE", help="everything measured, with settings and versions")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="latency distribution and throughput over time")
    out.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="show two results, no test")
    return parser


def make_plan(args: argparse.Namespace) -> Plan:
    """The checked plan of one whole run, before it is shared among processes."""
    for name in ("concurrency", "rate", "in_flight_max", "requests", "duration", "timeout", "processes"):
        value = getattr(args, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if args.rate is not None and args.concurrency is not None:
        raise UsageError(
            "--rate (open loop) and --concurrency (closed loop) exclude each other; "
            "--in-flight-max bounds the connections of the open loop"
        )
    if args.requests is not None and args.duration is not None:
        raise UsageError("give --requests or --duration, not both")
    text = args.warmup.strip()
    try:
        warmup_s = float(text[:-1]) if text.endswith("s") else 0.0
        warmup_requests = 0 if text.endswith("s") else int(text)
        if warmup_s < 0 or warmup_requests < 0 or not math.isfinite(warmup_s):
            raise ValueError
    except ValueError:
        raise UsageError(f"--warmup takes seconds ('5s') or a number of requests ('100'), not {text!r}") from None
    concurrency = args.concurrency or 1
    for name, value in (
        ("concurrency", concurrency if args.rate is None else args.in_flight_max),
        ("requests", args.requests),
    ):
        if value is not None and value < args.processes:
            raise UsageError(f"--{name} {value} cannot be shared among --processes {args.processes}")
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


def make_payloads(args: argparse.Namespace) -> tuple[str, list[bytes]]:
    """The URL and the bytes of one request per data file."""
    url = args.url
    if "{model}" in url:
        if not args.model:
            raise UsageError("name the model with --model, or give a --url without {model}")
        url = url.replace("{model}", quote(args.model, safe=""))
    if args.model_version:
        url = f"{url.rstrip('/')}/{quote(args.model_version, safe='')}"
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_valid = False
    if not is_valid or not url.isascii() or any(character <= " " for character in url):
        raise UsageError(f"--url {url!r} is no http:// or https:// address")
    if not args.data and args.url == DEFAULT_URL:
        raise UsageError("name at least one file to send with --data, such as --data kitten.jpg")
    headers = [("Accept", "*/*")]
    if args.content_type:
        headers.append(("Content-Type", args.content_type))
    for line in args.header:
        name, colon, value = line.partition(":")
        if not colon or not name or not TOKEN_CHARACTERS.issuperset(name):
            raise UsageError(f"--header {line!r} must look like 'Name: value'")
        headers.append((name, value.strip()))
    for name, value in headers:
        if any(ord(character) > 255 or character in "\r\n\0" for character in value):
            raise UsageError(f"the value of header {name} holds characters that a header cannot carry")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    payloads = []
    for file in args.data:
        try:
            body = file.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read --data {file}: {error.strerror}") from None
        payloads.append(request_bytes("POST", path, parts.netloc.rpartition("@")[2], headers, body))
    return url, payloads or [request_bytes("GET", path, parts.netloc.rpartition("@")[2], headers, b"")]


def find_server(url: str, timeout_s: float, insecure: bool) -> Target:
    """An address of the URL's host that accepts connections.

    Raises:
        UsageError: the name is unknown, or nothing listens there.
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
        raise UsageError(f"cannot reach {url}: the name {host} is unknown ({error}); check --url") from None
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
    raise UsageError(
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
        sys.exit("error: a generator process ended without a result; its own message is above")
    for child, _ in children:
        child.join()
    return merge(recordings)


def settings_of(args: argparse.Namespace, url: str) -> dict[str, Any]:
    """The command line as it goes into the JSON; file names without their folders."""
    types = [mimetypes.guess_type(file.name)[0] or "" for file in args.data]
    return {
        "url": url,
        "model": args.model,
        "model_version": args.model_version,
        "data": [{"name": file.name, "size": file.stat().st_size} for file in args.data],
        "content_type": args.content_type,
        "headers": [line.partition(":")[0] for line in args.header],
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
        "is_image": bool(types) and all(kind.startswith("image/") for kind in types),
    }


def compare(paths: list[Path]) -> int:
    """Prints two saved results side by side."""
    loaded = []
    for path in paths:
        try:
            loaded.append(json.loads(path.read_text(encoding="utf-8")))
            if loaded[-1]["schema"] != report.SCHEMA:
                raise UsageError(f"{path} has schema {loaded[-1]['schema']}, this program reads {report.SCHEMA}")
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is no result of bench/latency.py --json") from None
    report.print_comparison(loaded[0], loaded[1], (paths[0].name, paths[1].name))
    return 0


def check_outputs(args: argparse.Namespace) -> None:
    """Everything that could fail only after the run, tried before it."""
    try:
        import hdrh.histogram  # noqa: F401
    except ImportError:
        raise UsageError("the hdrhistogram package is missing; pip install 'hdrhistogram>=0.10'") from None
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise UsageError("--plot needs matplotlib; pip install matplotlib, or leave --plot out") from None
    for path in (args.json, args.plot):
        if path and not path.resolve().parent.is_dir():
            raise UsageError(f"the folder of {path} does not exist; make it first")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if args.compare:
            return compare(args.compare)
        plan = make_plan(args)
        url, payloads = make_payloads(args)
        check_outputs(args)
        target = find_server(url, args.timeout, args.insecure)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    started_at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    recording = run(plan, target, payloads, args.processes)
    result = report.summarise(recording, settings_of(args, url), started_at=started_at)
    load = f"{args.concurrency or 1} clients" if args.rate is None else f"{args.rate:g}/s {args.arrivals}"
    title = f"{url}  {load}"
    report.print_table(result, title)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot and recording.ok:
        report.plot(result, args.plot, title)
    if recording.interrupted:
        return 130
    return 0 if recording.ok else 2


if __name__ == "__main__":
    sys.exit(main())
