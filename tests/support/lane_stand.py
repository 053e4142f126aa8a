"""A native lane with its surroundings: real engine, real loop, exchanges without a socket."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyserve import _core
from pyserve.config.config import Config
from pyserve.context import ThreadContext
from pyserve.engine import Engine
from pyserve.handlers.tensor import TensorHandler
from pyserve.lanes.native import NativeLane
from pyserve.lanes.network import Network
from pyserve.lanes.pending import Pending
from pyserve.lanes.resources import Services
from pyserve.lanes.settings import ModelSettings
from pyserve.lanes.spawner import Spawner
from pyserve.lanes.stuck import StuckThreads
from pyserve.request.exchange import Exchange
from pyserve.request.messages import ErrorFormat, Headers, Request, Response
from pyserve.telemetry.metrics import Metrics
from tests.support.networks import save_script

HANG_S = 60
SHAPE = (4,)
JSON_HEADERS: Headers = [("Content-Type", "application/json")]


class Probe(TensorHandler):
    """A handler that a test can make slow to preprocess or wrong."""

    is_fast = True
    preprocess_error: Exception | None = None
    preprocessed: Any = None
    postprocessor: Any = None  # what to call with the output instead

    def is_quick(self, size: int) -> bool:
        return self.is_fast

    def preprocess(self, data: Any) -> Any:
        if self.preprocess_error is not None:
            raise self.preprocess_error
        return super().preprocess(data) if self.preprocessed is None else self.preprocessed

    def postprocess(self, data: Any) -> Any:
        return super().postprocess(data) if self.postprocessor is None else self.postprocessor(data)


class Made(Pending):
    """A request that may bring what the network gets, as rows of the Open Inference Protocol do."""

    __slots__ = ("inputs",)


class Stand:
    """A lane with its surroundings. ``answers``: what the exchanges were answered, by request id."""

    def __init__(
        self, path: Path, settings: ModelSettings, config: Config, *, private: bool,
        handler: TensorHandler | None = None, example: float = 0.0, network: Network | None = None,
    ):  # fmt: skip
        loop = asyncio.get_running_loop()
        self.engine = Engine(loop, cpu_budget=2)
        self.metrics = Metrics(torch_version=torch.__version__)
        self.pool = ThreadPoolExecutor(2)
        self.services = Services(
            config, self.engine, self.metrics, self.pool, Spawner(), ErrorFormat(True, private),
            stuck=StuckThreads(1, lambda: self.engine.lost_count),
        )  # fmt: skip
        self.handler: Any = network.handler if network is not None else handler or Probe()
        if network is None:
            network = self._network(path, example)
        self.lane = NativeLane(self.services, "m", "m 1.0", network, settings)
        self.answers: dict[str, Response] = {}

    def _network(self, path: Path, example: float) -> Network:
        folder = str(path.parent / "archive")
        context = ThreadContext(
            "m", folder, {}, model_yaml_config={"input": {"dtype": "float32", "shape": list(SHAPE)}}
        )
        self.handler.prepare(context)
        item = [torch.full((1, *SHAPE), example)]
        return Network(self.handler, context, _core.TorchModel.load(str(path), item), item, "cpu")

    def post(
        self, *numbers: float, body: bytes | None = None, id: str = "", headers: Headers = JSON_HEADERS,
        inputs: list[torch.Tensor] | None = None, url_version: str = "default",
    ) -> Exchange:  # fmt: skip
        values = list(numbers) + [0.0] * (SHAPE[0] - len(numbers))
        request = Request(
            "POST", "/predictions/m", headers=headers,
            body=bytearray(json.dumps(values).encode() if body is None else body),
            id=id or f"r{time.monotonic_ns()}", arrived_at=time.monotonic_ns(),
        )  # fmt: skip

        def deliver(exchange: Exchange) -> None:
            assert exchange.response is not None and request.id not in self.answers
            self.answers[request.id] = exchange.response

        exchange = Exchange(request, deliver)
        pending = Made(self.lane, exchange, "1.0", url_version)
        pending.inputs = inputs
        self.lane.predict(pending)
        return exchange

    async def end(self) -> None:
        await self.lane.close()
        self.pool.shutdown()
        self.engine.close()

    async def until(self, is_done: Callable[[], bool]) -> None:
        end = time.monotonic() + HANG_S
        while not is_done():
            assert time.monotonic() < end, "hangs"
            await asyncio.sleep(0)

    async def answer(self, *numbers: float, **options: Any) -> Response:
        exchange = self.post(*numbers, **options)
        await self.until(lambda: exchange.answered)
        return self.answers[exchange.request.id]


@asynccontextmanager
async def standing(
    path: Path, network: nn.Module, *, workers: int = 1, config: Config | None = None, private: bool = True,
    handler: TensorHandler | None = None, **settings: Any,
) -> AsyncIterator[Stand]:  # fmt: skip
    script = save_script(network, path / "m.pt")
    stand = Stand(script, ModelSettings(**settings), config or Config(), private=private, handler=handler)
    stand.lane.set_workers(workers)
    assert await stand.lane.settled(HANG_S) == ""
    try:
        yield stand
    finally:
        await stand.end()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 2 * HANG_S))


def error(response: Response) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(bytes(response.body))
    assert body["code"] == response.status
    return body
