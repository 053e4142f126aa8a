"""What native code is told of plain requests to models of plain tensors: how those ask that look alike.

The same in the engine's own process (`fast_path.py`) and in front ends (`fast_door.py`). What content types mean and
how answers look is said by the code that front ends have for that (`rows.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pyserve.config.config import Config
from pyserve.errors import JsonObject
from pyserve.fronts.outputs import Output
from pyserve.fronts.rows import Route
from pyserve.http1.answer import AnswerWriter
from pyserve.http1.compression import Compression
from pyserve.http1.connections import Connections
from pyserve.request.body_budget import QUICK_SIZE_MAX
from pyserve.request.messages import Response
from pyserve.security.cors import Cors
from pyserve.telemetry.access_log import AccessLog
from pyserve.telemetry.request_log import NoLog
from pyserve.tensor_types import JSON, RAW

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


def may_be_fast(config: Config, log: object) -> bool:
    """Whether answers may be made natively.

    Args:
        log: notes answers.
    """
    takes_lines = isinstance(log, AccessLog) and log.takes_lines
    return not Cors(config).looks_at_requests and (takes_lines or isinstance(log, NoLog))


def lines_of(log: object) -> AccessLog | None:
    """What notes answers whose lines native code makes."""
    return log if isinstance(log, AccessLog) else None


def options_of(connections: Connections) -> dict[str, Any]:
    """What native code has of a listener's limits."""
    limits, compression = connections.limits, connections.compression
    return {
        "head_size_max": limits.head_size_max, "line_size_max": limits.line_size_max,
        "header_count_max": limits.header_count_max, "body_size_max": min(QUICK_SIZE_MAX, limits.body_size_max),
        "takes_ids": connections.heads.takes_ids, "json_size_max": QUICK_SIZE_MAX,
        "coded_size_min": 0 if compression is None else max(1, compression.size_min),
    }  # fmt: skip


Path = tuple[str, dict[str, Any], Callable[..., Any]]


def paths_of(entry: JsonObject, route: Route, connections: Connections, log: AccessLog | None) -> Iterator[Path]:
    """Of a model: each path, what native code is told of it, and who reads its requests in Python."""
    if entry["size"] > QUICK_SIZE_MAX:
        return
    name, version, is_default = entry["name"], entry["version"], entry["is_default"]
    model = FastModel(route, connections.answers, connections.compression)
    predictions = f"/predictions/{name}" + ("" if is_default else f"/{version}")
    infer = f"/v2/models/{name}/" + ("infer" if is_default else f"versions/{version}/infer")
    for path, form_of, row_of in (
        (predictions, model.predictions, route.row_of), (infer, model.infer, route.infer.row_of),
    ):  # fmt: skip
        told = {
            "describes_items": path == infer, "form_of": form_of,
            "log_head": log.line_head("POST", path, 200) if log is not None else "",
            "kind": entry["kind"], "shape": entry["shape"], "takes_json": entry["takes_json"],
        }  # fmt: skip
        yield path, told, row_of
