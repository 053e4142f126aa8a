"""Parts of an answer that are sent before the handler has finished.

A handler streams in one of two ways: it calls `send_intermediate_predict_response` for each part and returns the last
one, as in TorchServe; or it is a generator, or returns one, and yields the parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

STREAM_HEADER = "ts_stream_next"


class PartSink(Protocol):
    """Where parts go: `Context.cl_socket` of a batch."""

    def send_part(self, index: int, part: Any, context: Any) -> bool:
        """Sends a part of answer ``index`` of the batch. False when nobody waits for it any more."""

    def is_cancelled(self, index: int | None = None) -> bool:
        """Whether nobody waits for answer ``index`` any more; None: for any answer of the batch."""


def send_intermediate_predict_response(
    ret: Sequence[Any], req_id_map: Mapping[int, str] | None, message: str, code: int, context: Any = None
) -> None:
    """Sends one part to each client of the batch that is being handled.

    Args:
        ret: a part per request of the batch: text, bytes, a tensor or what JSON can hold.
        req_id_map: the batch's request ids; ``context`` knows them, so it is only compared in length.
        message, code: TorchServe's; the status of an answer is set through ``context``.

    Raises:
        ValueError: not one part per request, no context, or one whose call has ended.
    """
    if context is None or context.cl_socket is None:
        raise ValueError("send_intermediate_predict_response needs the context that `handle` was given, while it runs")
    count = len(context.request_ids or ())
    if len(ret) != count:
        raise ValueError(f"send_intermediate_predict_response got {len(ret)} parts for a batch of {count}")
    for index, part in enumerate(ret):
        context.cl_socket.send_part(index, part, context)
