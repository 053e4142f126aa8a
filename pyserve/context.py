"""What a handler knows about its model and about the requests of one batch.

`Context` and `RequestProcessor` have TorchServe's members, so that handlers written for it find
everything where they look for it. A model has one `Context` per worker, which `initialize` and every call get: handlers
keep it, and ask the one they kept about the requests at hand. `Context.bind` gives it those of the next batch.
Per-request objects are made only when a handler touches them.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

HeaderList = Sequence[tuple[str, str]]

# What TorchServe's server can send as the name and the value of a header; other characters end its worker. In a value
# only those that a client could take for the end of the line or of the text are refused.
_NAME = re.compile(r"[!-+\-./0-9<>-~]+\Z")
_VALUE = re.compile(r"[^\x00\n\x0b\x0c\r]*\Z")


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
        if value is not None or not isinstance(key, str):
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
            ValueError: HTTP has no such name, or the value holds a line break, which would start a header of its own.
        """
        check_header(key, value)
        self._response_header[key] = value

    def get_response_headers(self) -> dict[str, str]:
        return self._response_header

    def get_response_header(self, key: str) -> str | None:
        return self._response_header.get(key)


def check_header(key: Any, value: Any) -> None:
    """Whether a response header can be sent.

    Raises:
        TypeError: name or value is not a string.
        ValueError: HTTP has no such name, or the value holds a line break or another character that ends a line.
    """
    if not (isinstance(key, str) and isinstance(value, str)):
        raise TypeError(f"response headers are strings, got {key!r}: {value!r}; convert with str()")
    if "\n" in value or "\r" in value or "\n" in key or "\r" in key:
        raise ValueError(f"response header {key!r} holds a line break; remove it before setting the header")
    if not _NAME.match(key):
        raise ValueError(
            f"{key!r} is no name of a response header: it has a space, ':', ',', ';', '=' or what is not ASCII; use "
            "letters, digits and '-'"
        )
    if not _VALUE.match(value):
        raise ValueError(f"response header {key!r} holds a character that HTTP cannot send; remove it: {value[:80]!r}")


class Batch:
    """The requests of one call of a handler, and what it wants answered.

    Attributes:
        request_ids: by index in the batch.
        headers: of each request.
        processors: of each request; None where nobody has asked yet.
        deadlines: when the clients stop waiting, ns of ``time.monotonic_ns()``, 0 for one that did not say; empty if
            none did.
        sink: where parts of answers go that are sent before the last one.
    """

    __slots__ = ("deadlines", "headers", "processors", "request_ids", "sink")

    def __init__(self, request_ids: Sequence[str], headers: Sequence[HeaderList], deadlines: Sequence[int] = ()):
        self.request_ids: Sequence[str] | Mapping[int, str] | None = request_ids
        self.headers = headers
        self.processors: list[RequestProcessor | None] = [None] * len(headers)
        self.deadlines = deadlines
        self.sink: Any = None

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        """A copy, made by a handler, can be asked and has nowhere to send parts to."""
        return None, {**{name: getattr(self, name) for name in self.__slots__}, "sink": None}


class Context:
    """TorchServe's context: the model's description plus the requests of the current batch.

    Handlers may add attributes of their own (``context.cache`` is the usual one); they stay from call to call.
    Before the first batch there are no requests: `request_ids` and `request_processor` are None. After a batch its
    requests can be asked about until the next one begins.

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
        self.stopping_criteria: list[Any] | None = None
        self._batch: Batch | None = None

    def bind(self, batch: Batch | None) -> Batch | None:
        """Makes ``batch`` the one at hand; None: there is none, as before the first. Returns the one before."""
        before, self._batch = self._batch, batch
        return before

    def for_batch(
        self, request_ids: Sequence[str], request_headers: Sequence[HeaderList], deadlines: Sequence[int] = ()
    ) -> Context:
        """A copy for one batch, for calls that overlap. Attributes that it is given are its own.

        Args:
            request_ids, request_headers: those of item ``i`` at index ``i``.
            deadlines: see `Batch`.
        """
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy._batch = Batch(request_ids, request_headers, deadlines)
        return copy

    def _bound(self) -> Batch:
        """The batch at hand. TypeError, as TorchServe's, while there is none."""
        if self._batch is None:
            raise TypeError(
                "the context has no request here: it is asked about one in initialize, or is not the one that handle "
                "was given"
            )
        return self._batch

    @property
    def cl_socket(self) -> Any:
        """Where parts of answers go (TorchServe's name); None while no call runs."""
        return self._batch.sink if self._batch is not None else None

    @cl_socket.setter
    def cl_socket(self, sink: Any) -> None:
        if self._batch is not None:
            self._batch.sink = sink

    @property
    def cancelled(self) -> bool:
        """Whether every client of the batch has disconnected: nobody will see what is computed now."""
        sink = self.cl_socket
        return sink is not None and bool(sink.is_cancelled())

    def is_cancelled(self, idx: int = 0) -> bool:
        """Whether nobody waits for answer ``idx`` any more: its client has gone, or its time is over."""
        sink = self.cl_socket
        return sink is not None and bool(sink.is_cancelled(idx))

    def remaining_s(self, idx: int = 0) -> float | None:
        """Seconds until client ``idx`` stops waiting, 0 if it has; None if it set no ``x-request-timeout-ms``.

        Worker processes know it; in the native lane it is None.
        """
        deadlines = self._batch.deadlines if self._batch is not None else ()
        deadline = deadlines[idx] if deadlines else 0
        return max(0.0, (deadline - time.monotonic_ns()) / 1e9) if deadline else None

    @property
    def request_ids(self) -> dict[int, str]:
        """Index in the batch -> request id; None before the first batch."""
        batch = self._batch
        if batch is None or batch.request_ids is None:
            return None  # type: ignore[return-value]  # as TorchServe; handlers ask within a call
        ids = batch.request_ids
        if not isinstance(ids, dict):
            ids = batch.request_ids = dict(ids) if isinstance(ids, Mapping) else dict(enumerate(ids))
        return ids

    @request_ids.setter
    def request_ids(self, request_ids: Mapping[int, str] | None) -> None:
        if self._batch is None:
            self._batch = Batch((), ())
        self._batch.request_ids = request_ids

    @property
    def request_processor(self) -> list[RequestProcessor]:
        """One `RequestProcessor` per request of the batch; None before the first batch."""
        if self._batch is None:
            return None  # type: ignore[return-value]  # see `request_ids`
        for idx in range(len(self._batch.processors)):
            self._processor(idx)
        return self._batch.processors  # type: ignore[return-value]  # none is None now

    @request_processor.setter
    def request_processor(self, request_processor: Sequence[RequestProcessor]) -> None:
        if self._batch is None:
            self._batch = Batch((), ())
        self._batch.processors = list(request_processor)

    _request_processor = request_processor  # handlers use the name that TorchServe hides

    def _processor(self, idx: int) -> RequestProcessor:
        batch = self._bound()
        processor = batch.processors[idx]
        if processor is None:
            processor = batch.processors[idx] = RequestProcessor(batch.headers[idx])
        return processor

    def touched(self, idx: int) -> RequestProcessor | None:
        """The processor of request ``idx``; None if nobody has asked about it, so that nothing can have been set."""
        return self._bound().processors[idx]

    def get_request_id(self, idx: int = 0) -> str | None:
        """Id of request ``idx``; None if there is no such request."""
        ids = self._batch.request_ids if self._batch is not None else None
        if ids is None or isinstance(ids, Mapping):
            return ids.get(idx) if ids else None
        return ids[idx] if isinstance(idx, int) and 0 <= idx < len(ids) else None

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
        """Headers set for answer ``idx``; what is added to the dict is sent too."""
        return self._processor(idx).get_response_headers()

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        """Answer request ``idx`` with this status code and reason phrase. Without a batch it does nothing."""
        if self._batch is not None:
            self._processor(idx).report_status(code, phrase)

    def set_all_response_status(self, code: int = 200, phrase: str = "") -> None:
        """Answer every request of the batch with this status code and reason phrase."""
        for idx in range(len(self._bound().processors)):
            self._processor(idx).report_status(code, phrase)

    def get_response_status(self, idx: int) -> tuple[int, str | None]:
        """(status code, reason phrase) of answer ``idx``; (200, None) when the handler set none."""
        processor = self.touched(idx)
        if processor is None:
            return 200, None
        return processor.get_response_status_code(), processor.get_response_status_phrase()

    def get_sequence_id(self, idx: int) -> str | None:
        """Sequence id of request ``idx``, from the header named by ``header_key_sequence_id``."""
        return self.get_request_header(idx, self.header_key_sequence_id)


class ThreadContext(Context):
    """The context of a handler that several threads call at once: each has the batch that it works on."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._local = threading.local()
        super().__init__(*args, **kwargs)

    @property
    def _batch(self) -> Batch | None:
        batch: Batch | None = getattr(self._local, "batch", None)
        return batch

    @_batch.setter
    def _batch(self, batch: Batch | None) -> None:
        self._local.batch = batch

    def for_batch(
        self, request_ids: Sequence[str], request_headers: Sequence[HeaderList], deadlines: Sequence[int] = ()
    ) -> Context:
        """See `Context.for_batch`; any thread may use the copy."""
        copy = object.__new__(Context)
        vars(copy).update(vars(self))
        copy._batch = Batch(request_ids, request_headers, deadlines)
        return copy
