"""``pyserve bench``: a load test of one model of the running server, or of one somewhere else.

The numbers are the client's: from sending a request to its whole answer. The sender takes part of the machine too,
so it says how much, and how many requests it could have sent.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import http.client
import json
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyserve.archive.samples import Sample, archive_samples
from pyserve.commands.client import Connection, local_address, management_key
from pyserve.commands.escaping import unescaped_output
from pyserve.commands.predict import content_type_of, predictions_of
from pyserve.commands.tables import Column, Row, print_table
from pyserve.config.address import Address
from pyserve.errors import ConfigError
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
from pyserve.load_test.wire import Target
from pyserve.server import pid_file
from pyserve.visible import visible

EXIT_ALL_FAILED = 2
EXIT_INTERRUPTED = 130
_COLUMNS = (Column(""), Column(""))
# Element types of the Open Inference Protocol that JSON writes as whole numbers; others as 0.0.
_WHOLE = ("INT", "UINT", "BOOL")


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; ``--pid-file`` comes from the command line itself."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="its name, or NAME/VERSION")
    add("-i", "--input", action="append", default=[], type=Path, metavar="FILE",
        help="body of the requests; several are sent in turn; default: the archive's own "
        "sample, or zeros or a picture for models that say their inputs")  # fmt: skip
    add("--content-type", metavar="TYPE", help="default: by the file's name")
    add("--url", metavar="URL", help="of the server's predictions; default: of the one that the pid file names")
    add("--token", metavar="KEY", help="for predictions; default: of the server's key file")
    add("--json", action="store_true", help="everything measured as JSON, with settings and versions")
    add_load_arguments(parser)


def bench_command(parsed: argparse.Namespace, pid_path: Path) -> int:
    """Prints the figures. Exit code: 0, 1 without a server, 2 if every request failed, 130 when interrupted.

    Raises:
        UsageError, LoadTestError: it cannot be run as it was asked for.
        ConfigError: there is no server.
    """
    plan = make_plan(parsed)
    address, key = predictions_of(parsed, pid_path)
    name, _, version = parsed.model.partition("/")
    path = f"/predictions/{quote(name, safe='')}" + (f"/{quote(version, safe='')}" if version else "")
    url = f"{address.client_url}{path}"
    target = _target(address, url, parsed)
    sample = None if parsed.input or parsed.url else _packed(name, version, pid_path)
    with contextlib.closing(
        Connection(address, key, checks_certificate=bool(parsed.url), timeout_s=parsed.timeout)
    ) as server:
        if sample is not None:
            bodies, kind = [sample.body], parsed.content_type or sample.content_type
        else:
            bodies, kind = _bodies(parsed, server, name, version)
        headers = [("Accept", "*/*"), *([("Content-Type", kind)] if kind else [])]
        base = f"http://localhost{path}" if address.is_unix else url
        keys = [("Authorization", f"Bearer {key}")] if key else []
        payloads = http_requests(base, bodies, [*headers, *keys])
        _try_once(server, path, bodies[0], headers, is_made_up=not parsed.input and sample is None)
    started_at = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with unescaped_output():  # the line of progress moves the cursor, and has numbers only
        recording = run(plan, target, payloads, parsed.processes)
    files = zip(_names(parsed, sample), bodies, strict=True)
    settings = {
        "url": url, "model": name, "model_version": version or None,
        "data": [{"name": title, "size": len(body)} for title, body in files],
        "content_type": kind or None, **load_settings(parsed), "is_image": kind.startswith("image/"),
    }  # fmt: skip
    result = report.summarise(recording, settings, started_at=started_at)
    if parsed.json:
        print(json.dumps(result, indent=1))
    else:
        print_result(result, f"{url}  {load_text(parsed)}")
        if address.is_loopback:
            cores = result["machine"]["cores"]
            print(f"note: server and generator share the {cores} core{'s' if cores > 1 else ''} of this machine")
    if recording.interrupted:
        return EXIT_INTERRUPTED
    return 0 if recording.ok else EXIT_ALL_FAILED


def _names(parsed: argparse.Namespace, sample: Sample | None) -> list[str]:
    return [file.name for file in parsed.input] or [sample.name if sample is not None else "made up"]


def print_result(result: report.JsonObject, title: str) -> None:
    """The figures as a table, and what a reader must know before believing them."""
    print(title)
    rows = report.rows(result)
    print_table(_COLUMNS, [Row([label, value], {1: "bold red"} if is_bad else None) for label, value, is_bad in rows])
    for text in report.warnings(result):
        print(f"note: {text}")
    for key, text in result["error_samples"].items():
        if text:
            print(f"first failure ({key}): {visible(' '.join(text.split()))[:300]}")


def _target(address: Address, url: str, parsed: argparse.Namespace) -> Target:
    if address.is_unix:
        return Target(address.path, 0)
    # The certificate of a server that the pid file names is our own machine's.
    return find_server(url, parsed.timeout, insecure=not parsed.url)


def _bodies(parsed: argparse.Namespace, server: Connection, name: str, version: str) -> tuple[list[bytes], str]:
    """What is sent, and as what: the files, or what fits the inputs that the model says it has."""
    if parsed.input:
        bodies = read_bodies(parsed.input, "--input")
        kinds = {content_type_of(file) for file in parsed.input}
        if not parsed.content_type and len(kinds) > 1:
            names = ", ".join(sorted(kind or "unknown" for kind in kinds))
            raise LoadTestError(f"the inputs are of several types ({names}); say which with --content-type")
        return bodies, parsed.content_type or kinds.pop()
    path = f"/v2/models/{quote(name, safe='')}" + (f"/versions/{quote(version, safe='')}" if version else "")
    try:
        answer = server.ask("GET", path)
    except (OSError, http.client.HTTPException) as error:
        raise LoadTestError(f"the server does not answer: {error}") from None
    if answer.status == 404:
        raise LoadTestError(answer.text)
    if answer.status != 200 or not isinstance(answer.json, dict):
        raise LoadTestError(f"nothing to send: {answer.text}; give a file with -i FILE")
    inputs = answer.json.get("inputs") or []
    if not inputs:
        raise LoadTestError(f"what is to be sent to {name}? It does not say its inputs: give a file with -i FILE")
    if inputs[0].get("datatype") == "BYTES":
        return [_picture()], parsed.content_type or "image/jpeg"
    values = {str(each["name"]): _zeros(each) for each in inputs}
    body = json.dumps(next(iter(values.values())) if len(values) == 1 else values).encode()
    return [body], parsed.content_type or "application/json"


def _packed(name: str, version: str, pid_path: Path) -> Sample | None:
    """The sample that the archive brings along, where the server's files are ours to read."""
    try:
        running = pid_file.read(pid_path)
        if running is None:
            return None
        with contextlib.closing(
            Connection(local_address(running.addresses["management"]), management_key(running.key_file))
        ) as connection:
            path = f"/models/{quote(name, safe='')}" + (f"/{quote(version, safe='')}" if version else "")
            [described] = connection.ask("GET", path).json
        return next(iter(archive_samples(described["modelDir"])), None)
    except (ConfigError, OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return None


def _picture() -> bytes:
    from pyserve.models.sample import write_sample_picture

    with tempfile.TemporaryDirectory() as folder:
        return write_sample_picture(Path(folder) / "sample.jpg").read_bytes()


def _zeros(each: dict[str, Any]) -> Any:
    """One item of an input, as JSON has it."""
    value: Any = 0 if str(each["datatype"]).startswith(_WHOLE) else 0.0
    for size in reversed(each["shape"][1:]):
        value = [value] * max(1, int(size))
    return value


def _try_once(server: Connection, path: str, body: bytes, headers: list[tuple[str, str]], *, is_made_up: bool) -> None:
    """One request before the others: what fails each time is said once, in the server's words."""
    try:
        answer = server.ask("POST", path, body, dict(headers))
    except (OSError, http.client.HTTPException) as error:
        raise LoadTestError(f"the server does not answer: {error or type(error).__name__}") from None
    if answer.status >= 400:
        fix = "; this body was made up for it: give a file with -i FILE" if is_made_up else ""
        raise LoadTestError(f"the model answers {answer.text}{fix}")
