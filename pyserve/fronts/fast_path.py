"""Where there is one front end, plain requests to models of plain tensors are answered natively by this very process.

What models take so, and for how long, is what front ends are told (`tensors.py`). What content types mean and how
answers look is said by the code that front ends have for that (`rows.py`). See csrc/bindings_fast.h for the rest.

Loop thread only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from pyserve.config.config import Config
from pyserve.engine import Engine
from pyserve.errors import JsonObject
from pyserve.fronts.outputs import Output
from pyserve.fronts.rows import Route
from pyserve.fronts.tensors import Tensors
from pyserve.http1.answer import AnswerWriter
from pyserve.http1.compression import Compression
from pyserve.http1.connections import Connections
from pyserve.http1.fast_protocol import FastProtocol, FastTlsProtocol
from pyserve.http1.protocol import Http1Protocol
from pyserve.http1.tls import Http1TlsProtocol
from pyserve.models.registry import Registry
from pyserve.request.body_budget import QUICK_SIZE_MAX
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Response
from pyserve.security.cors import Cors
from pyserve.security.tokens import Tokens
from pyserve.telemetry.access_log import AccessLog
from pyserve.telemetry.request_log import NoLog
from pyserve.tensor_types import JSON, RAW

if TYPE_CHECKING:
    from pyserve import _core


def protocol_maker(  # noqa: PLR0917 - all that a listener has
    registry: Registry, engine: Engine, config: Config, connections: Connections, app: Callable[[Exchange], None],
    log: object, tokens: Tokens | None, *, is_tls: bool, may_be_fast: bool,
) -> Callable[[], Http1Protocol]:  # fmt: skip
    """What makes the protocols of a listener's connections.

    Args:
        log: notes answers.
        tokens: the keys, if there are any.
        may_be_fast: predictions are asked for there.
    """
    takes_lines = isinstance(log, AccessLog) and log.takes_lines
    # Else in a checkout whose extensions were built before there was this one.
    is_built = hasattr(getattr(engine.core, "FastPath", None), "wait_awake")
    may_be_fast = may_be_fast and is_built and not Cors(config).looks_at_requests
    if not may_be_fast or not (takes_lines or isinstance(log, NoLog)):
        return partial(Http1TlsProtocol if is_tls else Http1Protocol, app, connections.limits, connections)
    tensors = Tensors(registry, engine.core, tokens=tokens, decodes=config.decode_input_request)
    lines = log if isinstance(log, AccessLog) else None
    path = FastPath(tensors, connections, app, lines, config.max_response_size)
    engine.let_wait(path.native)
    return partial(path.protocol, FastTlsProtocol if is_tls else FastProtocol)


Frame = tuple[int, bytes, bytes, bytes, bytes, bytes]


class FastForm(NamedTuple):
    """What native code knows of requests that look alike.

    Attributes:
        is_json: the body is; else an item's bytes.
        writes_json: the answer's numbers are text, else bytes.
        writes_flat: all of them with commas; else nested lists with an indent.
        adopts_answers: what the lane answers by itself is in this form, too.
        is_coded: answers that are large enough leave in a coding that the client takes.
        frame: what stands around the numbers of an answer with such an output (see `rows.Output`): as of
            `AnswerWriter.lasting`, and in the body before and behind them; of an answer that is large, or is not.
    """

    is_json: bool
    writes_json: bool
    writes_flat: bool
    adopts_answers: bool
    is_coded: bool
    frame: Callable[[bytes, bool], Frame]


class FastModel:
    """A model, as its paths ask for it."""

    def __init__(self, route: Route, answers: AnswerWriter, compression: Compression | None):
        self._route = route
        self._answers = answers
        self._compression = compression

    def predictions(self, content_type: str, accept: str, codings: str) -> FastForm | None:
        """Of requests to ``/predictions``, with the codings that are accepted; None if they go their usual way."""
        told = self._route.form(content_type, accept)
        if told is None:
            return None
        is_json, answers_raw = told
        frame = self._raw if answers_raw else self._json
        return FastForm(is_json, not answers_raw, False, True, self._is_coded(codings), frame)

    def infer(self, description: bytes, codings: str) -> FastForm | None:
        """Of binary requests of the Open Inference Protocol, by their JSON."""
        told = self._route.infer.asked(description)
        if told is None:
            return None
        request_id, is_binary = told

        def frame(output: bytes, is_large: bool) -> Frame:
            head, prefix, suffix = self._route.infer.frame(Output.read(output), request_id, is_binary=is_binary)
            return self._frame(head, is_large, prefix, suffix)

        return FastForm(False, not is_binary, True, False, self._is_coded(codings), frame)

    def _is_coded(self, codings: str) -> bool:
        return self._compression is not None and self._compression.codes(codings)

    def _raw(self, output: bytes, is_large: bool) -> Frame:
        headers = Output.read(output).raw_headers
        return self._frame(Response(200, content_type=RAW, reason="", headers=headers), is_large)

    def _json(self, output: bytes, is_large: bool) -> Frame:
        return self._frame(Response(200, content_type=JSON, reason=""), is_large)

    def _frame(self, head: Response, is_large: bool, prefix: bytes = b"", suffix: bytes = b"") -> Frame:
        if is_large and self._compression is not None:
            self._compression.note_choice(head)
        return *self._answers.lasting(head), prefix, suffix


class FastPath:
    """Of one listener.

    Args:
        tensors: which models take plain tensors; nobody else has started it.
        app: answers all other requests.
        log: notes answers.
        answer_size_max: bytes (``max_response_size``).
    """

    def __init__(
        self, tensors: Tensors, connections: Connections, app: Callable[[Exchange], None], log: AccessLog | None,
        answer_size_max: int,
    ):  # fmt: skip
        limits, compression = connections.limits, connections.compression
        self._tensors = tensors
        self._connections = connections
        self._app = app
        self._log = log
        self._answer_size_max = answer_size_max
        self._core: Any = tensors.rings
        self._is_closed = False
        keys = tensors.tokens
        self.native: _core.FastPath = self._core.FastPath(
            tensors.table, budget=connections.budget, call_soon=asyncio.get_running_loop().call_soon, log=log,
            key_until=None if keys is None else partial(keys.passes_until, "inference"),
            head_size_max=limits.head_size_max, line_size_max=limits.line_size_max,
            header_count_max=limits.header_count_max, body_size_max=min(QUICK_SIZE_MAX, limits.body_size_max),
            takes_ids=connections.heads.takes_ids, json_size_max=QUICK_SIZE_MAX,
            coded_size_min=0 if compression is None else max(1, compression.size_min),
        )  # fmt: skip
        connections.on_parting = self.close
        tensors.start(self._set)

    def protocol(self, kind: type[FastProtocol] = FastProtocol) -> FastProtocol:
        """Of a connection that has come."""
        connections = self._connections
        native = self._core.FastConnection(self.native)
        return kind(self._app, connections.limits, connections, native)

    def close(self) -> None:
        """Takes nothing any more; what is under way becomes ordinary requests."""
        if self._is_closed:
            return
        self._is_closed = True
        self._tensors.stop()
        self.native.close()
        for connection in self._connections.members:
            if isinstance(connection, FastProtocol):
                connection.take_over()

    def _set(self, told: bytes) -> None:
        tensors = self._tensors
        routes: dict[str, _core.FastRoute] = {}
        for entry, (rows, url_version) in zip(tensors.entries, tensors.routes, strict=True):
            if entry["size"] > QUICK_SIZE_MAX:
                continue
            name, version, is_default = entry["name"], entry["version"], entry["is_default"]
            connections = self._connections
            model = FastModel(Route(0, entry, self._answer_size_max), connections.answers, connections.compression)
            add = partial(self._add, routes, entry, rows, url_version)
            add(f"/predictions/{name}" + ("" if is_default else f"/{version}"), model.predictions)
            add(f"/v2/models/{name}/" + ("infer" if is_default else f"versions/{version}/infer"), model.infer)
        self.native.set(tensors.generation, routes)

    def _add(  # noqa: PLR0917
        self, routes: dict[str, _core.FastRoute], entry: JsonObject, rows: _core.LaneRows, url_version: str, path: str,
        form_of: Callable[..., FastForm | None],
    ) -> None:  # fmt: skip
        routes[path] = self._core.FastRoute(
            rows, url_version, describes_items=path.startswith("/v2/"), form_of=form_of,
            log_head=self._log.line_head("POST", path, 200) if self._log is not None else "",
            kind=entry["kind"], shape=entry["shape"], takes_json=entry["takes_json"],
        )  # fmt: skip
