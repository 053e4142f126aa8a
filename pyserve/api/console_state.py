"""``GET /console/state``: what the console shows, as one JSON object that the page asks for every other second.

    scope       ``inference`` or ``management``: whose port and key it is
    server      version, whether it is ready, and where the two APIs are
    counts      of all models, by state
    totals      of all requests of models so far
    models      ``rows`` of the page that was asked for, how many ``match`` the search
    model       one version in detail, if it was asked for
    errors, log of the management port only

Counters are cumulative: the page draws rates from the difference of two answers. On the inference port nothing is told
that ``/ready`` and ``/v2`` do not tell its clients anyway; histograms, queues, errors and logs are management's.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pyserve import __version__
from pyserve.api import parameters
from pyserve.api.console_model import full_detail, full_row, public_detail, public_row
from pyserve.api.parameters import Parameter
from pyserve.api.routes import RouteRow
from pyserve.config.address import Address
from pyserve.config.config import Config
from pyserve.config.model_source import list_store
from pyserve.errors import JsonObject, ModelNotFoundError, VersionNotFoundError
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Response
from pyserve.telemetry.metrics import Metrics
from pyserve.telemetry.recent import RecentErrors, RecentLog

if TYPE_CHECKING:  # imports torch, which takes seconds
    from pyserve.api.inference import Inference
    from pyserve.models.model import Model
    from pyserve.models.registry import Registry

STATE_PATH = "/console/state"
ROWS_MAX = 100
LINES_MAX = 200
FILES_MAX = 1000
PARAMETERS: tuple[Parameter, ...] = (
    parameters.integer("offset", "Models before the first one of the page.", 0, parameters.COUNT_MAX),
    parameters.integer("limit", "Models on the page.", 0, ROWS_MAX),
    parameters.plain_text("search", "A part of the name, in any case."),
    parameters.plain_text("state", "Only models in this state."),
    parameters.plain_text("model", "One model to be told in detail."),
    parameters.plain_text("version", "Of that model; by default its default version."),
    parameters.boolean("errors", "Whether to add the last errors; of the model, if one is named."),
    parameters.boolean("log", "Whether to add the last lines of the log; of the model, if one is named."),
    parameters.boolean("store", "Whether to add what of the model store is not loaded."),
)
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class ConsoleState:
    """The endpoint of one listener. Loop thread only.

    Args:
        is_management: whether all is told, or what the inference API tells.
        tells_errors: whether why something failed may be told in the words of an exception, and the log shown.
        serves_both: both APIs are on this port.
        asks_key: calls of an API on this port need a key.
    """

    def __init__(
        self, registry: Registry, metrics: Metrics, inference: Inference, config: Config, *, errors: RecentErrors,
        log: RecentLog | None, is_management: bool, serves_both: bool, tells_errors: bool, asks_key: bool,
    ):  # fmt: skip
        self._registry = registry
        self._metrics = metrics
        self._inference = inference
        self._config = config
        self._errors = errors
        self._log = log
        self._is_management = is_management
        self._tells_errors = tells_errors
        self._server: JsonObject = {
            "version": __version__,
            "serves_both": serves_both,
            "asks_key": asks_key,
            "inference": _place(config.inference_address),
            # Where this machine is managed is not for strangers.
            "management": _place(config.management_address) if is_management or tells_errors else None,
        }
        if is_management:
            self._server |= {"allows_model_api": config.allows_model_api, "tells_errors": tells_errors}

    def routes(self) -> list[RouteRow]:
        """The one row; its key is that of the API."""
        return [("GET", STATE_PATH, self.show)]

    async def show(self, exchange: Exchange) -> Response:
        """The state, as far as the query asks for it."""
        asked = parameters.read_values(exchange.request.params, PARAMETERS)
        models = self._registry.all_models()
        told: JsonObject = {
            "scope": "management" if self._is_management else "inference",
            "at": round(time.time() * 1000),
            "server": {**self._server, "ready": self._inference.is_ready},
            "counts": dict(Counter(model.state for model in models) + Counter(FAILED=len(self._registry.failures))),
            "totals": self._metrics.answered_totals(),
            "models": self._page(models, asked),
        }
        if "model" in asked:
            told["model"] = self._detail(asked["model"], asked.get("version"))
        if self._is_management:
            if asked.get("errors"):
                told["errors"] = self._errors_of(asked.get("model", ""))
            if asked.get("log") and self._log is not None and self._tells_errors:
                told["log"] = [line._asdict() for line in self._log.lines(asked.get("model", ""))[-LINES_MAX:]]
            if asked.get("store"):
                files = await asyncio.to_thread(list_store, self._config.model_store)
                loaded = {model.url for model in models}
                told["store"] = [file for file in files if file not in loaded][:FILES_MAX]
        return Response(200, compact(told), content_type="application/json", headers=dict(_HEADERS))

    def _page(self, models: Iterable[Model], asked: dict[str, Any]) -> JsonObject:
        search, state = asked.get("search", "").lower(), asked.get("state", "")
        found = [model for model in models if search in model.name.lower() and (not state or model.state == state)]
        failures = [
            failure for failure in self._registry.failures
            if search in failure.name.lower() and state in ("", "FAILED")
        ]  # fmt: skip
        start = asked.get("offset", 0)
        end = start + asked.get("limit", ROWS_MAX)
        rows = [self._row(model) for model in found[start:end]]
        for failure in failures[max(0, start - len(found)) : max(0, end - len(found))]:
            error = failure.error if self._tells_errors else ""
            rows.append({"name": failure.name, "version": failure.version, "state": "FAILED", "reason": error,
                         "never_loaded": True})  # fmt: skip
        return {"offset": start, "match": len(found) + len(failures), "rows": rows}

    def _row(self, model: Model) -> JsonObject:
        is_default = self._registry.default_version(model.name) == model.version
        row = public_row(model, self._metrics, is_default=is_default, tells_errors=self._tells_errors)
        row["version_count"] = len(self._registry.versions(model.name))
        return row | full_row(model) if self._is_management else row

    def _detail(self, name: str, version: str | None) -> JsonObject | None:
        """None if there is no such model any more: the page says so, and continues."""
        try:
            model = self._registry.get(name, version)
        except (ModelNotFoundError, VersionNotFoundError):
            return None
        detail = self._row(model) | public_detail(model)
        detail["versions"] = [each.version for each in self._registry.versions(name)]
        if self._is_management:
            detail |= full_detail(model, self._metrics, tells_errors=self._tells_errors)
        return detail

    def _errors_of(self, model: str) -> list[JsonObject]:
        rows = []
        for error in self._errors.newest(model):
            row = error._asdict()
            if not self._tells_errors:
                row["detail"] = {}
            elif self._log is not None and error.status >= 500:
                row["log"] = self._log.about_request(error.model, error.request_id)
            rows.append(row)
        return rows


def compact(told: JsonObject) -> bytes:
    """As JSON without blanks; numbers that are none become null, which browsers can read."""
    try:
        text = json.dumps(told, separators=(",", ":"), allow_nan=False)
    except ValueError:
        text = json.dumps(_without_nan(told), separators=(",", ":"))
    return text.encode()


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    return [_without_nan(each) for each in value] if isinstance(value, list | tuple) else value


def _place(address: Address) -> JsonObject | None:
    """Where a browser finds an API: without a host if it is the one that the page came from; None for unix sockets."""
    if address.is_unix:
        return None
    host = "" if address.host in ("0.0.0.0", "::") else f"[{address.host}]" if ":" in address.host else address.host
    return {"scheme": "https" if address.is_tls else "http", "host": host, "port": address.port}
