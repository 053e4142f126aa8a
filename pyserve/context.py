"""What a handler knows about its model and about the requests of one batch.

`Context` and `RequestProcessor` have TorchServe's members, so that handlers written for it find
everything where they look for it. One `Context` describes the model; `Context.for_batch` makes a cheap
copy bound to the requests of one batch. Per-request objects are made only when a handler touches them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

HeaderList = Sequence[tuple[str, str]]


class RequestProcessor:
    """Request headers of one request and the status and headers its handler wants answered.

    Args:
        request_header: request headers, names in the client's own spelling; of a repeated one the last counts.
    """

    __slots__ = ("_lower", "_reason_phrase", "_request_header", "_response_header", "_status_code")

    def __init__(self, request_header: Mapping[str, str] | HeaderList):
        self._request_header: dict[str, str] = dict(request_header)
        self._lower: dict[str, str] | None = None
        self._status_code = 200
        self._reason_phrase: str | None = None
        self._response_header: dict[str, str] = {}

    def get_request_property(self, key: str) -> str | None:
        """Value of request header ``key``: the client's spelling first, then any case; None if absent."""
        value = self._request_header.get(key)
        if value is not None:
            return value
        if self._lower is None:
            self._lower = {name.lower(): text for name, text in self._request_header.items()}
        return self._lower.get(key.lower())

    def get_request_properties(self) -> dict[str, str]:
        """All request headers."""
        return self._request_header

    def report_status(self, code: int, reason_phrase: str | None = None) -> None:
        """Answer with HTTP status ``code`` and, if given, that reason phrase."""
        self._status_code = code
        self._reason_phrase = reason_phrase

    def get_response_status_code(self) -> int:
        return self._status_code

    def get_response_status_phrase(self) -> str | None:
        return self._reason_phrase

    def add_response_property(self, key: str, value: str) -> None:
        """Set response header ``key``.

        Raises:
            TypeError: name or value is not a string.
            ValueError: name or value holds a line break, which would start a header of its own.
        """
        if not (isinstance(key, str) and isinstance(value, str)):
            raise TypeError(f"response headers are strings, got {key!r}: {value!r}; convert with str()")
        if "\n" in value or "\r" in value or "\n" in key or "\r" in key:
            raise ValueError(f"response header {key!r} holds a line break; remove it before setting the header")
        self._response_header[key] = value

    def get_response_headers(self) -> dict[str, str]:
        return self._response_header

    def get_response_header(self, key: str) -> str | None:
        return self._response_header.get(key)


class Context:
    """TorchServe's context: the model's description plus the requests of the current batch.

    Handlers may add attributes of their own (``context.cache`` is the usual one); copies made by
    `for_batch` carry them along.

    Args:
        model_name: name the model is served under.
        model_dir: folder with the unpacked archive.
        manifest: MANIFEST.json as a dict, or None.
        batch_size: largest batch the handler will be given.
        gpu: index of the model's GPU, or None on a CPU.
        mms_version: the server's version.
        limit_max_image_pixels: whether pictures above Pillow's pixel limit are refused.
        metrics: where the handler adds its custom metrics, as in TorchServe; None outside of a server.
        model_yaml_config: model-config.yaml as a dict; None means there is none.
    """

    def __init__(  # noqa: PLR0917 - TorchServe's signature; its users call it by position
        self,
        model_name: str,
        model_dir: str,
        manifest: dict[str, Any] | None = None,
        batch_size: int = 1,
        gpu: int | None = None,
        mms_version: str = "",
        limit_max_image_pixels: bool = True,
        metrics: Any = None,
        model_yaml_config: dict[str, Any] | None = None,
    ):
        # Per model.
        self.model_name = model_name
        self.manifest = manifest
        self.model_yaml_config: dict[str, Any] = model_yaml_config or {}
        self.system_properties: dict[str, Any] = {
            "model_dir": model_dir,
            "gpu_id": gpu,
            "batch_size": batch_size,
            "server_name": "MMS",
            "server_version": mms_version,
            "limit_max_image_pixels": limit_max_image_pixels,
        }
        self.metrics = metrics
        self.header_key_sequence_id = os.environ.get("TS_REQUEST_SEQUENCE_ID", "ts_request_sequence_id")
        self.header_key_sequence_start = os.environ.get("TS_REQUEST_SEQUENCE_START", "ts_request_sequence_start")
        self.header_key_sequence_end = os.environ.get("TS_REQUEST_SEQUENCE_END", "ts_request_sequence_end")
        # Per batch.
        self.stopping_criteria: list[Any] | None = None
        self.cl_socket: Any = None
        self._request_deadlines: Sequence[int] = ()
        self._request_ids: Sequence[str] | Mapping[int, str] = ()
        self._request_headers: Sequence[HeaderList] = ()
        self._processors: list[RequestProcessor | None] = []

    def for_batch(
        self, request_ids: Sequence[str], request_headers: Sequence[HeaderList], deadlines: Sequence[int] = ()
    ) -> Context:
        """A copy for one batch: request id and headers of item ``i`` at index ``i`` of the two lists.

        Args:
            deadlines: when the clients stop waiting, ns of ``time.monotonic_ns()``, 0 for one that did not say; empty
                if none did.
        """
        batch = object.__new__(type(self))
        batch.__dict__.update(self.__dict__)
        batch.stopping_criteria = None
        batch._request_deadlines = deadlines
        batch._request_ids = request_ids
        batch._request_headers = request_headers
        batch._processors = [None] * len(request_headers)
        return batch

    @property
    def cancelled(self) -> bool:
        """Whether every client of the batch has disconnected: nobody will see what is computed now."""
        return self.cl_socket is not None and self.cl_socket.is_cancelled()

    def is_cancelled(self, idx: int = 0) -> bool:
        """Whether nobody waits for answer ``idx`` any more: its client has gone, or its time is over."""
        return self.cl_socket is not None and self.cl_socket.is_cancelled(idx)

    def remaining_s(self, idx: int = 0) -> float | None:
        """Seconds until client ``idx`` stops waiting, 0 if it has; None if it set no ``x-request-timeout-ms``.

        Worker processes know it; in the native lane it is None.
        """
        deadline = self._request_deadlines[idx] if self._request_deadlines else 0
        return max(0.0, (deadline - time.monotonic_ns()) / 1e9) if deadline else None

    @property
    def request_ids(self) -> dict[int, str]:
        """Index in the batch -> request id."""
        ids = self._request_ids
        return dict(ids) if isinstance(ids, Mapping) else dict(enumerate(ids))

    @request_ids.setter
    def request_ids(self, request_ids: Mapping[int, str]) -> None:
        self._request_ids = request_ids

    @property
    def request_processor(self) -> list[RequestProcessor]:
        """One `RequestProcessor` per request of the batch."""
        return [self._processor(idx) for idx in range(len(self._processors))]

    @request_processor.setter
    def request_processor(self, request_processor: Sequence[RequestProcessor]) -> None:
        self._processors = list(request_processor)

    def _processor(self, idx: int) -> RequestProcessor:
        processor = self._processors[idx]
        if processor is None:
            processor = self._processors[idx] = RequestProcessor(self._request_headers[idx])
        return processor

    def get_request_id(self, idx: int = 0) -> str | None:
        """Id of request ``idx``; None if there is no such request."""
        if isinstance(self._request_ids, Mapping):
            return self._request_ids.get(idx)
        return self._request_ids[idx] if 0 <= idx < len(self._request_ids) else None

    def get_request_header(self, idx: int, key: str) -> str | None:
        """Header ``key`` of request ``idx``: the client's spelling first, then any case; None if absent."""
        return self._processor(idx).get_request_property(key)

    def get_all_request_header(self, idx: int) -> dict[str, str]:
        """All headers of request ``idx``."""
        return self._processor(idx).get_request_properties()

    def set_response_content_type(self, idx: int, value: str) -> None:
        self.set_response_header(idx, "content-type", value)

    def get_response_content_type(self, idx: int) -> str | None:
        return self._processor(idx).get_response_header("content-type")

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        """Set header ``key`` of answer ``idx``. TypeError unless both are strings, ValueError on a line break."""
        self._processor(idx).add_response_property(key, value)

    def get_response_headers(self, idx: int) -> dict[str, str]:
        """Headers set for answer ``idx``."""
        processor = self._processors[idx]
        return processor.get_response_headers() if processor is not None else {}

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        """Answer request ``idx`` with this status code and reason phrase."""
        self._processor(idx).report_status(code, phrase)

    def set_all_response_status(self, code: int = 200, phrase: str = "") -> None:
        """Answer every request of the batch with this status code and reason phrase."""
        for idx in range(len(self._processors)):
            self._processor(idx).report_status(code, phrase)

    def get_response_status(self, idx: int) -> tuple[int, str | None]:
        """(status code, reason phrase) of answer ``idx``; (200, None) when the handler set none."""
        processor = self._processors[idx]
        if processor is None:
            return 200, None
        return processor.get_response_status_code(), processor.get_response_status_phrase()

    def get_sequence_id(self, idx: int) -> str | None:
        """Sequence id of request ``idx``, from the header named by ``header_key_sequence_id``."""
        return self.get_request_header(idx, self.header_key_sequence_id)
