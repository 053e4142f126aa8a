"""Triton's model configuration extension: what its clients read of a model's ``config.pbtxt``, made of what is served.

Sizes of inputs and outputs are without the batch's where ``max_batch_size`` is above 0, as Triton has them.
"""

from __future__ import annotations

from pyserve.api.open_inference_models import model_metadata
from pyserve.errors import JsonObject
from pyserve.models.model import Model
from pyserve.request.datatypes import BYTES

_MICROSECONDS = 1000
_PICTURE_DIMS = {"dims": [1], "reshape": {"shape": []}}  # one element for each row


async def model_configuration(model: Model) -> JsonObject:
    """The configuration, in the JSON form of Triton's ``ModelConfig``.

    ``max_batch_size`` is the model's ``batchSize``; 0 for a handler of an archive's own, which gets requests as they
    are, and whose inputs and outputs are its own business. The first call for a native model runs it once.
    """
    about = await model_metadata(model, [])
    has_rows = model.built_in_handler is not None
    configuration: JsonObject = {
        "name": model.name,
        "platform": about["platform"],
        "backend": "pytorch" if has_rows else "python",
        "version_policy": {"all": {}},
        "max_batch_size": model.batch_size if has_rows else 0,
        "input": [_input(tensor) for tensor in about["inputs"]],
        "output": [_output(tensor) for tensor in about["outputs"]],
        "instance_group": [_instances(model)],
        "default_model_filename": model.archive.manifest.serialized_file or "",
        "parameters": {"lane": {"string_value": model.lane}, "archive": {"string_value": model.url}},
        "model_transaction_policy": {"decoupled": False},
    }
    yaml = model.archive.config
    if yaml.sequence_batching:
        idle_ms = yaml.sequence_idle_max_ms or 0
        configuration["sequence_batching"] = {
            "max_sequence_idle_microseconds": idle_ms * _MICROSECONDS, "direct": {},
        }  # fmt: skip
    elif has_rows and model.batch_size > 1:
        configuration["dynamic_batching"] = {
            "preferred_batch_size": [],
            "max_queue_delay_microseconds": model.max_batch_delay_ms * _MICROSECONDS,
        }
    return configuration


def _input(tensor: JsonObject) -> JsonObject:
    return {
        "name": tensor["name"], "data_type": _type(tensor["datatype"]), "format": "FORMAT_NONE", **_dims(tensor),
        "is_shape_tensor": False, "allow_ragged_batch": False, "optional": False,
    }  # fmt: skip


def _output(tensor: JsonObject) -> JsonObject:
    return {
        "name": tensor["name"], "data_type": _type(tensor["datatype"]), **_dims(tensor), "label_filename": "",
        "is_shape_tensor": False,
    }  # fmt: skip


def _dims(tensor: JsonObject) -> JsonObject:
    sizes = tensor["shape"][1:]
    return {"dims": sizes} if sizes else _PICTURE_DIMS


def _type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == BYTES else f"TYPE_{datatype}"


def _instances(model: Model) -> JsonObject:
    is_gpu = model.device_type == "gpu"
    numbers = {device.partition(":")[2] for device in model.native_devices} if is_gpu else set()
    return {
        "name": model.name, "kind": "KIND_GPU" if is_gpu else "KIND_CPU", "count": max(1, model.wanted_workers),
        "gpus": sorted(int(number) for number in numbers if number.isdigit()),
    }  # fmt: skip
