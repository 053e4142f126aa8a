"""The shapes of what goes over the wire, as JSON schemas in OpenAPI 3.0.1's dialect; see `openapi`."""

from __future__ import annotations

from typing import Any

from pyserve.api import parameters
from pyserve.archive.manifest import NAME_SIZE_MAX, SERVED_NAME_PATTERN
from pyserve.config.bounds import BOUNDS
from pyserve.errors import JsonObject
from pyserve.request.deadline import TIMEOUT_MAX_MS
from pyserve.request.messages import ASK_HEADER, TIMEOUT_HEADER

JSON = "application/json"


def record(*optional: str, **properties: JsonObject) -> JsonObject:
    """An object that has all ``properties`` but perhaps the ``optional`` ones, and perhaps others."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def array(items: JsonObject) -> JsonObject:
    """A list of ``items``."""
    return {"type": "array", "items": items}


def table(values: JsonObject) -> JsonObject:
    """An object of ``values`` under names that are not known beforehand."""
    return {"type": "object", "additionalProperties": values}


def _setting(name: str) -> JsonObject:
    return {"type": "integer", "minimum": BOUNDS[name].least, "maximum": BOUNDS[name].most}


TEXT: JsonObject = {"type": "string"}
COUNT: JsonObject = {"type": "integer", "minimum": 0}
FLAG: JsonObject = {"type": "boolean"}
BYTES: JsonObject = {"type": "string", "format": "binary"}
ANYTHING: JsonObject = {}
OBJECT: JsonObject = {"type": "object"}

# Named in each document as components; `reference` stands for them.
ERROR = record(
    "detail",
    code={"type": "integer", "minimum": 400, "maximum": 599},
    type={**TEXT, "description": "TorchServe's exception class."},
    message=TEXT,
    detail={
        **OBJECT, "description": "The cause: reason, exception, text, where, fix, request_id. Left out under strict.",
    },
)  # fmt: skip
_WARNING = {**TEXT, "description": "What of the change, which is made, could not be written down, and why."}
STATUS = record("warning", status=TEXT, warning=_WARNING)
_WORKER = record(
    id=TEXT, startTime={**TEXT, "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$"},
    status={**TEXT, "enum": ["READY", "UNLOADING"]}, memoryUsage=COUNT, pid={"type": "integer", "minimum": -1},
    gpu=FLAG, gpuUsage=TEXT,
)  # fmt: skip
MODEL = record(
    "deviceIds", "customizedMetadata", "error", "batchSizeHistogram", "meanQueueMs", "stuckWorkers", "devices",
    "batchCeiling", "stagingNote", "modelDir", "isScaling",
    modelName=TEXT, modelVersion=TEXT, modelUrl=TEXT, runtime=TEXT, minWorkers=_setting("workers_min"),
    maxWorkers=_setting("workers_max"), batchSize=_setting("batch_size"), maxBatchDelay=_setting("max_batch_delay_ms"),
    responseTimeout=_setting("response_timeout_s"), startupTimeout=_setting("startup_timeout_s"),
    maxRetryTimeoutInSec=COUNT, clientTimeoutInMills=_setting("client_timeout_ms"),
    parallelType={**TEXT, "enum": ["", "pp", "tp", "pptp", "custom"]}, parallelLevel=COUNT,
    deviceType={**TEXT, "enum": ["cpu", "gpu"]}, deviceIds=array(COUNT), continuousBatching=FLAG, useJobTicket=FLAG,
    useVenv=FLAG, stateful=FLAG, sequenceMaxIdleMSec=COUNT, sequenceTimeoutMSec=COUNT, maxNumSequence=COUNT,
    maxSequenceJobQueueSize=COUNT, loadedAtStartup=FLAG, workers=array(_WORKER),
    jobQueueStatus=record(remainingCapacity=COUNT, pendingRequests=COUNT), customizedMetadata=OBJECT,
    lane={**TEXT, "enum": ["native", "python", ""]},
    state={**TEXT, "enum": ["LOADING", "READY", "FAILED", "DRAINING"]}, error=TEXT, device=TEXT, weightsShared=FLAG,
    copies=COUNT, weightsSize=COUNT, minBatch=_setting("min_batch"), precision=TEXT,
    checks={**OBJECT, "description": "What was found out about the model at load."},
    isScaling={**FLAG, "description": "Workers are being started or stopped, as was asked for."},
    modelDir={**TEXT, "description": "Folder with the archive's files, on the server's machine."},
    devices={**array(TEXT), "description": "Accelerators that a native model's workers run on."},
    batchCeiling={"type": "integer", "minimum": 1, "description": "Largest batch that fits the device's memory."},
    stagingNote={"type": "string", "description": "Why copies to the device are slower than they could be."},
    batchSizeHistogram=table(COUNT), meanQueueMs={"type": "number", "minimum": 0},
    stuckWorkers={"type": "integer", "minimum": 1},
)  # fmt: skip


def reference(name: str) -> JsonObject:
    """Stands for a member of COMPONENTS."""
    return {"$ref": f"#/components/schemas/{name}"}


SCALED = record(
    "changed", "unused", "warning", status=TEXT, unused=array(TEXT), warning=_WARNING,
    changed={**table(TEXT), "example": {"batch_size": "1 -> 8"}},
)  # fmt: skip
LISTED = record(
    "nextPageToken", nextPageToken={**TEXT, "pattern": "^[0-9]+$"},
    models=array(record(modelName=TEXT, modelUrl=TEXT)),
)  # fmt: skip
HEALTH = record(status={**TEXT, "enum": ["Healthy", "Unhealthy"]})
READINESS = record(
    "reason", "models", status={**TEXT, "enum": ["Ready", "NotReady"]}, reason=TEXT,
    models=table(record("error", state=TEXT, error=TEXT)),
)  # fmt: skip
DOCUMENT = record(openapi={**TEXT, "enum": ["3.0.1"]}, info=record(title=TEXT, version=TEXT), paths=OBJECT)
# KServe's protocols.
NAMES = record(models=array(TEXT))
KNOWN = record(name=TEXT, ready=FLAG)
SERVER = record(name=TEXT, version=TEXT, extensions=array(TEXT), extenstion=array(TEXT))
V2_ERROR = {
    **ERROR,
    "properties": {**ERROR["properties"], "error": {**TEXT, "description": "The message; not in what HTTP refuses."}},
}  # fmt: skip
_DATATYPE: JsonObject = {
    **TEXT,
    "enum": ["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64",
             "BF16", "BYTES"],
}  # fmt: skip
_SHAPE = array({"type": "integer", "minimum": -1})
_TENSOR_KIND = record(name=TEXT, datatype=_DATATYPE, shape=_SHAPE)
V2_MODEL = record(
    name=TEXT, versions=array(TEXT), platform=TEXT, inputs=array(_TENSOR_KIND), outputs=array(_TENSOR_KIND)
)
_TIME = record(count=COUNT, ns=COUNT)
V2_STATISTICS = record(model_stats=array(record(
    "alias_of", name=TEXT, version=TEXT, last_inference=COUNT, inference_count=COUNT, execution_count=COUNT,
    alias_of={**TEXT, "description": "The version whose row this is, under a whole number."},
    inference_stats=record(success=_TIME, fail=_TIME, queue=_TIME, compute_input=_TIME, compute_infer=_TIME,
                           compute_output=_TIME),
)))  # fmt: skip
V2_INDEX = array(record(name=TEXT, version=TEXT, state=TEXT, reason=TEXT))
V2_INDEX_REQUEST: JsonObject = {JSON: {"schema": record("ready", ready=FLAG)}}
GENERATE_REQUEST: JsonObject = {
    JSON: {"schema": record("id", "text_input", "parameters", id=TEXT, text_input=TEXT, parameters=OBJECT)}
}
GENERATED_EVENT = record(data={**TEXT, "description": "As of generate, or an object with the member error."})
GENERATED = record("id", "text_output", id=TEXT, model_name=TEXT, model_version=TEXT, text_output=TEXT)


def _control(parameters: JsonObject) -> JsonObject:
    """The body of a call that has these parameters and nothing else, not even a parameter."""
    members = {**OBJECT, "properties": parameters, "additionalProperties": False}
    return {JSON: {"schema": {**OBJECT, "properties": {"parameters": members}, "additionalProperties": False}}}


V2_LOAD, V2_UNLOAD = _control({}), _control({"unload_dependents": FLAG})
_DIMS = {"dims": _SHAPE, "reshape": record(shape=_SHAPE)}
V2_CONFIGURATION = record(
    "dynamic_batching", "sequence_batching",
    name=TEXT, platform=TEXT, backend=TEXT, version_policy=OBJECT, max_batch_size=COUNT,
    input=array(record("reshape", name=TEXT, data_type=TEXT, format=TEXT, **_DIMS, is_shape_tensor=FLAG,
                       allow_ragged_batch=FLAG, optional=FLAG)),
    output=array(record("reshape", name=TEXT, data_type=TEXT, **_DIMS, label_filename=TEXT, is_shape_tensor=FLAG)),
    instance_group=array(record(name=TEXT, kind=TEXT, count=COUNT, gpus=array(COUNT))), default_model_filename=TEXT,
    parameters=table(record(string_value=TEXT)), model_transaction_policy=record(decoupled=FLAG),
    dynamic_batching=record(preferred_batch_size=array(COUNT), max_queue_delay_microseconds=COUNT),
    sequence_batching=record(max_sequence_idle_microseconds=COUNT, direct=OBJECT),
)  # fmt: skip
_TENSOR = record(
    "data", "parameters", name=TEXT, shape=array(COUNT), datatype=_DATATYPE,
    data={"type": "array", "items": ANYTHING}, parameters=OBJECT,
)  # fmt: skip
V2_REQUEST: JsonObject = {
    JSON: {"schema": record(
        "id", "parameters", "outputs", id=TEXT, parameters=OBJECT, inputs=array(_TENSOR),
        outputs=array(record("parameters", name=TEXT, parameters=OBJECT)),
    )},
    "application/octet-stream": {"schema": {
        **BYTES, "description": "The JSON, as long as Inference-Header-Content-Length says, then the tensors' bytes.",
    }},
}  # fmt: skip

INPUT: JsonObject = {
    "*/*": {"schema": BYTES},
    JSON: {"schema": ANYTHING},
    "multipart/form-data": {"schema": table(BYTES)},
    "application/x-www-form-urlencoded": {"schema": table(TEXT)},
}
REGISTRATION: JsonObject = {
    JSON: {"schema": {
        "type": "object", "required": ["url"], "additionalProperties": False,
        "properties": {each.name: {**each.schema, "description": each.about} for each in parameters.REGISTER},
    }},
}  # fmt: skip


PATH_PARAMETERS: dict[str, JsonObject] = {
    "model_name": {
        "description": "As registered.",
        "schema": {"type": "string", "minLength": 1, "maxLength": NAME_SIZE_MAX, "pattern": SERVED_NAME_PATTERN},
    },
    "model_version": {
        "description": "As in the archive's manifest.",
        "schema": {"type": "string", "minLength": 1, "maxLength": NAME_SIZE_MAX, "pattern": SERVED_NAME_PATTERN},
    },
    "rest": {
        "description": "May hold slashes; the handler finds it in its url_path header.",
        "schema": {"type": "string", "pattern": r"^[^/\x00-\x1f\x7f]+$"},
    },
}


def header(name: str, about: str, schema: JsonObject) -> JsonObject:
    """A Parameter Object of a request header."""
    return {"in": "header", "name": name, "description": about, "schema": schema}


REQUEST_ID = header(
    "x-request-id", "Names the request in the answer, in the log and for its handler; made up if it is not valid.",
    {**TEXT, "example": "b9ddb6f6-8d7b-4ab0-9f3c-2d4f3c0a4a57"},
)  # fmt: skip
JSON_SIZE = header(
    "Inference-Header-Content-Length", "With tensors behind the JSON: how long the JSON is, in bytes.", TEXT
)
TIME_HEADERS = (
    header(TIMEOUT_HEADER, "How long the client waits, in ms: longer and the request never runs (503), or its result "
           "is dropped (504).", {"type": "integer", "minimum": 1, "maximum": TIMEOUT_MAX_MS}),
    header(ASK_HEADER, "1: the answer has a Server-Timing header.", {"type": "string", "enum": ["0", "1"]}),
    header("traceparent", "W3C Trace Context; one that is malformed is ignored.", TEXT),
)  # fmt: skip


COMPONENTS: dict[str, JsonObject] = {"Error": ERROR, "Status": STATUS, "Model": MODEL, "V2Error": V2_ERROR}


def _answer_header(about: str, schema: JsonObject) -> JsonObject:
    return {"description": about, "schema": schema}


ANSWER_HEADERS: JsonObject = {"x-request-id": _answer_header("The request's id.", TEXT)}
TIMED_HEADERS: JsonObject = {
    **ANSWER_HEADERS,
    "Server-Timing": _answer_header("Durations of the stages in ms, and why the batch was released.", TEXT),
}
LATER_HEADERS: JsonObject = {**ANSWER_HEADERS, "Retry-After": _answer_header("Seconds.", COUNT)}
KEY_SCHEMES: dict[str, Any] = {
    "key": {"type": "http", "scheme": "bearer", "description": "Of key_file.json, where this server asks for one."}
}
