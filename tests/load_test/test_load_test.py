"""The load test's accounting, driven by a hand-moved clock and a server made of events; no sockets, no waiting."""

from __future__ import annotations

import heapq
import itertools
import json
import os
import random
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import latency
from pyserve.commands.bench import print_result
from pyserve.load_test import report
from pyserve.load_test.load import Load, Plan, due_times
from pyserve.load_test.recording import (
    LATENCY_MAX_US,
    NEVER,
    NS_PER_S,
    Recording,
    bucket_index,
    bucket_value,
    merge,
    value_at,
)
from pyserve.load_test.run import share
from pyserve.load_test.wire import HttpWire

MS = 1_000_000
SEED = int(os.environ.get("PYSERVE_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)


class FakeWire:
    def __init__(self, world: World):
        self.intended = 0
        self.sent_at = 0
        self.is_busy = False
        self.is_closed = False
        self._world = world

    def send(self, payload: bytes) -> None:
        self._world.serve(self, payload)

    def close(self) -> None:
        self.is_closed = True


class World:
    """Clock, network and server in one. ``answer_at`` gives the answer's time, or ``None`` for never."""

    def __init__(self, plan: Plan, payloads: tuple[bytes, ...] = (b"a",)):
        self.clock = 1_000 * NS_PER_S
        self.begun_at = self.clock
        self.recording = Recording()
        self.received: list[bytes] = []
        self.wires: list[FakeWire] = []
        self.in_flight = 0
        self.in_flight_most = 0
        self.status: Callable[[int], int] = lambda number: 200
        self.answer_at: Callable[[int], int | None] = lambda sent_at: sent_at + MS
        self.end: Callable[[int], str] = lambda number: "answer"
        self.connect_error: str | None = None
        self._is_started = False
        self._order = itertools.count()
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self.load = Load(
            plan,
            list(payloads),
            self.recording,
            connect=self._connect,
            now=lambda: self.clock,
            on_done=lambda: None,
        )

    def at(self, time: int, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def start(self) -> None:
        self._is_started = True
        self.load.start()

    def run(self, *, until: int = NEVER, sweep: int = 50 * MS) -> Recording:
        if not self._is_started:
            self.start()
        next_sweep = self.clock + sweep
        for _ in range(2_000_000):
            if self.load.is_done:
                return self.recording
            event_at = self._events[0][0] if self._events else NEVER
            self.clock = max(self.clock, min(event_at, self.load.next_due, next_sweep, until))
            if self.clock == until:
                self.load.stop()
            elif self.clock == next_sweep:
                next_sweep += sweep
                self.load.sweep()
            elif self.clock == event_at:
                heapq.heappop(self._events)[2]()
            else:
                self.load.on_due()
        raise AssertionError("the load does not come to an end")

    def _connect(self) -> None:
        error = self.connect_error
        if error is not None:
            self.at(self.clock, lambda: self.load.connect_failed(error))
            return
        wire = FakeWire(self)
        self.wires.append(wire)
        self.at(self.clock, lambda: self.load.connected(wire))

    def serve(self, wire: FakeWire, payload: bytes) -> None:
        number = len(self.received)
        self.received.append(payload)
        self.in_flight += 1
        self.in_flight_most = max(self.in_flight_most, self.in_flight)
        time = self.answer_at(self.clock)
        if time is None:
            return

        def finish() -> None:
            self.in_flight -= 1
            if wire.is_closed:
                return
            if self.end(number) == "reset":
                self.load.failed(wire, "reset")
            else:
                self.load.answered(wire, self.status(number), 10, self.end(number) != "close")

        self.at(time, finish)


def stall(world: World, begin: int, end: int, service: int = MS) -> None:
    """The server answers nothing between ``begin`` and ``end`` (ns after the start), then everything it holds."""
    first, last = world.begun_at + begin, world.begun_at + end
    world.answer_at = lambda sent_at: last if first <= sent_at + service < last else sent_at + service


# Percentiles.


def test_bucket_indices_are_those_of_hdr_histogram() -> None:
    print(f"PYSERVE_TEST_SEED={SEED}")
    generator = random.Random(SEED)
    built = pytest.importorskip("hdrh.histogram", reason="pip install hdrhistogram").HdrHistogram(1, LATENCY_MAX_US, 3)
    for value in [
        0,
        1,
        2047,
        2048,
        2049,
        4095,
        4096,
        LATENCY_MAX_US,
        *(int(10 ** generator.uniform(0, 9.5)) for _ in range(2000)),
    ]:
        assert bucket_index(value) == built.get_counts_array_index(value), value
        assert bucket_value(bucket_index(value)) == built.get_lowest_equivalent_value(value), value


def test_percentiles_are_within_a_thousandth_of_the_sorted_values() -> None:
    print(f"PYSERVE_TEST_SEED={SEED}")
    generator = random.Random(SEED)
    values = sorted(int(generator.lognormvariate(9, 1.2)) + 1 for _ in range(20_000))
    recording = Recording()
    recording.started_at = 0
    for value in values:
        recording.answered(0, value * 1000, 200, 1)
    recording.close(values[-1] * 1000)
    latency_ms = report.summarise(recording, {}, started_at="")["latency_ms"]
    for percentile in report.PERCENTILES:
        exact = values[-(-int(percentile * 10) * len(values) // 1000) - 1]
        assert latency_ms[report.percentile_key(percentile)] * 1000 == pytest.approx(exact, rel=2e-3), percentile
        assert value_at(recording.counts(), percentile) == pytest.approx(exact, rel=2e-3)
    # In whole microseconds: a thousand times the nearest float of 1037.563 is not 1037563.
    assert round(latency_ms["max"] * 1000, 3) == values[-1]
    assert round(latency_ms["min"] * 1000, 3) == values[0]
    assert latency_ms["mean"] * 1000 == pytest.approx(sum(values) / len(values))


# Open loop.


def test_stall_is_charged_to_every_request_that_was_due_during_it() -> None:
    world = World(Plan(rate=1000, duration=3 * NS_PER_S, in_flight_max=10))
    stall(world, NS_PER_S, 2 * NS_PER_S)
    recording = world.run()
    assert recording.ok == 3000
    # Without the stall each takes 1 ms. Those due in it wait for its end, first come first served by 10 connections
    # that answer every 1 ms, so at least 1000 requests see a latency spread evenly between 0 and 1 s.
    slow = sum(count for index, count in recording.counts().items() if bucket_value(index) >= 500_000)
    assert slow == pytest.approx(500, rel=0.15)
    assert recording.latency_max_us == pytest.approx(1_000_000, rel=2e-3)
    assert value_at(recording.counts(), 90) > 600_000
    # Only ten went out before the connections were used up: measured from the send, ten would show the stall.
    assert world.in_flight_most == 10
    assert sum(count for index, count in recording.lag_counts.items() if bucket_value(index) >= 500_000) > 400


def test_latency_counts_from_the_intended_time_when_the_generator_is_late() -> None:
    world = World(Plan(rate=100, requests=1, in_flight_max=1))
    world.start()
    world.clock += 7 * MS  # the generator had no processor for 7 ms
    assert world.run().latency_max_us == 8_000


def test_constant_schedule_does_not_drift() -> None:
    times = list(itertools.islice(due_times(Plan(rate=3), 0), 30_001))
    assert times[0] == 0
    assert times[30_000] == 10_000 * NS_PER_S


def test_poisson_schedule_has_the_rate_and_replays() -> None:
    print(f"PYSERVE_TEST_SEED={SEED}")
    plan = Plan(rate=500, arrivals="poisson", seed=SEED)
    times = list(itertools.islice(due_times(plan, 0), 20_000))
    assert times == list(itertools.islice(due_times(plan, 0), 20_000))
    assert times == sorted(times)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(2 * MS, rel=0.05)
    assert spread == pytest.approx(mean, rel=0.1)  # exponential gaps: standard deviation = mean


def test_what_could_not_be_sent_is_counted() -> None:
    world = World(Plan(rate=100, duration=NS_PER_S, in_flight_max=2, timeout=NS_PER_S // 2))
    world.answer_at = lambda sent_at: None
    recording = world.run()
    assert recording.ok == 0
    assert recording.errors["timeout"] > 0
    assert recording.unsent > 50
    assert recording.errors["timeout"] + recording.unsent == 100


def test_in_flight_never_exceeds_its_maximum() -> None:
    world = World(Plan(rate=5000, duration=NS_PER_S, in_flight_max=3))
    world.run()
    assert world.in_flight_most == 3
    assert len(world.wires) == 3


# Closed loop.


def test_closed_loop_sends_exactly_the_counted_and_the_warmup_requests() -> None:
    world = World(Plan(concurrency=4, requests=100, warmup_requests=10))
    recording = world.run()
    assert recording.ok == 100
    assert len(world.received) == 110
    assert world.in_flight_most == 4
    assert len(world.wires) == 4
    assert recording.errors.total() == recording.unsent == 0


def test_closed_loop_throughput_is_concurrency_over_service_time() -> None:
    world = World(Plan(concurrency=8, duration=2 * NS_PER_S, warmup=NS_PER_S))
    world.answer_at = lambda sent_at: sent_at + 40 * MS
    recording = world.run()
    assert recording.window_s == 2.0
    assert recording.ok_in_window / recording.window_s == pytest.approx(200, rel=0.03)
    assert [second.number for second in recording.seconds][:2] == [0, 1]


def test_payloads_are_used_in_turn() -> None:
    world = World(Plan(concurrency=1, requests=5), payloads=(b"a", b"b"))
    world.run()
    assert world.received == [b"a", b"b", b"a", b"b", b"a"]


def test_closed_connection_is_replaced() -> None:
    world = World(Plan(concurrency=2, requests=10))
    world.end = lambda number: "close"
    recording = world.run()
    assert recording.ok == 10
    assert len(world.wires) >= 10


def test_interrupted_run_keeps_what_was_measured() -> None:
    world = World(Plan(concurrency=2, requests=1_000_000))
    recording = world.run(until=world.begun_at + NS_PER_S // 4 + MS // 2)
    assert recording.interrupted
    assert recording.ok == 500
    assert recording.unfinished == 2
    assert recording.window_s == pytest.approx(0.2505)


# Errors.


def test_errors_are_classified() -> None:
    world = World(Plan(concurrency=1, requests=6, timeout=NS_PER_S))
    world.status = lambda number: {1: 503, 2: 404}.get(number, 200)
    world.end = lambda number: "reset" if number == 3 else "answer"
    answers = iter([MS, MS, MS, MS, None, MS])

    def answer_at(sent_at: int) -> int | None:
        delay = next(answers)
        return None if delay is None else sent_at + delay

    world.answer_at = answer_at
    recording = world.run()
    assert dict(recording.statuses) == {200: 2, 503: 1, 404: 1}
    assert dict(recording.errors) == {"reset": 1, "timeout": 1}
    assert (recording.ok, recording.failures) == (2, 4)
    assert sum(recording.counts().values()) == 2, "latencies are those of good answers only"


def test_refused_connections_fail_one_request_each() -> None:
    world = World(Plan(concurrency=3, requests=9))
    world.connect_error = "refused"
    recording = world.run()
    assert dict(recording.errors) == {"refused": 9}
    assert recording.ok == 0


class FakeTransport:
    def __init__(self) -> None:
        self.written = b""
        self.is_aborted = False

    def write(self, data: bytes) -> None:
        self.written += data

    def abort(self) -> None:
        self.is_aborted = True


def wired(requests: int = 2) -> tuple[HttpWire, FakeTransport, Recording]:
    """A real wire on a fake transport with its first request sent."""
    recording = Recording()
    load = Load(Plan(requests=requests), [b"GET"], recording, connect=lambda: None, now=lambda: 5, on_done=lambda: None)
    load.start()
    wire, transport = HttpWire(load), FakeTransport()
    wire.connection_made(transport)  # type: ignore[arg-type]
    assert transport.written == b"GET"
    return wire, transport, recording


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_wire_reads_answers_in_any_pieces(step: int) -> None:
    wire, transport, recording = wired()
    answer = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\nContent-Length: 9\r\n\r\nno worker"
    for begin in range(0, len(answer), step):
        wire.data_received(answer[begin : begin + step])
    assert recording.statuses == {503: 1}
    assert recording.samples == {"503": "no worker"}
    assert transport.written == b"GETGET", "the next request goes out on the same connection"


def test_wire_calls_a_cut_answer_reset_and_nonsense_protocol() -> None:
    wire, _, recording = wired()
    wire.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
    wire.connection_lost(None)
    assert recording.errors == {"reset": 1}
    wire, transport, recording = wired()
    wire.data_received(b"SSH-2.0-OpenSSH_9.2\r\n")
    assert recording.errors == {"protocol": 1}
    assert transport.is_aborted


# Results.


def test_json_holds_all_of_it_and_survives_a_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(Plan(rate=1000, duration=2 * NS_PER_S, in_flight_max=50))
    world.status = lambda number: 503 if number % 10 == 0 else 200
    settings = {"rate": 1000.0, "timeout_s": 60.0, "in_flight_max": 50, "processes": 1, "is_image": True}
    result = json.loads(json.dumps(report.summarise(world.run(), settings, started_at="2026-01-01T00:00:00+00:00")))
    assert set(result) == {
        "schema",
        "started_at",
        "settings",
        "machine",
        "window_s",
        "is_interrupted",
        "requests",
        "rates",
        "bytes",
        "statuses",
        "errors",
        "error_samples",
        "latency_ms",
        "send_lag_ms",
        "generator_cpu_share",
        "histogram",
        "series",
    }
    assert set(result["latency_ms"]) == {"p50", "p75", "p90", "p95", "p99", "p99.9", "max", "min", "mean", "stddev"}
    assert result["requests"] == {
        "counted": 2000,
        "ok": 1800,
        "failed": 200,
        "unsent": 0,
        "unfinished": 0,
        "failed_share": 0.1,
    }
    assert result["statuses"] == {"200": 1800, "503": 200}
    assert result["rates"]["images_per_s"] == result["rates"]["requests_per_s"] == pytest.approx(900, rel=0.01)
    assert sum(count for _, count in result["histogram"]["counts"]) == 1800
    if "hdr_v2" in result["histogram"]:  # hdrhistogram is installed
        from hdrh.histogram import HdrHistogram

        assert HdrHistogram.decode(result["histogram"]["hdr_v2"]).get_total_count() == 1800
    assert sum(row["failed"] for row in result["series"]) == 200
    assert {"python", "uvloop", "httptools"} <= set(result["machine"]["versions"])

    print_result(result, "title")
    shown = capsys.readouterr().out
    assert "200  (10.0%)" in shown
    assert "10.0% of the requests failed" in " ".join(shown.split())
    saved = tmp_path / "a.json"
    saved.write_text(json.dumps(result))
    assert latency.main(["--compare", str(saved), str(saved)]) == 0
    assert "1.000" in capsys.readouterr().out


def test_merged_processes_are_as_one_run() -> None:
    plan = Plan(rate=1000, requests=1000, in_flight_max=8)
    parts = []
    for number in range(2):
        world = World(share(plan, number, 2))
        parts.append(world.run())
    whole = merge(parts)
    assert whole.ok == 1000
    assert whole.window_s == pytest.approx(1.0, rel=0.01)
    assert sum(whole.counts().values()) == 1000
    first, second = (list(itertools.islice(due_times(share(plan, number, 2), 0), 3)) for number in range(2))
    assert sorted(first + second) == [0, MS, 2 * MS, 3 * MS, 4 * MS, 5 * MS]


# Wrong use.


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "m", "--data", "missing.jpg"], "missing.jpg"),
        (["--model", "m"], "--data"),
        (["--data", __file__], "--model"),
        (["--model", "m", "--data", __file__, "--rate", "0"], "--rate must be above 0"),
        (["--model", "m", "--data", __file__, "--rate", "nan"], "--rate must be above 0"),
        (["--model", "m", "--data", __file__, "--rate", "1e12"], "--rate must be above 0 and at most 1000000"),
        (["--model", "m", "--data", __file__, "-d", "1e300"], "--duration must be above 0 and at most 1000000"),
        (["--model", "m", "--data", __file__, "-c", "1000000"], "--concurrency must be above 0 and at most 60000"),
        (["--model", "m", "--data", __file__, "--warmup", "1e300s"], "--warmup takes seconds"),
        (["--model", "m", "--data", __file__, "--rate", "5", "--concurrency", "2"], "exclude each other"),
        (["--model", "m", "--data", __file__, "--requests", "5", "--duration", "2"], "not both"),
        (["--model", "m", "--data", __file__, "--warmup", "soon"], "--warmup"),
        (["--model", "m", "--data", __file__, "--header", "no colon"], "Name: value"),
        (["--model", "m", "--data", __file__, "--header", "X: a\r\nHost: b"], "cannot carry"),
        (["--url", "ftp://127.0.0.1/", "--data", __file__], "ftp://127.0.0.1/"),
        (["--url", "http://127.0.0.1:99999/", "--data", __file__], "99999"),
        (["--model", "m", "--data", __file__, "--concurrency", "1", "--processes", "2"], "--processes 2"),
    ],
)
def test_wrong_use_is_refused_with_the_mend(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main(arguments) == 1
    assert text in capsys.readouterr().err


def test_unreachable_server_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: refused, and nobody else can take the port
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/predictions/m"
        assert latency.main(["--url", url, "--data", __file__]) == 1
    text = capsys.readouterr().err
    assert url in text
    assert "pyserve start" in text
