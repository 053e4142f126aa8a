"""What the console's data endpoint answers: of ten thousand models a page, found by name or state; of addresses."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from pyserve.api.console_state import ROWS_MAX, ConsoleState
from pyserve.config.config import Config
from pyserve.errors import BadRequestError, ModelNotFoundError, VersionNotFoundError
from pyserve.models.state_file import LoadFailure
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request
from pyserve.telemetry.metrics import Metrics
from pyserve.telemetry.recent import RecentErrors, RecentLog

COUNT = 10_000
# Characters of an answer: a row has about 600.
ANSWER_SIZE_MAX = 100_000


def fake_model(number: int) -> Any:
    return SimpleNamespace(
        name=f"model-{number:05}", version="1.0", state="FAILED" if number % 1000 == 0 else "READY", error="",
        has_ready_worker=True, lane="native", device_type="cpu", wanted_workers=1, batch_size=1, device="cpu",
        precision="fp32", weights_size=0, requests_in_flight=0, max_batch_delay_ms=100, url="m.mar", workers_min=1,
        workers_max=1, worker_rows=list, checks=dict, queue_status=lambda: (100, 0),
    )  # fmt: skip


class Models:
    """As the registry, of models with one version each."""

    def __init__(self, count: int) -> None:
        self.models = {model.name: model for model in map(fake_model, range(count))}
        self.failures = [LoadFailure(f"file-{number}", "f.mar", "why") for number in range(3)]

    def all_models(self) -> list[Any]:
        return list(self.models.values())

    def default_version(self, name: str) -> str:
        return "1.0"

    def versions(self, name: str) -> list[Any]:
        return [self.models[name]]

    def get(self, name: str, version: str | None = None) -> Any:
        if name not in self.models:
            raise ModelNotFoundError(name)
        raise VersionNotFoundError(name)


def state_of(count: int, *, is_management: bool = True, tells_errors: bool = True) -> ConsoleState:
    models: Any = Models(count)
    inference: Any = SimpleNamespace(is_ready=True)
    return ConsoleState(
        models, Metrics(hostname="h"), inference, Config(), errors=RecentErrors(), log=RecentLog(),
        is_management=is_management, serves_both=False, tells_errors=tells_errors, asks_key=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ask() -> Any:
    state = state_of(COUNT)

    def show(query: str) -> Any:
        request = Request("GET", "/console/state", query=query)
        answer = asyncio.run(state.show(Exchange(request, lambda exchange: None)))
        assert len(answer.body) < ANSWER_SIZE_MAX
        return json.loads(bytes(answer.body))

    return show


def test_no_answer_has_more_than_a_page(ask: Any) -> None:
    for query in ("", f"limit={ROWS_MAX}", "search=model", "state=READY"):
        told = ask(query)
        assert len(told["models"]["rows"]) == ROWS_MAX
    with pytest.raises(BadRequestError):
        ask(f"limit={ROWS_MAX + 1}")


def test_all_of_them_can_be_turned_to(ask: Any) -> None:
    names = []
    while rows := ask(f"offset={len(names)}")["models"]["rows"]:
        names += [row["name"] for row in rows]
    assert names == [f"model-{number:05}" for number in range(COUNT)] + ["file-0", "file-1", "file-2"]


def test_they_are_found_by_name_and_state_and_counted(ask: Any) -> None:
    told = ask("search=09999")
    assert [row["name"] for row in told["models"]["rows"]] == ["model-09999"] and told["models"]["match"] == 1
    failed = ask("state=FAILED")
    assert failed["models"]["match"] == failed["counts"]["FAILED"] == 10 + 3
    assert failed["counts"]["READY"] == COUNT - 10
    assert [row["name"] for row in failed["models"]["rows"]][-3:] == ["file-0", "file-1", "file-2"]
    assert ask("state=FAILED&offset=11&limit=1")["models"]["rows"][0]["name"] == "file-1"
    assert ask("search=nothing")["models"] == {"offset": 0, "match": 0, "rows": []}


def test_a_model_that_is_gone_is_none_and_no_error(ask: Any) -> None:
    assert ask("model=nobody&limit=0")["model"] is None
    assert ask("model=model-00001&version=9&limit=0")["model"] is None


@pytest.mark.parametrize(
    ("is_management", "tells_errors", "is_told"),
    [(True, True, True), (True, False, True), (False, True, True), (False, False, False)],
)
def test_strangers_are_not_told_where_the_server_is_managed(
    is_management: bool, tells_errors: bool, is_told: bool
) -> None:
    state = state_of(0, is_management=is_management, tells_errors=tells_errors)
    answer = asyncio.run(state.show(Exchange(Request("GET", "/console/state"), lambda exchange: None)))
    server = json.loads(bytes(answer.body))["server"]
    assert server["inference"]["port"] == 8080
    assert (server["management"] is not None) == is_told
