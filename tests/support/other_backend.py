"""A network's stand-in on another backend, for tests of what chooses among backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class OtherModel:
    """Answers what ``plain`` does, as ``change`` makes it."""

    backend = "openvino"
    state = ""
    plain_runs = 0

    def __init__(self, plain: Any, change: Callable[[Any], Any] = lambda answer: answer):
        self._plain, self._change = plain, change

    def run(self, inputs: Sequence[torch.Tensor]) -> Any:
        return self._change(self._plain.run(list(inputs)))

    def settle(self) -> None:
        pass
