"""Log files: what is in them, when they are rotated, and that one that cannot be written disturbs nobody."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from pyserve.config.config import Config
from pyserve.request.messages import Request
from pyserve.telemetry import log_files
from pyserve.telemetry.access_log import AccessLog
from pyserve.telemetry.log_files import KEPT_COUNT, WAITING_MAX, LogWriter, RotatingFile
from pyserve.telemetry.server_logs import ServerLogs

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d,\d{3}"


@pytest.fixture
def writer() -> Iterator[LogWriter]:
    made = LogWriter()
    yield made
    made.close()


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


# --- rotation ---------------------------------------------------------------------------------------------------------


def test_full_file_is_rotated_and_five_compressed_ones_are_kept(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "x.log", size_max=10)
    for number in range(8):
        file.write(b"line number %d\n" % number)
    file.close()
    assert (tmp_path / "x.log").read_bytes() == b"line number 7\n"
    kept = {number: tmp_path / f"x.log.{number}.gz" for number in range(1, KEPT_COUNT + 1)}
    assert {path.name for path in tmp_path.iterdir()} == {"x.log", *(path.name for path in kept.values())}
    for number, path in kept.items():
        assert gzip.decompress(path.read_bytes()) == b"line number %d\n" % (7 - number)


def test_file_of_another_day_is_rotated(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    days = [date(2026, 11, 23)]
    path.write_bytes(b"old\n")
    os.utime(path, (0, 0))
    file = RotatingFile(path, today=lambda: days[0])
    file.write(b"new\n")
    file.close()
    assert path.read_bytes() == b"new\n"
    assert gzip.decompress((tmp_path / "x.log.1.gz").read_bytes()) == b"old\n"


def test_what_an_interrupted_rotation_left_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x.log.1").write_bytes(b"left\n")
    file = RotatingFile(tmp_path / "x.log", size_max=1)
    file.write(b"one\n")
    file.write(b"two\n")
    file.close()
    assert gzip.decompress((tmp_path / "x.log.2.gz").read_bytes()) == b"left\n"
    assert gzip.decompress((tmp_path / "x.log.1.gz").read_bytes()) == b"one\n"
    assert not (tmp_path / "x.log.1").exists()


def test_a_line_that_was_cut_off_ends_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RotatingFile(tmp_path / "x.log")
    write, sizes = os.write, [6]

    def fill_up(fd: int, content: bytes) -> int:
        if not sizes:
            raise OSError(28, "No space left on device")
        return write(fd, content[: sizes.pop()])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", fill_up)
        with pytest.raises(OSError, match="No space"):
            file.write(b"one\ntwo\n")
    file.let_go()
    file.write(b"three\n")
    file.write(b"four\n")
    file.close()
    assert lines_of(tmp_path / "x.log") == ["one", "tw", "three", "four"]


def test_what_cannot_be_compressed_is_kept_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.log.1.part").mkdir()
    file = RotatingFile(tmp_path / "x.log", size_max=1)
    file.write(b"one\n")
    file.write(b"two\n")
    file.close()
    assert (tmp_path / "x.log").read_bytes() == b"two\n" and (tmp_path / "x.log.1").read_bytes() == b"one\n"
    assert [record.levelname[:4] for record in caplog.records] == ["WARN"]


def test_file_that_somebody_else_moves_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    file = RotatingFile(path)
    file.write(b"one\n")
    path.rename(tmp_path / "moved")
    file.write(b"two\n")
    file.close()
    assert path.read_bytes() == b"two\n"
    assert (tmp_path / "moved").read_bytes() == b"one\n"


def test_a_link_is_written_to_and_never_rotated(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"x" * 100)
    (tmp_path / "x.log").symlink_to(target)
    file = RotatingFile(tmp_path / "x.log", size_max=10)
    file.write(b"one\n")
    file.write(b"two\n")
    file.close()
    assert target.read_bytes() == b"x" * 100 + b"one\ntwo\n"
    assert {path.name for path in tmp_path.iterdir()} == {"x.log", "target"}


# --- the writer -------------------------------------------------------------------------------------------------------


def test_no_line_of_many_threads_is_lost(writer: LogWriter, tmp_path: Path) -> None:
    file = writer.open(tmp_path / "x.log")

    def put(thread: int) -> None:
        for number in range(2000):
            file.put(f"{thread} {number}\n")

    threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.sync()
    found = lines_of(tmp_path / "x.log")
    for thread in range(4):
        assert [line for line in found if line.startswith(f"{thread} ")] == [f"{thread} {n}" for n in range(2000)]


def test_lines_beyond_the_bound_are_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = LogWriter()
    monkeypatch.setattr(writer, "wake", lambda: None)  # the thread comes too late
    file = writer.open(tmp_path / "x.log")
    for _ in range(WAITING_MAX + 7):
        file.put("line\n")
    writer._flush()
    assert len(lines_of(tmp_path / "x.log")) == WAITING_MAX
    assert [record.getMessage() for record in caplog.records] == [
        f"lines of log files were lost: 7 of {tmp_path / 'x.log'} (they came faster than they could be written)"
    ]


def test_full_disk_costs_lines_and_one_warning_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.log").symlink_to("/dev/full")
    clock = [1000.0]
    writer = LogWriter(lambda: clock[0])
    monkeypatch.setattr(writer, "wake", lambda: None)
    file = writer.open(tmp_path / "x.log")
    for _ in range(5):
        file.put("line\n")
        writer._flush()
        clock[0] += 10.0
    text = "lines of log files were lost: {} of " + f"{tmp_path / 'x.log'} (No space left on device)"
    assert [record.getMessage() for record in caplog.records] == [text.format(1)]
    clock[0] += 10.0
    writer._flush()
    assert [record.getMessage() for record in caplog.records][1:] == [text.format(4)]


def test_lines_are_written_again_once_they_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.log"
    path.symlink_to("/dev/full")
    writer = LogWriter()
    monkeypatch.setattr(writer, "wake", lambda: None)
    file = writer.open(path)
    file.put("lost\n")
    writer._flush()
    path.unlink()
    file.put("kept\n")
    writer._flush()
    assert path.read_text() == "kept\n"


def test_a_pipe_that_nobody_reads_holds_nobody(writer: LogWriter, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.log")
    file = writer.open(tmp_path / "x.log")
    file.put("line\n")
    writer.sync()
    assert file.lost_reason


def test_writer_without_lines_has_no_thread(writer: LogWriter, tmp_path: Path) -> None:
    before = threading.active_count()
    file = writer.open(tmp_path / "x.log")
    assert threading.active_count() == before
    file.put("line\n")
    assert threading.active_count() == before + 1


def test_what_is_left_at_the_end_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "FLUSH_INTERVAL_S", 3600.0)
    writer = LogWriter()
    writer.open(tmp_path / "x.log").put("last\n")
    writer.close()
    assert lines_of(tmp_path / "x.log") == ["last"]


# --- the access log ---------------------------------------------------------------------------------------------------


def access_lines(tmp_path: Path, *requests: tuple[Request, int, bool], as_json: bool = False) -> list[str]:
    writer = LogWriter()
    access = AccessLog(writer, tmp_path, as_json=as_json, clock=lambda: 1_000_000_000)
    for request, status, is_http11 in requests:
        access.observe_http(request, status, is_http11)
    access.observe("127.0.0.1:5", "gRPC", "pkg.Service/Predictions", "HTTP/2.0", 13, 1_000_000_000 - 4_000_000, "id")
    writer.close()
    return lines_of(tmp_path / "access_log.log")


def test_access_log_has_torchserves_lines(tmp_path: Path) -> None:
    at = 1_000_000_000 - 87_900_000
    lines = access_lines(
        tmp_path,
        (Request("GET", "/models/densenet161", client="127.0.0.1:43090", arrived_at=at), 200, True),
        (Request("POST", "/predictions/m", query="a=1&b=%22", client="unix", arrived_at=at), 503, False),
        (Request("", "", client="127.0.0.1:1"), 400, True),
        (Request("GET", '/a "b\nc/ü', client="127.0.0.1:1", arrived_at=at), 404, True),
    )
    for line, expected in zip(
        lines,
        [
            '/127.0.0.1:43090 "GET /models/densenet161 HTTP/1.1" 200 87',
            '/unix "POST /predictions/m?a=1&b=%22 HTTP/1.0" 503 87',
            '/127.0.0.1:1 "GET /bad-request HTTP/1.1" 400 0',
            '/127.0.0.1:1 "GET /a%20%22b%0Ac/%C3%BC HTTP/1.1" 404 87',
            '/127.0.0.1:5 "gRPC pkg.Service/Predictions HTTP/2.0" 13 4',
        ],
        strict=True,
    ):
        assert re.fullmatch(f"{TIME} - {re.escape(expected)}", line)


def test_access_log_as_json(tmp_path: Path) -> None:
    request = Request("GET", "/ping", client="127.0.0.1:1", id="abc", arrived_at=1_000_000_000)
    first, second = map(json.loads, access_lines(tmp_path, (request, 200, True), as_json=True))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", first.pop("time"))
    assert first == {
        "level": "INFO", "logger": "ACCESS_LOG", "message": "GET /ping 200", "client": "127.0.0.1:1", "method": "GET",
        "uri": "/ping", "protocol": "HTTP/1.1", "status": 200, "ms": 0, "request_id": "abc",
    }  # fmt: skip
    assert second["method"] == "gRPC" and second["status"] == 13


# --- all of a server --------------------------------------------------------------------------------------------------


def test_records_go_to_the_files_they_belong_in(tmp_path: Path) -> None:
    logs = ServerLogs(Config(), {"LOG_LOCATION": str(tmp_path / "l"), "METRICS_LOCATION": str(tmp_path / "m")})
    server = logging.getLogger("pyserve.test")
    server.warning("of the server")
    server.warning("of a worker", extra={"worker": "W-9000-m_1.0"})
    server.warning("printed\nin two lines", extra={"worker": "W-9000-m_1.0", "stream": "stderr"})
    logs.metrics.note("CPUUtilization", "Percent", 100.0, {"Level": "Host", "Hostname": "h"})
    logs.close()
    server.warning("afterwards")
    own, workers = lines_of(tmp_path / "l" / "ts_log.log")
    assert re.fullmatch(TIME + r" \[WARN(ING)? ?\] MainThread pyserve\.test - of the server", own)
    assert re.fullmatch(TIME + r" \[WARN(ING)? ?\] W-9000-m_1\.0 pyserve\.test - of a worker", workers)
    first, second = lines_of(tmp_path / "l" / "model_log.log")
    assert re.fullmatch(TIME + r" \[WARN(ING)? ?\] W-9000-m_1\.0-stderr MODEL_LOG - printed", first)
    assert second == "    in two lines"
    # Made, as log agents expect, and empty without metrics_mode=log.
    assert (tmp_path / "m" / "ts_metrics.log").read_bytes() == b""
    assert (tmp_path / "m" / "model_metrics.log").read_bytes() == b""


def test_metrics_are_lines_with_metrics_mode_log(tmp_path: Path) -> None:
    logs = ServerLogs(Config(metrics_mode="log"), {"METRICS_LOCATION": str(tmp_path), "LOG_LOCATION": str(tmp_path)})
    logs.metrics.note("CPUUtilization", "Percent", 100.0, {"Level": "Host", "Hostname": "h"})
    logs.metrics.note_model("HandlerTime", "ms", 1817.17, {"ModelName": "m", "Level": "Model"}, "id1,id2")
    logs.metrics.note_model("Words", "count", 12345678, {"a": "b\nc"})
    logs.close()
    [line] = lines_of(tmp_path / "ts_metrics.log")
    shape = r" - CPUUtilization\.Percent:100\.0\|#Level:Host\|#hostname:[^,|]+,timestamp:\d{10}"
    assert re.fullmatch(TIME + shape, line)
    first, second = lines_of(tmp_path / "model_metrics.log")
    assert re.fullmatch(
        TIME + r" - HandlerTime\.ms:1817\.17\|#ModelName:m,Level:Model\|#hostname:[^,|]+,requestID:id1,id2,"
        r"timestamp:\d{10}", first,
    )  # fmt: skip
    assert re.fullmatch(TIME + r" - Words\.count:1\.2345678E7\|#a:b\?c\|#hostname:[^,|]+,timestamp:\d{10}", second)


def test_json_records_hold_their_traceback_and_what_they_are_about(tmp_path: Path) -> None:
    logs = ServerLogs(Config(log_format="json"), {"LOG_LOCATION": str(tmp_path), "METRICS_LOCATION": str(tmp_path)})
    try:
        raise ValueError("no\nsuch")
    except ValueError:
        about = {"request_id": "r1", "model": "m", "version": "1.0", "worker": "W-9000-m_1.0"}
        logging.getLogger("pyserve.test").exception("failed", extra=about)
    logging.getLogger("pyserve.test").warning("printed", extra={"worker": "W-9000-m_1.0", "stream": "stdout"})
    logs.close()
    [line] = lines_of(tmp_path / "ts_log.log")
    record = json.loads(line)
    assert record["traceback"].splitlines()[0] == "Traceback (most recent call last):"
    assert record["traceback"].endswith("ValueError: no\nsuch")
    named = ("level", "logger", "message", "request_id", "model", "version", "worker")
    assert [record[name] for name in named] == [
        "ERROR", "pyserve.test", "failed", "r1", "m", "1.0", "W-9000-m_1.0"
    ]  # fmt: skip
    [line] = lines_of(tmp_path / "model_log.log")
    assert json.loads(line)["stream"] == "stdout"


@pytest.mark.parametrize("kind", ["a file in the place of the folder", "read only"])
def test_folder_that_cannot_be_written_costs_one_warning(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path("/proc/logs")  # nobody can write there, not even a superuser
    if kind != "read only":
        folder = tmp_path / "logs"
        folder.write_text("")
    logs = ServerLogs(Config(), {"LOG_LOCATION": str(folder), "METRICS_LOCATION": str(folder)})
    for _ in range(100):
        logs.access.observe("127.0.0.1:1", "GET", "/ping", "HTTP/1.1", 200, 0)
    logs.close()
    [record] = [record for record in caplog.records if record.name == "pyserve.telemetry.log_files"]
    assert "access_log.log" in record.getMessage() and "LOG_LOCATION" in record.getMessage()
