"""The worker of a native model's explanations, and the end of the model while it is being started."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import MagicMock

import pytest

from pyserve.errors import OverloadedError, ServeError
from pyserve.lanes.settings import ModelSettings
from pyserve.models import explanations
from pyserve.models.explanations import Explanations
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request, Response

HANG_S = 60.0


class SlowLane:
    """One whose worker loads until the lane is closed."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_waited_for = asyncio.Event()
        self._closed = asyncio.Event()

    def set_workers(self, count: int) -> None:
        self.asked.append(f"{count} worker")

    async def settled(self, timeout_s: float) -> str:
        self.is_waited_for.set()
        await self._closed.wait()
        return ""

    async def close(self) -> None:
        self.asked.append("close")
        self._closed.set()


def answers_of(error: ServeError, request: Request) -> Response:
    return Response(error.status, b"")


@pytest.mark.parametrize("is_opening", [True, False])
def test_a_model_that_is_unregistered_takes_a_worker_along_that_is_being_started(
    monkeypatch: pytest.MonkeyPatch, is_opening: bool
) -> None:
    async def explain() -> None:
        lane, served, may_open, opens = SlowLane(), [True], asyncio.Event(), asyncio.Event()

        async def open_lane(options: Any) -> SlowLane:
            opens.set()
            await may_open.wait()
            return lane

        monkeypatch.setattr(explanations, "open_python_lane", open_lane)
        monkeypatch.setattr(explanations, "replace", lambda options, **changes: options)
        options = MagicMock(settings=ModelSettings())
        of_model = Explanations(
            lambda: options, is_served=lambda: bool(served), starting_error=MagicMock(),
            no_worker=lambda: OverloadedError("unregistered"),
        )  # fmt: skip
        answer: asyncio.Future[Response | None] = asyncio.get_running_loop().create_future()
        exchange = Exchange(Request("POST", "/", id="r"), lambda each: answer.set_result(each.response))
        native = MagicMock(settings=ModelSettings())
        native.services.error_format.answer = answers_of
        of_model.explain(native, exchange, "1.0", MagicMock())
        if is_opening:
            await opens.wait()
            served.clear()
            assert of_model.take_lane() is None
            may_open.set()
        else:
            may_open.set()
            await lane.is_waited_for.wait()
            served.clear()
            taken: Any = of_model.take_lane()
            assert taken is lane
            await taken.close()
        response = await answer
        assert response is not None and response.status == 503
        assert lane.asked == (["close"] if is_opening else ["1 worker", "close"]) and of_model.take_lane() is None

    asyncio.run(asyncio.wait_for(explain(), HANG_S))
