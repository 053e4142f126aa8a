"""The Open Inference Protocol for the served models, whatever carries it: inference, metadata, readiness, statistics.

Built-in handlers do not know the protocol; the server speaks it for them, row by row, see `kserve_requests`. An
archive's own handler, or one in an envelope, gets the request as JSON and answers for itself, as in TorchServe.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch

from pyserve import __version__
from pyserve.api.kserve_requests import (
    HandlerRowsPending,
    OwnHandlerPending,
    TensorsPending,
    names_of_inputs,
)
from pyserve.api.open_inference import InferInput
from pyserve.api.raw_input import raw_element, raw_tensor
from pyserve.api.tensor_rows import TensorRowsPending
from pyserve.api.transport import Transport
from pyserve.archive.archive import Archive
from pyserve.errors import InputError, JsonObject, ServeError
from pyserve.handlers.outputs import named_outputs
from pyserve.handlers.tensor_spec import TensorSpec, dtype_name, input_specs, output_names
from pyserve.lanes.lane import Lane
from pyserve.lanes.native import NativeLane
from pyserve.lanes.network import Network
from pyserve.lanes.pending import Pending
from pyserve.models.model import EXPLAIN_HEADER, Model
from pyserve.request.datatypes import BYTES, datatype_of
from pyserve.request.exchange import Exchange
from pyserve.telemetry.metrics import Metrics

EXTENSIONS = ["binary_tensor_data", "generate", "model_configuration", "model_repository", "statistics"]
# Built-in handlers that bring their input to the network as it is, and its output back.
_TENSOR_HANDLERS = ("tensor", "base_handler")
_DESCRIBED: WeakKeyDictionary[Archive, tuple[list[TensorSpec], tuple[str, ...]]] = WeakKeyDictionary()
_NUMBER = re.compile(r"([0-9]{1,18})(?![0-9])")
_NO_TIME = {"count": 0, "ns": 0}


def infer(
    model: Model, exchange: Exchange, transport: Transport, url_version: str = "default", *, explains: bool = False
) -> None:
    """Sees to the answer of an inference request, through ``exchange.respond``: of ``transport.encode``, or an error.

    Loop thread only. ``exchange`` may be one that no HTTP request stands behind; its request's id, headers and time of
    arrival are used.

    Raises:
        ServeError: the model is not there.
    """

    def pending_for(lane: Lane) -> Pending:
        return _pending_for(model, lane, exchange, transport, url_version, explains=explains)

    def again(lane: Lane, copy: Exchange) -> Pending:
        return _pending_for(model, lane, copy, transport.of_copy(copy.request), url_version, explains=False)

    model.take(exchange, pending_for, explains=explains, repetition=transport.repetition(again))


def _pending_for(
    model: Model, lane: Lane, exchange: Exchange, transport: Transport, url_version: str, *, explains: bool
) -> Pending:
    added = [EXPLAIN_HEADER if explains else ("explain", "False")]
    if model.built_in_handler is None:
        return OwnHandlerPending(lane, exchange, model.version, url_version, transport=transport, headers=added)
    network = lane.network if isinstance(lane, NativeLane) else None
    if network is not None and model.built_in_handler in _TENSOR_HANDLERS:
        specs, outputs = _described(model.archive)
        return TensorsPending(
            lane, exchange, model.version, url_version, transport=transport, specs=specs, output_names=outputs
        )
    if model.built_in_handler == "tensor":
        specs, outputs = _described(model.archive)
        return TensorRowsPending(
            lane, exchange, model.version, url_version, transport=transport, headers=added, specs=specs,
            output_names=outputs,
        )  # fmt: skip
    pixels = _spec_of(network.example[0]) if network is not None else None
    return HandlerRowsPending(
        lane, exchange, model.version, url_version, transport=transport, headers=added, pixels=pixels
    )


def raw_input(model: Model) -> Callable[[memoryview], InferInput]:
    """How a body without JSON becomes the one input of ``model``, which has a built-in handler.

    Raises:
        InputError: it has several.
    """
    if model.built_in_handler not in _TENSOR_HANDLERS:
        return raw_element
    specs, _ = _described(model.archive)
    if len(specs) > 1:
        raise InputError(f"a body without JSON is one input, and the model has {len(specs)}; send the JSON")
    return partial(raw_tensor, specs[0])


def specs_of(model: Model) -> list[TensorSpec] | None:
    """The inputs that its built-in handler brings to the network as they are; None if it makes the input itself."""
    return _described(model.archive)[0] if model.built_in_handler in _TENSOR_HANDLERS else None


def _described(archive: Archive) -> tuple[list[TensorSpec], tuple[str, ...]]:
    """A model's inputs and the names of its outputs, as model-config.yaml has them; read once."""
    found = _DESCRIBED.get(archive)
    if found is None:
        found = _DESCRIBED[archive] = input_specs(archive.config.raw), output_names(archive.config.raw)
    return found


def _spec_of(example: torch.Tensor) -> TensorSpec:
    """Of a network whose handler makes its input: of the rank and kind of the example, of any size."""
    return TensorSpec(dtype_name(example.dtype), (-1,) * (example.dim() - 1))


def server_metadata() -> JsonObject:
    """Of ``/v2``: the standard's keys, and TorchServe's own, its spelling included."""
    return {
        "name": "pyserve",
        "version": __version__,
        "extensions": EXTENSIONS,
        "extenstion": ["kserve", "kubeflow"],
    }


async def model_metadata(model: Model, versions: list[str]) -> JsonObject:
    """Name, versions, platform, inputs and outputs. The first call for a native model runs it once, on an example."""
    about: JsonObject = {"name": model.name, "versions": versions, "platform": _platform(model)}
    network = model.network
    if model.built_in_handler is None:
        return about | {"inputs": [], "outputs": []}  # what its handler understands is its own business
    if network is None and model.built_in_handler == "tensor":
        # What it answers is known in its worker only.
        return about | {"inputs": _inputs(model), "outputs": []}
    if network is None or model.built_in_handler not in _TENSOR_HANDLERS:
        row = {"datatype": BYTES, "shape": [-1]}
        return about | {"inputs": [{"name": "input0", **row}], "outputs": [{"name": "output0", **row}]}
    if network.outputs is None:
        network.outputs = await asyncio.to_thread(_example_outputs, network)
    return about | {"inputs": _inputs(model), "outputs": network.outputs}


def _inputs(model: Model) -> list[JsonObject]:
    specs, _ = _described(model.archive)
    return [
        {"name": name, "datatype": datatype_of(spec.torch_dtype), "shape": [-1, *spec.shape]}
        for name, spec in zip(names_of_inputs(specs), specs, strict=True)
    ]


def _platform(model: Model) -> str:
    weights = model.archive.weights
    return "pytorch_aotinductor" if weights is not None and weights.suffix == ".pt2" else "pytorch_torchscript"


def _example_outputs(network: Network) -> list[JsonObject]:
    """The outputs for an example, as metadata; those that are None are not among them. Any thread."""
    try:
        outputs, names = named_outputs(network.run(network.example), output_names(network.context.model_yaml_config))
        return [
            {"name": name, "datatype": datatype_of(output.dtype), "shape": [-1, *output.shape[1:]]}
            for name, output in zip(names, outputs, strict=True)
        ]
    except (ServeError, RuntimeError, KeyError):
        return []  # of a kind that the protocol has no words for


def statistics(models: list[Model], metrics: Metrics, *, has_whole_numbers: bool = False) -> JsonObject:
    """What the statistics extension reports for each of ``models``.

    Args:
        has_whole_numbers: all versions of one model are asked for. Triton's versions are whole numbers, and
            perf_analyzer finds no others, so a version 1.0 has a second row, as 1.
    """
    rows = [_model_statistics(model, metrics) for model in models]
    if has_whole_numbers:
        versions = {row["version"] for row in rows}
        for row in list(rows):
            number = _NUMBER.match(row["version"])
            if number is not None and (whole := str(int(number[1]))) not in versions:
                versions.add(whole)
                rows.append({**row, "version": whole, "alias_of": row["version"]})
    return {"model_stats": rows}


def _model_statistics(model: Model, metrics: Metrics) -> JsonObject:
    stats = model.stats()
    succeeded, failed = metrics.request_totals(model.name, model.version)
    inferences = int(stats["batch_size"][2]) if "batch_size" in stats else succeeded["count"]
    finished_at = model.last_finished_at
    ago_s = (time.monotonic_ns() - finished_at) / 1e9 if finished_at else 0.0
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": int((time.time() - ago_s) * 1000) if finished_at else 0,
        "inference_count": inferences,
        "execution_count": int(stats.get("batches", 0)),
        "inference_stats": {
            "success": succeeded,
            "fail": failed,
            "queue": _time_of(stats, "queue"),
            **_compute_times(stats),
            "cache_hit": _NO_TIME,
            "cache_miss": _NO_TIME,
        },
        "response_stats": {},
        "batch_stats": [],
        "memory_usage": [],
    }


def _compute_times(stats: JsonObject) -> JsonObject:
    """Input, inference and output, all counted alike: perf_analyzer ends where they are not."""
    found = {"compute_input": "staging", "compute_infer": "inference", "compute_output": "postprocess"}
    times = {name: _time_of(stats, ours) for name, ours in found.items()}
    count = times["compute_infer"]["count"]
    return {name: {"count": count, "ns": time["ns"]} for name, time in times.items()}


def _time_of(stats: JsonObject, name: str) -> JsonObject:
    if name not in stats:
        return _NO_TIME
    _, counts, total_s = stats[name]
    return {"count": sum(counts), "ns": int(total_s * 1e9)}
