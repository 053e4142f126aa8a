"""The line that the author of a handler reads of each request."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from pyserve.config.config import Config
from pyserve.request.messages import Request
from pyserve.request.stages import Stages
from pyserve.telemetry.request_log import NoLog, RequestLog
from pyserve.telemetry.server_logs import ServerLogs

MS = 1_000_000


class Noted:
    """Another log that is told the same."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def observe(self, *arguments: Any) -> None:
        self.calls.append(arguments)

    def observe_http(self, *arguments: Any) -> None:
        self.calls.append(arguments)


def test_a_line_has_status_time_and_stages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    request = Request("POST", "/predictions/a b", query="x=1", id="96d9fa1e-0000", arrived_at=1)
    stages = request.stages = Stages(is_told=False)
    stages.times = {"queue": (0, 2 * MS), "inference": (2 * MS, 14 * MS), "delivery": (0, 10)}
    stages.batch_size = 3
    also = Noted()
    RequestLog(also).observe_http(request, 200, True)
    [record] = caplog.records
    begin, _, end = record.getMessage().partition(" in ")
    assert begin == "POST /predictions/a%20b?x=1 200"
    assert end.endswith("ms (queue 2.0, inference 12.0, batch of 3), 96d9fa1e")
    assert record.request_id == "96d9fa1e-0000"  # type: ignore[attr-defined]
    assert also.calls == [(request, 200, True)]


def test_an_answer_without_a_model_has_no_stages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log = RequestLog(NoLog())
    log.observe_http(Request("GET", "/ping"), 200, True)
    log.observe("unix", "gRPC", "a.B/C", "HTTP/2.0", 5, 0, "")
    assert [record.getMessage() for record in caplog.records] == ["GET /ping 200", "gRPC a.B/C 5"]


@pytest.mark.parametrize(("key", "files"), [(True, ["access_log.log"]), (False, [])])
def test_the_access_log_can_be_switched_off(key: bool, files: list[str], tmp_path: Any) -> None:
    config = Config(access_log=key)
    logs = ServerLogs(config, {"LOG_LOCATION": str(tmp_path), "METRICS_LOCATION": str(tmp_path)})
    try:
        logs.access.observe_http(Request("GET", "/ping"), 200, True)
    finally:
        logs.close()
    assert [path.name for path in tmp_path.glob("access*")] == files
