"""What tests ask a server, whatever carries it: one over sockets, or the applications of an engine in this process."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from prometheus_client.parser import text_string_to_metric_families

LIMIT_S = 120.0
JSON = {"Content-Type": "application/json"}

C = TypeVar("C", bound="AskingClient")


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def detail(self) -> dict[str, Any]:
        detail: dict[str, Any] = self.json["detail"]
        return detail


class AskingClient(ABC):
    """One connection, or what stands for one; a context."""

    @abstractmethod
    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer: ...

    def close(self) -> None:  # noqa: B027 - not all have something to close
        """At the end of the context."""

    def predict(self, model: str, numbers: Any) -> Answer:
        return self.ask("POST", f"/predictions/{model}", json.dumps(numbers).encode(), JSON)

    def __enter__(self: C) -> C:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Asking(ABC):
    """A server."""

    @abstractmethod
    def client(self, name: str = "inference") -> AskingClient: ...

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, *,
        port: str = "inference",
    ) -> Answer:  # fmt: skip
        with self.client(port) as client:
            return client.ask(method, path, body, headers)

    def predict(self, model: str, numbers: Any) -> Answer:
        with self.client() as client:
            return client.predict(model, numbers)

    def manage(self, method: str, path: str) -> Any:
        """The JSON answer of a management call that must succeed."""
        answer = self.ask(method, path, port="management")
        assert answer.status in (200, 202), answer.body
        return answer.json

    def describe(self, model: str) -> dict[str, Any]:
        described: dict[str, Any] = self.manage("GET", f"/models/{model}")[0]
        return described

    def metric(self, sample: str, **labels: str) -> float:
        """The sum over all samples of that name with these labels."""
        text = self.ask("GET", "/metrics", port="metrics").body.decode()
        return sum(
            each.value
            for family in text_string_to_metric_families(text)
            for each in family.samples
            if each.name == sample and labels.items() <= each.labels.items()
        )

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Asks again and again; each time the server has turned its loop."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}"
            self.ask("GET", "/live")
