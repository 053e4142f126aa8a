"""A batch in small pieces, so that one is prepared while another is in the model and a third is being answered."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

HANDLER_METHODS = ["preprocess", "inference", "postprocess"]
PROFILER_AVAILABLE = True
_index: contextvars.ContextVar[int | None] = contextvars.ContextVar("micro_batch", default=None)


def get_micro_batch_idx() -> int | None:
    """Which micro batch the calling code handles; None outside of them."""
    return _index.get()


class MicroBatching:
    """Takes the place of a handler's ``handle``: ``self.handle = MicroBatching(self, 4)`` in ``initialize``.

    Args:
        parent_handler: has preprocess, inference and postprocess.
        micro_batch_size: rows of one piece.
        parallelism: stage -> threads that work on it, 1 by default.
    """

    def __init__(self, parent_handler: Any, micro_batch_size: int = 1, parallelism: Mapping[str, int] | None = None):
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is at least 1, got {micro_batch_size}")
        self.handler = parent_handler
        self.micro_batch_size = micro_batch_size
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._parallelism: dict[str, int] = {}
        self.parallelism = dict(parallelism or {})

    @property
    def parallelism(self) -> dict[str, int]:
        """Stage -> threads, of the stages that were named. What is set is added to what was."""
        return dict(self._parallelism)

    @parallelism.setter
    def parallelism(self, parallelism: Mapping[str, int]) -> None:
        unknown = set(parallelism) - set(HANDLER_METHODS)
        if unknown:
            raise ValueError(f"unknown stages {sorted(unknown)}; there are {', '.join(HANDLER_METHODS)}")
        wanted = {**self._parallelism, **{stage: int(count) for stage, count in parallelism.items()}}
        if wanted and min(wanted.values()) < 1:
            raise ValueError(f"each stage needs at least 1 thread, got {wanted}")
        self.shutdown()
        self._parallelism = wanted
        self._pools = {stage: ThreadPoolExecutor(wanted.get(stage, 1), f"micro-{stage}") for stage in HANDLER_METHODS}

    @staticmethod
    def get_micro_batch_idx() -> int | None:
        """As the function of this name."""
        return get_micro_batch_idx()

    def shutdown(self) -> None:
        """Ends the threads."""
        for pool in self._pools.values():
            pool.shutdown(wait=True)
        self._pools = {}

    def __call__(self, data: Sequence[Any], context: Any) -> list[Any]:
        """The answers for all rows, in their order; a description or an explanation if that is asked for.

        Raises:
            whatever a stage raises, of the first piece that failed.
        """
        began = time.perf_counter()
        handler = self.handler
        handler.context = context
        if _says(handler, "_is_describe"):
            answers = [handler.describe_handle()]
        elif _says(handler, "_is_explain"):
            answers = handler.explain_handle(handler.preprocess(data), data)
        else:
            answers = self.handle(data)
        metrics = getattr(context, "metrics", None)
        if metrics is not None:
            metrics.add_time("HandlerTime", round((time.perf_counter() - began) * 1e3, 2), None, "ms")
        return answers

    def handle(self, data: Sequence[Any]) -> list[Any]:
        """The answers for all rows, in their order."""
        size = self.micro_batch_size
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        finished: list[Future[list[Any]]] = [self._begin(number, piece) for number, piece in enumerate(pieces)]
        return [answer for future in finished for answer in future.result()]

    def _begin(self, number: int, piece: Sequence[Any]) -> Future[list[Any]]:
        done: Future[list[Any]] = Future()

        def run(stage: int, value: Any) -> None:
            _index.set(number)
            try:
                result = getattr(self.handler, HANDLER_METHODS[stage])(value)
            except BaseException as error:  # it belongs to whoever waits for the batch
                done.set_exception(error)
                return
            if stage + 1 == len(HANDLER_METHODS):
                done.set_result(result)
            else:
                self._pools[HANDLER_METHODS[stage + 1]].submit(run, stage + 1, result)

        self._pools[HANDLER_METHODS[0]].submit(run, 0, piece)
        return done


def _says(handler: Any, question: str) -> bool:
    return bool(getattr(handler, question, bool)())
