"""The server's OpenAPI 3.0.1 documents: what each listener and each model can be asked.

A document lists the operations whose pattern the listener really has, and management parameters come from the tables
that requests are read with, so neither can promise what does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from pyserve import __version__
from pyserve.api import openapi_schemas as schemas
from pyserve.api import parameters
from pyserve.api.openapi_schemas import ANYTHING, FLAG, JSON, TEXT, array, record, reference
from pyserve.api.parameters import Parameter
from pyserve.errors import JsonObject

TITLE = "TorchServe APIs"  # what TorchServe's clients look for
ERRORS = {
    400: "A parameter, a header or the input cannot be used; the message says which and why.",
    401: "A key is needed, and this is none.",
    403: "Refused.",
    404: "There is no such model or version.",
    405: "This listener does not do that.",
    408: "It is still draining, and continues to.",
    409: "This version of the model is registered already, or another call is changing it.",
    413: "The body or the form is too large; the message names the limit.",
    415: "The body is of a kind that is not taken.",
    429: "The queue of the model is full, where queue_full_status says 429.",
    500: "The model cannot be loaded or failed.",
    503: "The model cannot take the request now, or its handler failed; detail says why.",
    504: "The model ran past its time limit, or the client's.",
    507: "Out of memory.",
}
_HTTP_ERRORS = "What HTTP itself refuses: 400, 408, 411, 413, 414, 415, 417, 431, 501, 503, 505."


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
        headers: Parameter Objects of request headers.
        may_set_status: the handler may answer with any status and body.
        is_open: no key is ever needed.
        is_old: kept for old clients.
    """

    method: str
    pattern: str
    id: str
    about: str
    answers: dict[int, tuple[str, str, JsonObject]]
    errors: tuple[int, ...] = ()
    query: Iterable[Parameter] = ()
    body: JsonObject | None = None
    headers: tuple[JsonObject, ...] = (schemas.REQUEST_ID,)
    may_set_status: bool = False
    is_open: bool = False
    is_old: bool = False


_STATUS = reference("Status")
# Any content, and none of a type that could be named: it is the handler's, which need not say one.
_UNSAID = ""
_PREDICTED = {200: ("What the handler returned, with the content type that it sets, or none.", _UNSAID, ANYTHING)}
_PREDICT_ERRORS = (400, 401, 404, 409, 413, 415, 429, 500, 503, 504, 507)
_DOCUMENT = {200: ("An OpenAPI 3.0.1 document.", JSON, schemas.DOCUMENT)}
_HEALTH = {
    200: ("Healthy.", JSON, schemas.HEALTH),
    500: ("A model that should have workers has none that is ready.", JSON, schemas.HEALTH),
}
_READY = {
    200: ("Every model can answer.", JSON, schemas.READINESS),
    503: ("Not every model can; with the reason for each that cannot.", JSON, schemas.READINESS),
}
_LIVE = {200: ("The server runs.", JSON, record(status={**TEXT, "enum": ["Live"]}))}
_METRICS = {200: ("Prometheus' text format, version 0.0.4.", "text/plain; version=0.0.4; charset=utf-8", TEXT)}
_NAMES = Parameter("name[]", str, "", "Names of samples to answer; all by default.", array(TEXT))
_ROTATED = {200: ("The key is another one; key_file.json has it.", _UNSAID, ANYTHING)}
_SCOPE = Parameter("type", str, "", "Which key.", {**TEXT, "enum": ["management", "inference"]})

_ABOUT_THE_API = (
    Operation("options", "/", "apiDescription", "Describes this API.", _DOCUMENT, is_open=True),
    Operation("get", "/api-description", "api-description", "Describes this API; the older form.", _DOCUMENT,
              is_open=True, is_old=True),
)  # fmt: skip
_SCRAPE = Operation("get", "/metrics", "metrics", "Gives the metrics.", _METRICS, query=(_NAMES,), is_open=True)


def _prediction(pattern: str, operation_id: str, about: str, **rest: Any) -> Operation:
    headers = (schemas.REQUEST_ID, *schemas.TIME_HEADERS, *((schemas.JSON_SIZE,) if pattern.startswith("/v2/") else ()))
    return Operation(
        "post", pattern, operation_id, about, errors=_PREDICT_ERRORS,
        **{"body": schemas.INPUT, "headers": headers, "may_set_status": True, "answers": _PREDICTED, **rest},
    )  # fmt: skip


_KNOWN = {200: ("Known.", JSON, schemas.KNOWN)}
_V1 = (
    Operation("get", "/v1/models", "kserve_v1_models", "Names the models; KServe's protocol, version 1.",
              {200: ("Their names.", JSON, schemas.NAMES)}, (401,)),
    Operation("get", "/v1/models/{model_name}", "kserve_v1_model", "Whether it is ready; KServe's protocol, version 1.",
              _KNOWN, (401, 404)),
)  # fmt: skip


def _about_v2_model(prefix: str, model: str) -> tuple[Operation, ...]:
    """What there is to ask about a default version, or about the one in the path."""
    return (
        Operation("get", model, f"{prefix}model", "Names the model's inputs and outputs.",
                  {200: ("Its metadata.", JSON, schemas.V2_MODEL)}, (401, 404)),
        Operation("get", f"{model}/ready", f"{prefix}model_ready", "Whether it has a worker that is ready.",
                  {**_KNOWN, 503: ("It has none.", JSON, schemas.KNOWN)}, (401, 404)),
        Operation("get", f"{model}/stats", f"{prefix}model_stats", "Counts and times of its inferences.",
                  {200: ("Its statistics.", JSON, schemas.V2_STATISTICS)}, (401, 404)),
        Operation("get", f"{model}/config", f"{prefix}model_config", "The model's configuration, as Triton has it.",
                  {200: ("Its configuration.", JSON, schemas.V2_CONFIGURATION)}, (401, 404)),
    )  # fmt: skip


def _of_v2_model(prefix: str, model: str) -> tuple[Operation, ...]:
    """The operations that run it."""
    rest: dict[str, Any] = {"body": schemas.V2_REQUEST}
    return (
        _prediction(f"{model}/infer", f"{prefix}predictions", "Predicts; KServe's protocol, version 2.", **rest),
        _prediction(f"{model}/explain", f"{prefix}explanations", "Explains; KServe's protocol, version 2.", **rest),
        _prediction(f"{model}/generate", f"{prefix}generate", "Generates; Triton's.", body=schemas.GENERATE_REQUEST,
                    answers={200: ("What the model generated.", JSON, schemas.GENERATED)}),
        _prediction(f"{model}/generate_stream", f"{prefix}generate_stream",
                    "Generates, an event for each part; Triton's.",
                    body=schemas.GENERATE_REQUEST,
                    answers={200: ("Events, each with an object.", "text/event-stream", schemas.GENERATED_EVENT)}),
    )  # fmt: skip


def _control(verb: str, about: str, body: JsonObject, errors: tuple[int, ...]) -> Operation:
    return Operation(
        "post", f"/v2/repository/models/{{model_name}}/{verb}", f"triton_repository_{verb}", about,
        {200: ("Done.", _UNSAID, ANYTHING)}, (400, 401, 403, 404, 405, *errors), body=body,
    )  # fmt: skip


_V2_MODEL, _V2_VERSION = "/v2/models/{model_name}", "/v2/models/{model_name}/versions/{model_version}"
# What listeners of inference and of management have in common.
_ABOUT_V2 = (
    Operation("get", "/v2", "kserve_v2_server", "Names the server; KServe's protocol, version 2.",
              {200: ("Its metadata.", JSON, schemas.SERVER)}, is_open=True),
    Operation("get", "/v2/health/live", "kserve_v2_live", "Whether the server runs.",
              {200: ("It does.", JSON, record(live=FLAG))}, is_open=True),
    Operation("get", "/v2/health/ready", "kserve_v2_ready", "Whether every model can answer.",
              {200: ("It can.", JSON, record(ready=FLAG)), 503: _READY[503]}, is_open=True),
    Operation("get", "/v2/models/stats", "kserve_v2_stats", "Counts and times of all models' inferences.",
              {200: ("Their statistics.", JSON, schemas.V2_STATISTICS)}, (401,)),
    Operation("post", "/v2/repository/index", "triton_repository_index", "Names all models and their states; Triton's.",
              {200: ("The models.", JSON, schemas.V2_INDEX)}, (400, 401, 403, 413), body=schemas.V2_INDEX_REQUEST),
    *_about_v2_model("kserve_v2_", _V2_MODEL),
    *_about_v2_model("kserve_v2_version_", _V2_VERSION),
    _control("load", "Loads the archive of that name from the model store, or its new version.", schemas.V2_LOAD,
             (409, 500, 507)),
    _control("unload", "Finishes the requests of all versions of the model, then removes them.", schemas.V2_UNLOAD,
             (408, 409)),
)  # fmt: skip
_V2 = (*_ABOUT_V2, *_of_v2_model("kserve_v2_", _V2_MODEL), *_of_v2_model("kserve_v2_version_", _V2_VERSION))
_INFERENCE = (
    *_ABOUT_THE_API,
    Operation("get", "/ping", "ping", "The health of the server.", _HEALTH, is_open=True),
    Operation("get", "/ready", "ready", "Whether every model can answer.", _READY, is_open=True),
    Operation("get", "/live", "live", "Whether the server runs.", _LIVE, is_open=True),
    _prediction("/predictions/{model_name}", "predictions", "Predicts with the default version."),
    _prediction("/predictions/{model_name}/{model_version}", "version_predictions", "Predicts with that version."),
    _prediction("/predictions/{model_name}/{model_version}/{rest}", "path_predictions",
                "Predicts; the rest of the path is for the handler, as in v1/chat/completions."),
    _prediction("/explanations/{model_name}", "explanations", "Explains what the default version predicts."),
    _prediction("/explanations/{model_name}/{model_version}", "version_explanations",
                "Explains what that version predicts."),
    _prediction("/explanations/{model_name}/{model_version}/{rest}", "path_explanations",
                "Explains; the rest of the path is for the handler."),
    _prediction("/v1/models/{model_name}:predict", "kserve_v1_predictions", "Predicts; KServe's protocol, version 1."),
    _prediction("/v1/models/{model_name}:explain", "kserve_v1_explanations", "Explains; KServe's protocol, version 1."),
    *_V1,
    *_V2,
    _prediction("/models/{model_name}/invoke", "invoke", "Predicts; the query's parameters are inputs. SageMaker's."),
    _prediction("/invocations", "invocations", "Predicts with the model that is named, or the only one.",
                query=parameters.INVOKE),
    _prediction("/{model_name}/predict", "legacy_predictions", "Predicts; the query's parameters are inputs.",
                is_old=True),
    _prediction("/{model_name}/{model_version}/predict", "version_legacy_predictions",
                "Predicts; the query's parameters are inputs.", is_old=True),
    _SCRAPE,
)  # fmt: skip


def _versions(method: str, operation_id: str, about: str, **rest: Any) -> tuple[Operation, Operation]:
    """The same operation for the default version and for one in the path."""
    return (
        Operation(method, "/models/{model_name}", operation_id, about, **rest),
        Operation(method, "/models/{model_name}/{model_version}", f"version_{operation_id}", about, **rest),
    )


_MANAGE_MODEL = (
    *_versions(
        "get", "describeModel", "Describes the default version; the version 'all' stands for every one.",
        answers={200: ("One object for each version.", JSON, array(reference("Model")))},
        errors=(400, 401, 403, 404, 500, 503, 504), query=parameters.DESCRIBE,
    ),
    *_versions(
        "put", "setAutoScale", "Changes the number of workers, and settings, while the model serves.",
        answers={
            200: ("Done.", JSON, schemas.SCALED),
            202: ("Under way.", JSON, schemas.SCALED),
            206: ("Fewer workers run than were asked for.", JSON, schemas.SCALED),
        },
        errors=(400, 401, 403, 404, 409, 500, 507), query=parameters.SCALE,
    ),
    *_versions(
        "delete", "unregisterModel", "Finishes the requests the model has, then removes it.",
        answers={200: ("Removed.", JSON, _STATUS)}, errors=(400, 401, 403, 404, 405, 408, 409),
        query=parameters.UNREGISTER,
    ),
    Operation("put", "/models/{model_name}/{model_version}/set-default", "setDefault", "Makes it the default version.",
              {200: ("Done.", JSON, _STATUS)}, (400, 401, 403, 404, 409)),
)  # fmt: skip
_MANAGEMENT = (
    *_ABOUT_THE_API,
    Operation("get", "/models", "listModels", "Lists the default versions by name.",
              {200: ("One page.", JSON, schemas.LISTED)}, (400, 401, 403), query=parameters.LIST),
    Operation("post", "/models", "registerModel", "Loads an archive. Parameters come in the query or as a JSON body.",
              {200: ("Registered.", JSON, _STATUS), 202: ("Under way.", JSON, _STATUS)},
              (400, 401, 403, 404, 405, 409, 500, 507), query=parameters.REGISTER, body=schemas.REGISTRATION),
    *_MANAGE_MODEL,
    Operation("get", "/v1/models/{model_name}", "modelReady", "Whether the model is ready; KServe's protocol.",
              _KNOWN, (401, 403, 404)),
    *_ABOUT_V2,
    Operation("get", "/token", "rotateKey", "Replaces a key; needs the API key.", _ROTATED, (400, 401, 403),
              query=(_SCOPE,)),
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


def joined(documents: Iterable[JsonObject]) -> JsonObject:
    """One document of a listener that answers for several APIs: the first one's words, where two have a path."""
    first, *others = documents
    for other in others:
        for path, item in other["paths"].items():
            first["paths"][path] = {**item, **first["paths"].get(path, {})}
    return first


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
    return {
        "openapi": "3.0.1",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": schemas.COMPONENTS, "securitySchemes": schemas.KEY_SCHEMES},
    }


def _operation(operation: Operation) -> JsonObject:
    """An Operation Object, OpenAPI 3.0.1 section 4.7.10."""
    described: JsonObject = {"description": operation.about, "operationId": operation.id}
    if operation.is_old:
        described["deprecated"] = True
    rows = [
        {"in": "path", "name": name, "required": True, **schemas.PATH_PARAMETERS[name]}
        for name in re.findall(r"\{(\w+)\}", operation.pattern)
    ]
    rows += [
        {"in": "query", "name": each.name, "description": each.about, "schema": each.schema} for each in operation.query
    ]
    described["parameters"] = [*rows, *operation.headers]
    if operation.body is not None:
        described["requestBody"] = {"content": operation.body}
    described["responses"] = _answers(operation)
    if not operation.is_open:
        described["security"] = [{}, {"key": []}]  # a server without keys asks for none
    return described


def _answers(operation: Operation) -> JsonObject:
    """A Responses Object."""
    timed = operation.may_set_status
    answers = {
        str(status): _answer(about, media_type, schema, schemas.TIMED_HEADERS if timed else schemas.ANSWER_HEADERS)
        for status, (about, media_type, schema) in operation.answers.items()
    }
    error = reference("V2Error" if operation.pattern.startswith("/v2/") else "Error")
    for status in operation.errors:
        headers = schemas.LATER_HEADERS if status in (429, 503) else schemas.ANSWER_HEADERS
        answers.setdefault(str(status), _answer(ERRORS[status], JSON, error, headers))
    if operation.may_set_status:
        about = f"What the handler answers with its own status. {_HTTP_ERRORS}"
        answers["default"] = _answer(about, _UNSAID, ANYTHING, schemas.ANSWER_HEADERS)
    else:
        answers["default"] = _answer(_HTTP_ERRORS, JSON, reference("Error"), schemas.ANSWER_HEADERS)
    return answers


def _answer(about: str, media_type: str, schema: JsonObject, headers: JsonObject) -> JsonObject:
    content = {} if media_type == _UNSAID else {"content": {media_type: {"schema": schema}}}
    return {"description": about, "headers": headers, **content}
