"""The management API: list, describe, register, scale, set default, unregister.

Paths, parameters, texts and the order of JSON keys are TorchServe's. What is added stands in further keys, so that
clients that know TorchServe find all they know: ``changed`` and ``unused`` in the answer to a scale call, and the keys
behind ``jobQueueStatus`` in a description.

A call reads and checks all its parameters before it changes anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pyserve.api import openapi, parameters, strict_parameters
from pyserve.api.parameters import Parameter, json_pairs, read_values
from pyserve.api.strict_parameters import JavaError
from pyserve.config.config import Config
from pyserve.errors import (
    BadRequestError,
    CleanupTimeoutError,
    JsonObject,
    MethodNotAllowedError,
    ModelLoadError,
    ModelNotFoundError,
    OutOfMemoryError,
    ServeError,
    VersionNotFoundError,
    shown,
)
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request, Response, json_response
from pyserve.telemetry.gpu_usage import GpuUsage

if TYPE_CHECKING:  # both import torch, which takes seconds
    from pyserve.lanes.worker_rows import WorkerRow
    from pyserve.models.model import Model
    from pyserve.models.registry import Registry

log = logging.getLogger(__name__)

PAGE_SIZE_MAX = 100
RETRY_TIMEOUT_DEFAULT_S = 300
ALL_VERSIONS = "all"
SCALING = "Processing worker updates..."
PAGEABLE = ("the host refused page-locked memory, so that batches are copied through other memory, which is slower; "
            "raise its limit (ulimit -l) or lower batchSize")  # fmt: skip
_UNUSED_NAMES = ("number_gpu", "timeout")


class Management:
    """The endpoints. Loop thread only.

    Args:
        registry: the models.
        config: ``model_store``, ``enable_model_api``, ``compat`` and time limits are read.
        neighbours: patterns of what else the listener answers that belongs to this API, for its description.
    """

    def __init__(
        self, registry: Registry, config: Config, *, tells_errors: bool = True, neighbours: Iterable[str] = ()
    ):  # fmt: skip
        self._neighbours = frozenset(neighbours)
        self._tells_errors = tells_errors
        self._registry = registry
        self._config = config
        self._is_strict = config.compat == "strict"
        self._gpu_usage = GpuUsage()
        self._background: set[asyncio.Future[Any]] = set()

    def routes(self) -> list[tuple[str, str, Callable[..., Response | Coroutine[Any, Any, Response]]]]:
        """(methods, pattern, endpoint) for the router."""
        return [
            ("OPTIONS", "/", self.describe_api),
            ("*", "/api-description", self.describe_api),
            ("GET", "/models", self.list_models),
            ("POST", "/models", self.register_model),
            ("GET", "/models/{model_name}", self.describe_model),
            ("PUT", "/models/{model_name}", self.scale_model),
            ("DELETE", "/models/{model_name}", self.unregister_model),
            ("OPTIONS", "/models/{model_name}", self.describe_model_api),
            ("GET", "/models/{model_name}/{model_version}", self.describe_model),
            ("PUT", "/models/{model_name}/{model_version}", self.scale_model),
            ("DELETE", "/models/{model_name}/{model_version}", self.unregister_model),
            ("OPTIONS", "/models/{model_name}/{model_version}", self.describe_model_api),
            # Another method here is refused; in TorchServe DELETE would unregister the default version.
            ("PUT", "/models/{model_name}/{model_version}/set-default", self.set_default_version),
            ("GET", "/v1/models/{model_name}", self.show_readiness),
        ]

    # --- reading --------------------------------------------------------------------------------------------------

    def describe_api(self, exchange: Exchange) -> Response:
        """``OPTIONS /``."""
        return json_response(self.document())

    def document(self) -> JsonObject:
        """The API's OpenAPI document."""
        return openapi.management_api({pattern for _, pattern, _ in self.routes()} | self._neighbours)

    def describe_model_api(self, exchange: Exchange, model_name: str, model_version: str | None = None) -> Response:
        """``OPTIONS /models/{m}[/{v}]``."""
        self._registry.get(model_name, model_version)
        return json_response(openapi.model_management_api(model_name))

    def list_models(self, exchange: Exchange) -> Response:
        """``GET /models``: default versions, by name, in pages."""
        values = self._read(exchange.request, parameters.LIST)
        limit = values.get("limit", PAGE_SIZE_MAX)
        if not 0 <= limit <= PAGE_SIZE_MAX:
            limit = PAGE_SIZE_MAX
        models = self._registry.default_models()
        start = max(0, values.get("next_page_token", 0))
        end = start + limit
        page: JsonObject = {}
        if end <= len(models):  # TorchServe gives a token even when the page ends exactly at the end
            page["nextPageToken"] = str(end)
        page["models"] = [{"modelName": model.name, "modelUrl": model.url} for model in models[start:end]]
        return json_response(page)

    async def describe_model(self, exchange: Exchange, model_name: str, model_version: str | None = None) -> Response:
        """``GET /models/{m}[/{v}|/all]``: an array of one object per version."""
        values = self._read(exchange.request, parameters.DESCRIBE)
        if model_version == ALL_VERSIONS:
            versions = self._registry.versions(model_name)
            if not versions:
                raise ModelNotFoundError(f"Model not found: {model_name}")
            await self._gpu_usage.refresh({id_ for model in versions for id_ in gpu_ids(model)})
            return json_response([self._describe(model) for model in versions])
        model = self._registry.get(model_name, model_version)
        told = await model.describe_handler() if values.get("customized", False) else None
        await self._gpu_usage.refresh(gpu_ids(model))
        if told is None:
            return json_response([self._describe(model)])
        metadata = told.value if isinstance(told.value, dict) else {}
        response = json_response([self._describe(model, metadata)], told.status, told.headers)
        response.reason = told.reason or None
        return response

    def _describe(self, model: Model, metadata: JsonObject | None = None) -> JsonObject:
        return describe(model, metadata=metadata, tells_errors=self._tells_errors, gpu_usage=self._gpu_usage)

    def show_readiness(self, exchange: Exchange, model_name: str) -> Response:
        """``GET /v1/models/{m}``, KServe's protocol."""
        model = self._registry.get(model_name)
        return json_response({"name": model.name, "ready": any(row.status == "READY" for row in model.worker_rows())})

    # --- changing -------------------------------------------------------------------------------------------------

    async def register_model(self, exchange: Exchange) -> Response:
        """``POST /models``: loads an archive of the model store, or of a URL that is allowed."""
        self._check_model_api()
        values = self._read_registration(exchange.request)
        url = values.get("url")
        if url is None:
            raise BadRequestError("Parameter url is required.")
        if values.get("runtime") == "LSP":
            raise BadRequestError(
                "Invalid RuntimeType value: LSP",
                detail={"fix": "TorchScript archives run natively here with runtime=python or no runtime"},
            )
        # Without any workers named, a model starts with default_workers_per_model; 0 there leaves it to a PUT.
        workers = max(0, values.get("initial_workers", self._config.default_workers_per_model))
        arguments: dict[str, Any] = {
            "model_name": values.get("model_name"),
            "handler": values.get("handler"),
            "runtime": values.get("runtime"),
            "initial_workers": workers,
            "settings": _settings(values, parameters.SETTINGS),
        }
        waits = values.get("synchronous", True)
        model = await self._registry.register(url, waits=waits, **arguments)
        answer: JsonObject = {"status": _registered(model) if waits or not model.workers_min else SCALING}
        self._add_warning(answer)
        # Object stores read what KMS encrypted without being told; nothing else has such keys.
        if values.get("s3_sse_kms") and not (model.url.startswith("s3://") or self._is_strict):
            answer["unused"] = ["s3_sse_kms"]
        return json_response(answer, 200 if waits or not model.workers_min else 202)

    async def scale_model(self, exchange: Exchange, model_name: str, model_version: str | None = None) -> Response:
        """``PUT /models/{m}[/{v}]``: changes settings between two batches, and the number of workers."""
        values = self._read(exchange.request, parameters.SCALE)
        version = self._one_version(model_version, values.get("model_version"))
        model = self._registry.get(model_name, version)
        settings = _settings(values, parameters.LIVE_SETTINGS)
        workers = _wanted_workers(model, values, has_settings=bool(settings))
        answer: JsonObject = {"status": SCALING}
        changed: dict[str, tuple[int, int]] = {}
        if settings:
            with self._registry.changes.one():
                changed = model.configure(settings)
                await self._registry.changed()
            self._add_warning(answer)
            answer["changed"] = {name: f"{old} -> {new}" for name, (old, new) in changed.items()}
        unused = [name for name in _UNUSED_NAMES if name in values]
        if unused and not self._is_strict:
            answer["unused"] = unused
        if not values.get("synchronous", False):
            if workers is not None:
                self._watch(self._scale(model, workers, version, changed), f"scaling {model.name} {model.version}")
            return json_response(answer, 202)
        if workers is not None:
            running = await self._scale(model, workers, version, changed)
            self._add_warning(answer)
            if running < workers[0]:
                answer["status"] = "Workers scaling in progress..."
                return json_response(answer, 206)
        least = workers[0] if workers is not None else model.workers_min
        answer["status"] = f"Workers scaled to {least} for model: {model_name}"
        if version is not None:
            answer["status"] += f", version: {version}"
        return json_response(answer)

    async def set_default_version(self, exchange: Exchange, model_name: str, model_version: str) -> Response:
        """``PUT /models/{m}/{v}/set-default``."""
        self._read(exchange.request, parameters.NONE)
        try:
            await self._registry.set_default(model_name, model_version)
        except VersionNotFoundError as error:
            # Here, and only here, TorchServe's text has no colon after "version".
            text = f"Model version {model_version} does not exist for model {model_name}"
            raise VersionNotFoundError(text, detail=error.detail) from None
        text = f'Default version successfully updated for model "{model_name}" to "{model_version}"'
        return json_response(self._add_warning({"status": text}))

    async def unregister_model(self, exchange: Exchange, model_name: str, model_version: str | None = None) -> Response:
        """``DELETE /models/{m}[/{v}]``: returns when the requests it had are answered and it is gone."""
        self._check_model_api()
        self._read(exchange.request, parameters.UNREGISTER)
        removal = asyncio.ensure_future(self._registry.unregister(model_name, model_version))
        # It is not cancelled when its time is over: a model half gone would be worse than one that goes late.
        done, _ = await asyncio.wait({removal}, timeout=self._config.unregister_model_timeout)
        if not done:
            self._watch(removal, f"unregistering {shown(model_name)}")
            raise CleanupTimeoutError(f"Timed out while cleaning resources: {model_name}")
        removal.result()
        return json_response(self._add_warning({"status": f'Model "{model_name}" unregistered'}))

    def _add_warning(self, answer: JsonObject) -> JsonObject:
        """``answer``, with what of the change could not be written down. The change is made all the same."""
        if self._registry.not_kept and not self._is_strict:  # TorchServe logs it only
            answer["warning"] = self._registry.not_kept
        return answer

    # --- checks ---------------------------------------------------------------------------------------------------

    def _check_model_api(self) -> None:
        if not self._config.allows_model_api:
            detail = {"reason": "registering and unregistering are off here; start with --enable-model-api"}
            raise MethodNotAllowedError(detail=detail)

    def _read(self, request: Request, known: tuple[Parameter, ...]) -> dict[str, Any]:
        """Whatever carries the request: gRPC's calls come as queries too."""
        read = strict_parameters.read_values if self._is_strict else read_values
        return read(request.params, known)

    def _read_registration(self, request: Request) -> dict[str, Any]:
        """Of the JSON body, if there is one: the query is then not read, as in TorchServe."""
        is_json = request.content_type == "application/json"
        if self._is_strict:
            pairs = strict_parameters.json_pairs(request.body, parameters.REGISTER) if is_json else request.params
            # Within no time at all no worker is ready.
            return strict_parameters.read_values(pairs, parameters.REGISTER, zeros=("startup_timeout",))
        pairs = json_pairs(request.body) if is_json and request.body.strip() else request.params
        return read_values(pairs, parameters.REGISTER)

    def _one_version(self, in_path: str | None, in_query: str | None) -> str | None:
        if in_path is not None and in_query is not None and in_path != in_query and not self._is_strict:
            raise BadRequestError(
                f"The path names version {shown(in_path)}, model_version {shown(in_query)}; give one."
            )
        return in_path if in_path is not None else in_query

    async def _scale(
        self, model: Model, workers: tuple[int, int], version: str | None, changed: dict[str, tuple[int, int]]
    ) -> int:
        """Running workers when all that were asked for are ready or gone.

        Args:
            changed: settings of the same call, old and new; they are taken back when the workers cannot be had.
        """
        with self._registry.changes.one():
            return await self._scaled(model, workers, version, changed)

    async def _scaled(
        self, model: Model, workers: tuple[int, int], version: str | None, changed: dict[str, tuple[int, int]]
    ) -> int:
        await model.loaded()
        try:
            return await model.scale(*workers)
        except (ModelLoadError, OutOfMemoryError) as error:
            model.take_back(changed)
            text = f"Failed to start workers for model {model.name} version: {version or 'null'}"
            detail = error.detail if error.message == text else {"reason": error.message, **error.detail}
            raise type(error)(text, detail=detail) from error
        finally:
            await self._registry.changed()

    def _watch(self, future: Awaitable[Any], text: str) -> None:
        """Keeps a reference until ``future`` is done, and logs why it failed: nobody waits for it."""
        task = asyncio.ensure_future(future)
        self._background.add(task)

        def finish(done: asyncio.Future[Any]) -> None:
            self._background.discard(done)
            error = None if done.cancelled() else done.exception()
            if isinstance(error, ServeError):
                log.error("%s failed: %s", text, error.message)
            elif error is not None:
                log.error("%s failed", text, exc_info=error)

        task.add_done_callback(finish)


def gpu_ids(model: Model) -> set[int]:
    """GPUs that its workers run on, as torch counts them."""
    return {id_ for row in model.worker_rows() if (id_ := _gpu_id(model, row)) is not None}


def _gpu_id(model: Model, row: WorkerRow) -> int | None:
    if row.gpu_id is not None or not row.gpu:
        return row.gpu_id
    return int(model.device.partition(":")[2] or 0)


def describe(
    model: Model, *, metadata: JsonObject | None = None, tells_errors: bool = True,
    gpu_usage: GpuUsage | None = None,
) -> JsonObject:  # fmt: skip
    """One version as the management API shows it: TorchServe's keys in its order, then pyserve's own.

    Args:
        metadata: what the handler says of itself; None when it was not asked.
        gpu_usage: refreshed for this model's `gpu_ids`; None when nobody asked.
    """
    gpu_usage = gpu_usage or GpuUsage()
    yaml = model.archive.config
    retry_timeout_s = yaml.retry_timeout_max_s
    remaining, pending = model.queue_status()
    described: JsonObject = {
        "modelName": model.name,
        "modelVersion": model.version,
        "modelUrl": model.url,
        "runtime": model.runtime,
        "minWorkers": model.workers_min,
        "maxWorkers": model.workers_max,
        "batchSize": model.batch_size,
        "maxBatchDelay": model.max_batch_delay_ms,
        "responseTimeout": model.response_timeout_s,
        "startupTimeout": model.startup_timeout_s,
        "maxRetryTimeoutInSec": RETRY_TIMEOUT_DEFAULT_S if retry_timeout_s is None else retry_timeout_s,
        "clientTimeoutInMills": model.settings.client_timeout_ms,
        # Neither has an effect without the other.
        "parallelType": (yaml.parallel_level and yaml.parallel_type) or "",
        "parallelLevel": (yaml.parallel_type and yaml.parallel_level) or 0,
        "deviceType": model.device_type,
    }
    if model.device_ids and model.device_type == "gpu":
        described["deviceIds"] = model.device_ids
    has_sequences = bool(yaml.sequence_batching)
    described |= {
        "continuousBatching": bool(yaml.continuous_batching),
        "useJobTicket": bool(yaml.use_job_ticket),
        "useVenv": bool(yaml.use_venv),
        "stateful": has_sequences,
        "sequenceMaxIdleMSec": (has_sequences and yaml.sequence_idle_max_ms) or 0,
        "sequenceTimeoutMSec": (has_sequences and yaml.sequence_timeout_ms) or 0,
        "maxNumSequence": (has_sequences and yaml.sequence_count_max) or 0,
        "maxSequenceJobQueueSize": (has_sequences and yaml.sequence_queue_size) or 0,
        "loadedAtStartup": model.loaded_at_startup,
        "workers": [
            {
                "id": row.id,
                "startTime": _local_time(row.start_time),
                "status": row.status,
                "memoryUsage": row.memory_usage,
                "pid": row.pid,
                "gpu": row.gpu,
                "gpuUsage": gpu_usage.text(_gpu_id(model, row)),
            }
            for row in model.worker_rows()
        ],
        "jobQueueStatus": {"remainingCapacity": remaining, "pendingRequests": pending},
    }
    if metadata is not None:
        described["customizedMetadata"] = metadata
    return described | _own_description(model, tells_errors=tells_errors)


def _own_description(model: Model, *, tells_errors: bool) -> JsonObject:
    own: JsonObject = {"lane": model.lane, "state": model.state}
    if model.error:
        # The text may quote files and exceptions, which is not for everyone who can reach a public address.
        own["error"] = model.error if tells_errors else "it cannot be served; the server's log says why"
    own |= {
        "device": model.device,
        "weightsShared": model.lane == "native",
        "copies": model.copies,
        "weightsSize": model.weights_size,
        "minBatch": model.min_batch,
        "precision": model.precision,
        "checks": model.checks(),
    }
    if model.is_scaling:
        own["isScaling"] = True
    if tells_errors:
        own["modelDir"] = str(model.archive.served_dir)
    stats = model.stats()
    if model.native_devices:  # the rest of what is special there is among the checks
        own["devices"] = [*model.native_devices]
        if stats.get("batch_ceiling"):
            own["batchCeiling"] = stats["batch_ceiling"]
        if stats.get("pinned_refused"):
            own["stagingNote"] = PAGEABLE
    if "batch_size" in stats:
        bounds, counts, _ = stats["batch_size"]
        names = [*(f"{bound:g}" for bound in bounds), "more"]
        own["batchSizeHistogram"] = {name: count for name, count in zip(names, counts, strict=True) if count}
    if "queue" in stats:
        _, counts, total_s = stats["queue"]
        if sum(counts):
            own["meanQueueMs"] = round(total_s / sum(counts) * 1e3, 3)
    if stats.get("stuck"):
        own["stuckWorkers"] = stats["stuck"]
    return own


def _local_time(moment: datetime) -> str:
    """TorchServe's form: local time, with a Z that does not mean UTC."""
    local = moment.astimezone() if moment.tzinfo is not None else moment
    return f"{local:%Y-%m-%dT%H:%M:%S}.{local.microsecond // 1000:03d}Z"


def _settings(values: dict[str, Any], known: tuple[Parameter, ...]) -> dict[str, int]:
    return {each.name: values[each.name] for each in known if each.name in values}


def _wanted_workers(model: Model, values: dict[str, Any], *, has_settings: bool) -> tuple[int, int] | None:
    """(least, most), or None to leave them as they are.

    Without ``min_worker`` a call that changes settings keeps the number there is; any other means one, as in
    TorchServe.
    """
    if "min_worker" not in values and "max_worker" not in values and has_settings:
        return None
    default = model.workers_min if has_settings else 1
    least = values.get("min_worker", default)
    most = values.get("max_worker", least)
    if most < least:
        raise BadRequestError("max_worker cannot be less than min_worker.", detail={"min_worker": least})
    if least < 0:  # only of a strict reader; there all workers are ended before this is answered, here nothing changes
        raise JavaError("IndexOutOfBoundsException", "Index -1 out of bounds for length 0")
    return least, most


def _registered(model: Model) -> str:
    text = f'Model "{model.name}" Version: {model.version} registered with {model.workers_min} initial workers'
    if model.workers_min == 0:
        text += ". Use scale workers API to add workers for the model."
    return text
