"""`pyserve top`: what it makes of two readings of metrics, what stands on the screen, and how it ends."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len

from pyserve.commands import cli, top
from pyserve.commands.live_figures import Reading, Totals, figures, quantile, read_totals
from pyserve.errors import ConfigError, JsonObject
from pyserve.telemetry.metrics import Metrics
from tests.support.serving import LIMIT_S, Server

INFINITE = float("inf")


def totals(requests: float, errors: float = 0, queue: int = 0) -> Totals:
    return Totals(
        statuses={"200": requests - errors, "503": errors},
        durations={0.001: requests / 2, 0.01: requests, INFINITE: requests},
        batched=requests * 2, batches=requests, queue=queue,
    )  # fmt: skip


def test_what_a_server_says_is_read() -> None:
    metrics = Metrics()
    for status in (200, 200, 503):
        metrics.observe_request("m", "1.0", status, 0.004)
    metrics.models = lambda: [_Served()]
    found = read_totals(metrics.render().decode())
    assert list(found) == [("m", "1.0")]
    m = found["m", "1.0"]
    assert (m.requests, m.errors, m.workers, m.in_flight) == (3, 1, 0, 7)
    assert m.durations[0.0025] == 0 and m.durations[0.005] == m.durations[INFINITE] == 3


class _Served:
    name, version, lane, native_devices, requests_in_flight = "m", "1.0", "native", (), 7

    def worker_rows(self) -> list[object]:
        return []

    def worker_load_ms(self) -> dict[str, float]:
        return {}

    def stats(self) -> JsonObject:
        return {}

    def audit_report(self) -> None:
        return None


def test_figures_are_of_the_time_between_two_readings() -> None:
    each = figures(totals(100, 10), totals(300, 30), 10.0)
    assert (each.rate, each.error_rate, each.batch) == (20.0, 2.0, 2.0)
    assert each.p50 == 0.001 and each.p99 == pytest.approx(0.00982)
    nothing = figures(totals(100), totals(100), 10.0)
    assert (nothing.rate, nothing.batch, nothing.p50) == (0.0, None, None)


def test_a_model_that_was_registered_again_begins_anew() -> None:
    each = figures(totals(1000), totals(20), 10.0)
    assert each.rate == 2.0 and each.batch == 2.0


def test_a_quantile_lies_in_its_bucket() -> None:
    assert quantile({}, 0.5) is None and quantile({1.0: 0.0, INFINITE: 0.0}, 0.5) is None
    assert quantile({1.0: 10.0, 2.0: 10.0, INFINITE: 10.0}, 0.5) == 0.5
    assert quantile({1.0: 1.0, 2.0: 2.0, INFINITE: 4.0}, 0.99) == 2.0  # above the last end: that end


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.0, "0 us"), (0.000123, "123 us"), (0.00123, "1.23 ms"), (0.01234, "12.3 ms"), (0.1234, "123 ms"),
     (0.9999, "1000 ms"), (1.5, "1.50 s"), (60.0, "60.0 s")],
)  # fmt: skip
def test_durations_have_three_digits(seconds: float | None, text: str) -> None:
    assert top.duration(seconds) == text


class Watched(top.Watched):
    """A server that is not one: its readings are a list, a text among them is why there is none."""

    def __init__(self, *readings: Reading | str):
        super().__init__(Path("pid"), None, None)
        self.readings = list(readings)

    def look(self) -> Reading:
        reading = self.readings.pop(0)
        if isinstance(reading, str):
            raise ConfigError(reading)
        return reading

    def look_at_states(self, names: list[str]) -> str:
        self.states |= {(name, "1.0"): {"state": "READY", "workers": "1/1"} for name in names}
        return ""


def shown(view: top.View, width: int = 100, height: int = 20) -> list[str]:
    view.look(height)
    return view.lines(width, height)


def test_the_screen_shows_rates_and_sorts_as_it_is_asked() -> None:
    first = Reading(0.0, {("a", "1.0"): totals(0), ("b", "1.0"): totals(0, queue=3)})
    later = Reading(5.0, {("a", "1.0"): totals(50), ("b", "1.0"): totals(500, 100, queue=3)})
    view = top.View(Watched(first, later))
    shown(view)
    lines = shown(view)
    assert lines[0] == "last 5 s: 110 req/s, 20.0 err/s, 3 waiting, 0 in flight"
    assert [line.split()[0] for line in lines[-2:]] == ["b", "a"]
    assert lines[-2].split()[2:7] == ["READY", "1/1", "100", "20.0", "3"]
    view.press("n")
    assert [line.split()[0] for line in view.lines(100, 20)[-2:]] == ["a", "b"] and "[n] name" in view.lines(100, 20)[1]
    view.press("p")
    assert view.is_paused and view.lines(100, 20)[0].startswith("paused")
    view.press("x")
    assert view.is_open
    view.press("q")
    assert not view.is_open


def test_a_server_that_goes_leaves_its_last_figures() -> None:
    view = top.View(Watched(Reading(0.0, {("a", "1.0"): totals(0)}), "no server is\nrunning \x1b[2J", Reading(9.0, {})))
    shown(view)
    lines = shown(view)
    assert lines[2] == "no server is running \\x1b[2J" and lines[-1].startswith("a ")
    assert shown(view)[-1] == "no model is loaded"


def test_only_as_many_rows_as_there_is_room_for() -> None:
    many = {(f"m{number:04}", "1.0"): totals(number) for number in range(1000)}
    view = top.View(Watched(Reading(0.0, many)))
    lines = shown(view, height=12)
    assert len(lines) <= 12 and lines[-1] == "and 994 more"
    assert len(view.lines(60, 3)) < 12


@pytest.mark.parametrize("width", [100, 60, 40])
def test_the_table_fits_the_window(width: int) -> None:
    view = top.View(Watched(Reading(0.0, {("a-model-with-a-name", "1.0"): totals(5000)})))
    lines = shown(view, width)
    assert all(cell_len(line) <= width for line in lines[4:])
    assert {"MODEL", "REQ/S", "P99"} <= set(lines[4].split())


def test_without_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, text in [
        (["--pid-file", str(tmp_path / "pid")], 1, "no server is running here"),
        (["--url", "http://127.0.0.1:1"], 1, "http://127.0.0.1:1 does not answer: Connection refused"),
        (["--url", "nonsense"], 2, "--url 'nonsense'"),
        (["--interval", "0"], 2, "--interval must be from 0.2"),
        (["--interval", "nan"], 2, "--interval must be from 0.2"),
    ]:
        assert cli.main(["top", *arguments]) == code
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("served"))
    (server.folder / "twice").mkdir()
    (server.folder / "twice" / "handler.py").write_text(
        "def handle(data, context):\n    return [1] * len(data or [])\n"
    )
    server.start("twice", "--disable-token-auth")
    yield server
    server.run("stop")
    server.kill()


@pytest.mark.server
def test_once_is_a_table(server: Server) -> None:
    assert server.run("predict", "twice", "--json-body", "1").returncode == 0
    done = server.run("top", "twice", "--once")
    title, row = done.stdout.splitlines()
    assert (done.returncode, title.split()[:3], row.split()[:4]) == (
        0, ["MODEL", "VERSION", "STATE"], ["twice", "1.0", "READY", "1/1"])  # fmt: skip
    assert "-" not in row.split()[8:11]  # percentiles of the one request
    missing = server.run("top", "twicer")
    assert missing.returncode == 1 and "no model called twicer is loaded" in missing.stderr


@pytest.mark.server
@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "Ctrl-C"])
def test_live_until_a_key(server: Server, key: bytes) -> None:
    ours, theirs = pty.openpty()
    # With the terminal as its own, which Ctrl-C goes to.
    command = ["setsid", "--ctty", *server.arguments("top", "--interval", "0.2")]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs,
                          env={**server.environment, "TERM": "xterm", "COLUMNS": "60", "LINES": "20"},
                          cwd=server.folder) as popen:  # fmt: skip
        os.close(theirs)
        seen = b""
        deadline = time.monotonic() + LIMIT_S
        while not re.search(rb"twice .*?0%", seen, re.DOTALL):
            assert time.monotonic() < deadline and select.select([ours], [], [], LIMIT_S)[0], seen
            seen += os.read(ours, 65536)
        os.write(ours, key)
        while True:
            try:
                more = os.read(ours, 65536)
            except OSError:  # its last user has closed it
                break
            seen += more
            if not more:
                break
        assert popen.wait(LIMIT_S) == 0, seen
    os.close(ours)
    assert b"\x1b[?1049h" in seen  # and the screen and the cursor are given back
    assert seen.rfind(b"\x1b[?25h") > seen.rfind(b"\x1b[?25l") and seen.rstrip().endswith(b"\x1b[?1049l")
