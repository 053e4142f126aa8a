"""What of an OpenAPI document is about the models that are served: how each is asked, with the shapes of its own.

Inputs are what ``input:`` in model-config.yaml says, outputs what the metadata of the Open Inference Protocol says, and
all else what the built-in handler takes and gives. Of an archive's own handler nothing is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pyserve.api import openapi_schemas as schemas
from pyserve.api.kserve_requests import names_of_inputs
from pyserve.api.open_inference_models import model_metadata, specs_of
from pyserve.api.openapi import ERRORS
from pyserve.api.openapi_schemas import ANYTHING, BYTES, JSON, OBJECT, TEXT, array, record, reference, table
from pyserve.errors import JsonObject
from pyserve.handlers.tensor_spec import TensorSpec
from pyserve.request.datatypes import datatype_of

if TYPE_CHECKING:
    from pyserve.models.model import Model

RAW = "application/octet-stream"
_PREDICT, _INFER = "/predictions/{model_name}", "/v2/models/{model_name}/infer"
# Numbers of an example; a larger one is left to the reader.
EXAMPLE_COUNT_MAX = 64
_PICTURES = frozenset({"image_classifier", "image_segmenter", "object_detector"})
_SCORES = frozenset({"image_classifier", "text_classifier"})
_SERVER_ERRORS = (500, 503, 504, 507)
_NUMBER: JsonObject = {"type": "number", "nullable": True, "description": "null stands for NaN and infinities."}
_BASE64: JsonObject = {"type": "string", "format": "byte"}


async def model_paths(model: Model, patterns: Iterable[str], *, asks: bool) -> JsonObject:
    """The Path Items of one model's default version, for a listener with these route patterns.

    Args:
        asks: whether a model that never told its outputs may be run once for that.
    """
    known = set(patterns) & {_PREDICT, _INFER}
    if not known:
        return {}
    outputs: list[JsonObject] = []
    if model.built_in_handler is None:
        pass  # what its handler answers is its own business
    elif asks or (model.network is not None and model.network.outputs is not None):
        outputs = (await model_metadata(model, []))["outputs"]
    specs = specs_of(model)
    paths: JsonObject = {}
    # A name may hold what a path's template, or its end, is made of.
    name = quote(model.name, safe="")
    if _PREDICT in known:
        answers = _answers(model, specs, outputs)
        predict = _operation(model, "predict", _about(model), _body(model, specs), answers)
        paths[_PREDICT.replace("{model_name}", name)] = {"post": predict}
    if _INFER in known and model.built_in_handler is not None:
        infer = _operation(
            model, "infer", f"Predicts with {model.name}; KServe's protocol, version 2.", _v2_body(model, specs),
            {JSON: {"schema": _v2_answer(outputs)}},
        )  # fmt: skip
        paths[_INFER.replace("{model_name}", name)] = {"post": infer}
    return paths


def _about(model: Model) -> str:
    kind = model.built_in_handler or "a handler of its own"
    return f"Predicts with {model.name}, version {model.version} ({kind}; {model.state})."


def _operation(model: Model, verb: str, about: str, body: JsonObject, content: JsonObject) -> JsonObject:
    schema = reference("V2Error" if verb == "infer" else "Error")
    error = {"headers": schemas.ANSWER_HEADERS, "content": {JSON: {"schema": schema}}}
    told = "The prediction."
    if model.built_in_handler in _PICTURES | _SCORES and verb == "predict":
        told = "The prediction; without a Content-Type header, as TorchServe sends it."
    return {
        "tags": [model.name],
        "operationId": f"{verb}_{model.name}",
        "description": about,
        "parameters": [schemas.REQUEST_ID, *schemas.TIME_HEADERS],
        "requestBody": {"required": True, "content": body},
        "responses": {
            "200": {"description": told, "headers": schemas.TIMED_HEADERS, **({"content": content} if content else {})},
            **{str(status): {"description": ERRORS[status], **error} for status in _SERVER_ERRORS},
            "default": {"description": "What went wrong; its detail says how to fix it.", **error},
        },
        "security": [{}, {"key": []}],
    }  # fmt: skip


# --- requests ---------------------------------------------------------------------------------------------------------


def _body(model: Model, specs: list[TensorSpec] | None) -> JsonObject:
    kind = model.built_in_handler
    if specs:
        return _tensors_body(specs)
    if kind in _PICTURES:
        file = {"schema": {**BYTES, "description": "A picture file."}}
        encoded = {**_BASE64, "description": "A picture file in base64."}
        return {
            "image/*": file,
            JSON: {"schema": record(data=encoded)},
            "multipart/form-data": {"schema": record(data=BYTES)},
        }
    if kind == "text_classifier":
        text = {**TEXT, "example": "a text to be classified"}
        return {
            "text/plain": {"schema": text},
            JSON: {"schema": record(data=text)},
            "multipart/form-data": {"schema": record(data=TEXT)},
        }
    return schemas.INPUT


def _tensors_body(specs: Sequence[TensorSpec]) -> JsonObject:
    if len(specs) == 1:
        nested = {"schema": nested_schema(specs[0]), **_example(example_values(specs[0]))}
        form = record(data=BYTES)
    else:
        members = {spec.name: nested_schema(spec) for spec in specs}
        values = {spec.name: example_values(spec) for spec in specs}
        nested = {"schema": record(**members), **_example(values if None not in values.values() else None)}
        form = record(**{spec.name: BYTES for spec in specs})
    sizes = [f"{spec.fixed_size} bytes of little-endian {spec}" for spec in specs if -1 not in spec.shape]
    about = ", then ".join(sizes) if len(sizes) == len(specs) else f"Little-endian {', then '.join(map(str, specs))}"
    if len(specs) == 1:
        about += "; or a file of numpy.save with such numbers"
    return {
        JSON: nested,
        RAW: {"schema": {**BYTES, "description": f"{about}."}},
        "multipart/form-data": {"schema": form},
    }


def nested_schema(spec: TensorSpec) -> JsonObject:
    """Nested lists of numbers, as ``spec`` allows them."""
    schema = _number_schema(spec)
    for low, high in reversed(spec.sizes):
        schema = {**array(schema), "minItems": low, **({} if high is None else {"maxItems": high})}
    return {**schema, "description": f"{spec.name + ': ' if spec.name else ''}{spec}"}


def _number_schema(spec: TensorSpec) -> JsonObject:
    if spec.dtype == "bool":
        return {"type": "boolean"}
    schema: JsonObject = {"type": "number" if spec.torch_dtype.is_floating_point else "integer"}
    if spec.values:
        schema |= {"minimum": spec.values[0], "maximum": spec.values[1]}
    return schema


def example_values(spec: TensorSpec) -> Any:
    """Nested lists that ``spec`` allows; None if they would be long."""
    count = math.prod(size if size >= 0 else max(spec.sizes[axis][0], 1) for axis, size in enumerate(spec.shape))
    if count > EXAMPLE_COUNT_MAX:
        return None
    example = spec.example()[0]
    if example.numel() > EXAMPLE_COUNT_MAX:
        return None
    values = example.tolist()
    return _rounded(values) if spec.torch_dtype.is_floating_point and not spec.values else values


def _rounded(value: Any) -> Any:
    return [_rounded(each) for each in value] if isinstance(value, list) else round(value, 2)


def _example(value: Any) -> JsonObject:
    return {} if value is None else {"example": value}


def _v2_body(model: Model, specs: list[TensorSpec] | None) -> JsonObject:
    if not specs:
        tensor = record(
            name={**TEXT, "enum": ["input0"]}, shape=array({"type": "integer", "minimum": 1}),
            datatype={**TEXT, "enum": ["BYTES"]}, data=array(TEXT),
        )  # fmt: skip
        row = {"name": "input0", "shape": [1], "datatype": "BYTES", "data": ["base64 of a file, or text"]}
        return {JSON: {"schema": _v2_inputs(tensor, 1), "example": {"inputs": [row]}}}
    names, kinds = names_of_inputs(specs), [datatype_of(spec.torch_dtype) for spec in specs]
    tensor = record(
        name={**TEXT, "enum": names}, shape=array({"type": "integer", "minimum": 1}),
        datatype={**TEXT, "enum": sorted(set(kinds))}, data={"type": "array", "items": ANYTHING},
    )  # fmt: skip
    about = ", ".join(f"{name} {kind} [-1, {', '.join(map(str, spec.shape))}]"
                      for name, kind, spec in zip(names, kinds, specs, strict=True))  # fmt: skip
    values = [example_values(spec) for spec in specs]
    example: JsonObject | None = None
    if None not in values:
        rows = zip(names, kinds, specs, values, strict=True)
        example = {"inputs": [
            {"name": name, "shape": [1, *spec.example().shape[1:]], "datatype": kind, "data": [value]}
            for name, kind, spec, value in rows
        ]}  # fmt: skip
    return {JSON: {"schema": {**_v2_inputs(tensor, len(specs)), "description": about}, **_example(example)}}


def _v2_inputs(tensor: JsonObject, count: int) -> JsonObject:
    return record("id", id=TEXT, inputs={**array(tensor), "minItems": count, "maxItems": count})


# --- answers ----------------------------------------------------------------------------------------------------------


def _answers(model: Model, specs: list[TensorSpec] | None, outputs: list[JsonObject]) -> JsonObject:
    if specs:
        is_fixed = all(-1 not in spec.shape for spec in specs)
        return {JSON: {"schema": _output_schema(outputs, is_fixed=is_fixed)}, RAW: {"schema": BYTES}}
    if model.built_in_handler in _SCORES:
        return {JSON: {"schema": {**table(_NUMBER), "description": "The probability of each label."}}}
    if model.built_in_handler == "object_detector":
        return {JSON: {"schema": array(OBJECT)}}
    return {}  # of whatever type its handler says, or of none


def _output_schema(outputs: list[JsonObject], *, is_fixed: bool) -> JsonObject:
    """Of the JSON of one item's outputs, if there is one and it has no name; else anything."""
    if len(outputs) != 1 or not re.fullmatch(r"output\d*", outputs[0]["name"]):
        return ANYTHING
    kind = outputs[0]["datatype"]
    schema: JsonObject = {"BOOL": {"type": "boolean"}}.get(kind, _NUMBER if kind[:1] in "FB" else {"type": "integer"})
    for size in reversed(outputs[0]["shape"][1:]):
        schema = array(schema) | ({"minItems": size, "maxItems": size} if is_fixed else {})
    return schema


def _v2_answer(outputs: list[JsonObject]) -> JsonObject:
    names = [each["name"] for each in outputs]
    tensor = record(
        "parameters", "data", name={**TEXT, **({"enum": names} if names else {})}, shape=array({"type": "integer"}),
        datatype={**TEXT, **({"enum": sorted({each["datatype"] for each in outputs})} if names else {})},
        data={"type": "array", "items": ANYTHING}, parameters=OBJECT,
    )  # fmt: skip
    about = ", ".join(f"{each['name']} {each['datatype']} {each['shape']}" for each in outputs)
    return record(
        "id", "parameters", model_name=TEXT, model_version=TEXT, id=TEXT, parameters=OBJECT,
        outputs={**array(tensor), **({"description": about} if about else {})},
    )  # fmt: skip
