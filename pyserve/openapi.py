"""The server's OpenAPI 3.0.1 documents: what each listener and each model can be asked.

A document lists the operations whose pattern the listener really has, and management parameters come from the tables
that requests are read with, so neither can promise what does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from pyserve import __version__, parameters
from pyserve.errors import JsonObject
from pyserve.parameters import Parameter

TITLE = "TorchServe APIs"  # what TorchServe's clients look for
_JSON = "application/json"
_ERRORS = {
    400: "A parameter or the input cannot be used; the message says which and why.",
    403: "Refused.",
    404: "There is no such model or version.",
    405: "This listener does not do that.",
    409: "This version of the model is registered already.",
    500: "The model cannot be loaded or failed.",
    503: "The model cannot take the request now; detail.reason says why.",
    504: "The model ran past its time limit.",
}


class Operation(NamedTuple):
    """One operation of a document.

    Attributes:
        method: lower case.
        pattern: as in the routes.
        id: operationId.
        about: one sentence.
        answers: status to (sentence, media type, schema).
        errors: statuses answered with the error body.
        query: parameters of the query.
        body: media type to schema of the request body.
    """

    method: str
    pattern: str
    id: str
    about: str
    answers: dict[int, tuple[str, str, JsonObject]]
    errors: tuple[int, ...] = ()
    query: Iterable[Parameter] = ()
    body: JsonObject | None = None


def _object(**properties: JsonObject) -> JsonObject:
    return {"type": "object", "properties": properties}


def _array(items: JsonObject) -> JsonObject:
    return {"type": "array", "items": items}


_TEXT: JsonObject = {"type": "string"}
_COUNT: JsonObject = {"type": "integer"}
_FLAG: JsonObject = {"type": "boolean"}
_BYTES: JsonObject = {"type": "string", "format": "binary"}
_ANYTHING: JsonObject = {}
_ERROR = _object(code=_COUNT, type=_TEXT, message=_TEXT, detail={"type": "object"})
_STATUS = _object(status=_TEXT)
_SCALED = _object(
    status=_TEXT,
    changed={"type": "object", "additionalProperties": _TEXT, "example": {"batch_size": "1 -> 8"}},
    unused=_array(_TEXT),
)
_LISTED = _object(nextPageToken=_TEXT, models=_array(_object(modelName=_TEXT, modelUrl=_TEXT)))
_WORKER = _object(
    id=_TEXT, startTime=_TEXT, status={"type": "string", "enum": ["READY", "UNLOADING"]}, memoryUsage=_COUNT,
    pid=_COUNT, gpu=_FLAG, gpuUsage=_TEXT,
)  # fmt: skip
_DESCRIBED = _array(_object(
    modelName=_TEXT, modelVersion=_TEXT, modelUrl=_TEXT, runtime=_TEXT, minWorkers=_COUNT, maxWorkers=_COUNT,
    batchSize=_COUNT, maxBatchDelay=_COUNT, responseTimeout=_COUNT, startupTimeout=_COUNT,
    maxRetryTimeoutInSec=_COUNT, clientTimeoutInMills=_COUNT, parallelType=_TEXT, parallelLevel=_COUNT,
    deviceType=_TEXT, deviceIds=_array(_COUNT), continuousBatching=_FLAG, useJobTicket=_FLAG, useVenv=_FLAG,
    stateful=_FLAG, sequenceMaxIdleMSec=_COUNT, sequenceTimeoutMSec=_COUNT, maxNumSequence=_COUNT,
    maxSequenceJobQueueSize=_COUNT, loadedAtStartup=_FLAG, workers=_array(_WORKER),
    jobQueueStatus=_object(remainingCapacity=_COUNT, pendingRequests=_COUNT), customizedMetadata={"type": "object"},
    lane=_TEXT, state=_TEXT, error=_TEXT, device=_TEXT, weightsShared=_FLAG, copies=_COUNT, weightsSize=_COUNT,
    minBatch=_COUNT, precision=_TEXT, batchSizeHistogram={"type": "object", "additionalProperties": _COUNT},
    meanQueueMs={"type": "number"},
))  # fmt: skip
_INPUT: JsonObject = {
    "*/*": {"schema": _BYTES},
    _JSON: {"schema": _ANYTHING},
    "multipart/form-data": {"schema": {"type": "object", "additionalProperties": _BYTES}},
    "application/x-www-form-urlencoded": {"schema": {"type": "object", "additionalProperties": _TEXT}},
}
_REGISTRATION: JsonObject = {
    _JSON: {"schema": _object(**{each.name: each.schema for each in parameters.REGISTER})}
}  # fmt: skip

_PREDICTED = {200: ("What the handler returned; its content type is the handler's.", "*/*", _ANYTHING)}
_PREDICT_ERRORS = (400, 404, 503, 504)
_DOCUMENT = {200: ("An OpenAPI 3.0.1 document.", _JSON, {"type": "object"})}
_HEALTH = {
    200: ("Healthy.", _JSON, _STATUS),
    500: ("A model that was loaded at start has no ready worker.", _JSON, _STATUS),
}
_READY = {
    200: ("Every model can answer.", _JSON, _STATUS),
    503: ("Not every model can; with the reason for each that cannot.", _JSON, _object(
        status=_TEXT, reason=_TEXT,
        models={"type": "object", "additionalProperties": _object(state=_TEXT, error=_TEXT)},
    )),
}  # fmt: skip
_LIVE = {200: ("The server runs.", _JSON, _STATUS)}
_METRICS = {200: ("Prometheus' text format, version 0.0.4.", "text/plain; version=0.0.4; charset=utf-8", _TEXT)}
_NAMES = Parameter("name[]", str, "", "Names of samples to answer; all by default.", _array(_TEXT))

_ABOUT_THE_API = (
    Operation("options", "/", "apiDescription", "Describes this API.", _DOCUMENT),
    Operation("get", "/api-description", "api-description", "Describes this API; the older form.", _DOCUMENT),
)
_SCRAPE = Operation("get", "/metrics", "metrics", "Gives the metrics.", _METRICS, query=(_NAMES,))


def _prediction(pattern: str, operation_id: str, about: str) -> Operation:
    return Operation("post", pattern, operation_id, about, _PREDICTED, _PREDICT_ERRORS, body=_INPUT)


_INFERENCE = (
    *_ABOUT_THE_API,
    Operation("get", "/ping", "ping", "Tells the health of the server.", _HEALTH),
    Operation("get", "/ready", "ready", "Tells whether every model can answer.", _READY),
    Operation("get", "/live", "live", "Tells that the server runs.", _LIVE),
    _prediction("/predictions/{model_name}", "predictions", "Predicts with the default version."),
    _prediction("/predictions/{model_name}/{model_version}", "version_predictions", "Predicts with that version."),
    _prediction("/explanations/{model_name}", "explanations", "Explains what the default version predicts."),
    _prediction("/explanations/{model_name}/{model_version}", "version_explanations",
                "Explains what that version predicts."),
    _prediction("/v1/models/{model_name}:predict", "kserve_v1_predictions", "Predicts; KServe's protocol, version 1."),
    _prediction("/v1/models/{model_name}:explain", "kserve_v1_explanations", "Explains; KServe's protocol, version 1."),
    _prediction("/v2/models/{model_name}/infer", "kserve_v2_predictions", "Predicts; KServe's protocol, version 2."),
    _prediction("/v2/models/{model_name}/explain", "kserve_v2_explanations", "Explains; KServe's protocol, version 2."),
    _prediction("/models/{model_name}/invoke", "invoke", "Predicts; the query's parameters are inputs. SageMaker's."),
    Operation("post", "/invocations", "invocations", "Predicts with the model that is named, or the only one.",
              _PREDICTED, _PREDICT_ERRORS, query=parameters.INVOKE, body=_INPUT),
    _SCRAPE,
)


def _versions(method: str, operation_id: str, about: str, **rest: Any) -> tuple[Operation, Operation]:
    """The same operation for the default version and for one in the path."""
    return (
        Operation(method, "/models/{model_name}", operation_id, about, **rest),
        Operation(method, "/models/{model_name}/{model_version}", f"version_{operation_id}", about, **rest),
    )


_MANAGE_MODEL = (
    *_versions(
        "get", "describeModel", "Describes the default version; the version 'all' stands for every one.",
        answers={200: ("One object for each version.", _JSON, _DESCRIBED)}, errors=(400, 404),
        query=parameters.DESCRIBE,
    ),
    *_versions(
        "put", "setAutoScale", "Changes the number of workers, and settings, while the model serves.",
        answers={
            200: ("Done.", _JSON, _SCALED),
            202: ("Under way.", _JSON, _SCALED),
            206: ("Fewer workers run than were asked for.", _JSON, _SCALED),
        },
        errors=(400, 403, 404, 500), query=parameters.SCALE,
    ),
    *_versions(
        "delete", "unregisterModel", "Finishes the requests the model has, then removes it.",
        answers={200: ("Removed.", _JSON, _STATUS)}, errors=(400, 403, 404, 405), query=parameters.UNREGISTER,
    ),
    Operation("put", "/models/{model_name}/{model_version}/set-default", "setDefault", "Makes it the default version.",
              {200: ("Done.", _JSON, _STATUS)}, (403, 404)),
)  # fmt: skip
_MANAGEMENT = (
    *_ABOUT_THE_API,
    Operation("get", "/models", "listModels", "Lists the default versions by name.",
              {200: ("One page.", _JSON, _LISTED)}, (400,), query=parameters.LIST),
    Operation("post", "/models", "registerModel", "Loads an archive. Parameters come in the query or as a JSON body.",
              {200: ("Registered.", _JSON, _STATUS), 202: ("Under way.", _JSON, _STATUS)},
              (400, 403, 404, 405, 409, 500), query=parameters.REGISTER, body=_REGISTRATION),
    *_MANAGE_MODEL,
    Operation("get", "/v1/models/{model_name}", "modelReady", "Whether the model is ready; KServe's protocol.",
              {200: ("Known.", _JSON, _object(name=_TEXT, ready=_FLAG))}, (404,)),
    _SCRAPE,
)  # fmt: skip


def inference_api(patterns: Iterable[str]) -> JsonObject:
    """The inference listener's document: the operations whose pattern is among ``patterns``, its routes'."""
    return _document(TITLE, __version__, _among(patterns, _INFERENCE))


def management_api(patterns: Iterable[str]) -> JsonObject:
    """The management listener's document: the operations whose pattern is among ``patterns``, its routes'."""
    return _document(TITLE, __version__, _among(patterns, _MANAGEMENT))


def metrics_api() -> JsonObject:
    """The metrics listener's document."""
    return _document(TITLE, __version__, [*_ABOUT_THE_API, _SCRAPE])


def model_api(name: str, patterns: Iterable[str]) -> JsonObject:
    """How to ask model ``name`` for predictions on a listener with the routes ``patterns``."""
    operations = [each for each in _among(patterns, _INFERENCE) if "{model_name}" in each.pattern]
    return _document(f"RESTful API for: {name}", "1.0.0", _for_model(operations, name))


def model_management_api(name: str) -> JsonObject:
    """How to manage model ``name``."""
    return _document(f"RESTful Management API for: {name}", "1.0.0", _for_model(_MANAGE_MODEL, name))


def _among(patterns: Iterable[str], operations: Iterable[Operation]) -> list[Operation]:
    """The operations whose pattern is one of ``patterns``, whatever the parameters are called there."""
    shapes = {_shape(pattern) for pattern in patterns}
    return [each for each in operations if _shape(each.pattern) in shapes]


def _shape(pattern: str) -> str:
    return re.sub(r"\{[^}]*\}", "{}", pattern)


def _for_model(operations: Iterable[Operation], name: str) -> list[Operation]:
    return [each._replace(pattern=each.pattern.replace("{model_name}", name)) for each in operations]


def _document(title: str, version: str, operations: Iterable[Operation]) -> JsonObject:
    paths: JsonObject = {}
    for operation in operations:
        paths.setdefault(operation.pattern, {})[operation.method] = _operation(operation)
    return {"openapi": "3.0.1", "info": {"title": title, "version": version}, "paths": paths}


def _operation(operation: Operation) -> JsonObject:
    """An Operation Object, OpenAPI 3.0.1 section 4.7.10."""
    in_path = [name for name in ("model_name", "model_version") if f"{{{name}}}" in operation.pattern]
    described: JsonObject = {"description": operation.about, "operationId": operation.id}
    rows = [{"in": "path", "name": name, "required": True, "schema": _TEXT} for name in in_path]
    rows += [
        {"in": "query", "name": each.name, "description": each.about, "schema": each.schema}
        for each in operation.query
    ]
    if rows:
        described["parameters"] = rows
    if operation.body is not None:
        described["requestBody"] = {"content": operation.body}
    answers = {
        str(status): {"description": about, "content": {media_type: {"schema": schema}}}
        for status, (about, media_type, schema) in operation.answers.items()
    }
    for status in operation.errors:
        answers.setdefault(str(status), {"description": _ERRORS[status], "content": {_JSON: {"schema": _ERROR}}})
    described["responses"] = answers
    return described
