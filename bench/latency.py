"""Load test for any model on any pyserve or TorchServe server; `pyserve bench` is the same for one that runs here.

    python bench/latency.py --model densenet161 --data kitten.jpg --concurrency 8       # closed loop
    python bench/latency.py --model densenet161 --data kitten.jpg --rate 5 --duration 60  # open loop

Exit status: 0, 1 wrong use or no server, 2 every request failed, 130 interrupted. The method is in bench/README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import mimetypes
import sys
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote, urlsplit

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository's root is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.report import plot, print_comparison
from pyserve.commands.bench import print_result
from pyserve.load_test import report
from pyserve.load_test.run import (
    LoadTestError,
    add_load_arguments,
    find_server,
    http_requests,
    load_settings,
    load_text,
    make_plan,
    read_bodies,
    run,
)  # fmt: skip

DEFAULT_URL = "http://127.0.0.1:8080/predictions/{model}"


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
    what.add_argument("--data", action="append", default=[], type=Path, metavar="FILE",
        help="request body; several are used in turn; without any, GET is sent to --url")  # fmt: skip
    what.add_argument("--url", default=DEFAULT_URL, help="default: %(default)s")
    what.add_argument("--content-type", help="none is sent by default, as curl -T does")
    what.add_argument("--header", action="append", default=[], metavar="'NAME: VALUE'", help="further header")
    what.add_argument("--insecure", action="store_true", help="https without checking the certificate")
    add_load_arguments(parser)
    out = parser.add_argument_group("results")
    out.add_argument("--json", type=Path, metavar="FILE", help="everything measured, with settings and versions")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="latency distribution and throughput over time")
    out.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="show two results, no test")
    return parser


def make_payloads(args: argparse.Namespace) -> tuple[str, list[bytes]]:
    """The URL and the bytes of one request per data file."""
    url = args.url
    if "{model}" in url:
        if not args.model:
            raise LoadTestError("name the model with --model, or give a --url without {model}")
        url = url.replace("{model}", quote(args.model, safe=""))
    if args.model_version:
        url = f"{url.rstrip('/')}/{quote(args.model_version, safe='')}"
    try:
        parts = urlsplit(url)
        is_valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_valid = False
    if not is_valid or not url.isascii() or any(character <= " " for character in url):
        raise LoadTestError(f"--url {url!r} is no http:// or https:// address")
    if not args.data and args.url == DEFAULT_URL:
        raise LoadTestError("name at least one file to send with --data, such as --data kitten.jpg")
    headers = [("Accept", "*/*")]
    if args.content_type:
        headers.append(("Content-Type", args.content_type))
    for line in args.header:
        name, colon, value = line.partition(":")
        if not colon:
            raise LoadTestError(f"--header {line!r} must look like 'Name: value'")
        headers.append((name, value.strip()))
    return url, http_requests(url, read_bodies(args.data, "--data"), headers)


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
        **load_settings(args),
        "is_image": bool(types) and all(kind.startswith("image/") for kind in types),
    }


def compare(paths: list[Path]) -> int:
    """Prints two saved results side by side."""
    loaded = []
    for path in paths:
        try:
            loaded.append(json.loads(path.read_text(encoding="utf-8")))
            if loaded[-1]["schema"] != report.SCHEMA:
                raise LoadTestError(f"{path} has schema {loaded[-1]['schema']}, this program reads {report.SCHEMA}")
        except OSError as error:
            raise LoadTestError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise LoadTestError(f"{path} is no result of bench/latency.py --json") from None
    print_comparison(loaded[0], loaded[1], (paths[0].name, paths[1].name))
    return 0


def check_outputs(args: argparse.Namespace) -> None:
    """Everything that could fail only after the run, tried before it."""
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise LoadTestError("--plot needs matplotlib; pip install matplotlib, or leave --plot out") from None
    for path in (args.json, args.plot):
        if path and not path.resolve().parent.is_dir():
            raise LoadTestError(f"the folder of {path} does not exist; make it first")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if args.compare:
            return compare(args.compare)
        plan = make_plan(args)
        url, payloads = make_payloads(args)
        check_outputs(args)
        target = find_server(url, args.timeout, args.insecure)
        started_at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        recording = run(plan, target, payloads, args.processes)
    except LoadTestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = report.summarise(recording, settings_of(args, url), started_at=started_at)
    title = f"{url}  {load_text(args)}"
    print_result(result, title)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.plot and recording.ok:
        plot(result, args.plot, title)
    if recording.interrupted:
        return 130
    return 0 if recording.ok else 2


if __name__ == "__main__":
    sys.exit(main())
