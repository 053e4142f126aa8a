"""The handler every other one starts from, with TorchServe's attributes and methods.

The server calls a handler in one of two ways:

* native lane: `prepare`, then per request `preprocess` (several threads at once, one row each), the model
  in a native thread, and per batch `postprocess`. `example_input` is used for tracing and warm-up.
* stand-alone, as TorchServe does: `initialize`, then per batch `handle`. So it is called in worker processes, where
  handlers of others, derived from this one, override whatever they like and call the rest.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyserve.context import Context
from pyserve.handler import HandlerError, InputError, ModelLoadError, PredictionException
from pyserve.handlers import profiling
from pyserve.handlers.compiled import compiled
from pyserve.handlers.eager import load_eager_model
from pyserve.handlers.labels import read_labels
from pyserve.handlers.loading import (
    IPEX_AVAILABLE,
    ONNX_AVAILABLE,
    PROFILER_AVAILABLE,
    PT2_AVAILABLE,
    XLA_AVAILABLE,
    choose_device,
    kind_of,
    load_library,
    load_package,
    load_torchscript,
    package_device,
    run_ort_session,
    setup_ort_session,
)
from pyserve.handlers.plain import is_plain
from pyserve.handlers.rows import found, row_value
from pyserve.handlers.tensor_spec import TensorSpec
from pyserve.json_array import JsonArray
from pyserve.tensor_lists import to_lists

# Handlers of others import these from here, as they do from TorchServe's module of this name.
__all__ = [
    "IPEX_AVAILABLE",
    "ONNX_AVAILABLE",
    "PROFILER_AVAILABLE",
    "PT2_AVAILABLE",
    "XLA_AVAILABLE",
    "BaseHandler",
    "setup_ort_session",
]

log = logging.getLogger(__name__)

# A JSON body of this many bytes, already parsed by the codec, becomes a tensor in less than 50 us.
QUICK_SIZE_MAX = 512

# Up to this many numbers Python sums faster than torch starts to.
_PYTHON_SUM_MAX = 128


class BaseHandler:
    """Nested lists in, nested lists out; subclasses override `preprocess` and `postprocess`.

    Attributes (TorchServe's):
        model: the loaded model, None in the native lane.
        mapping: class index as text -> label, from index_to_name.json; None without that file.
        device: where `inference` runs.
        initialized: True once `initialize` or `prepare` has finished.
        context: the model's; while a stage runs it is about the requests at hand.
        model_pt_path: path of the weights, None if the archive has none.
        manifest, model_yaml_config: the archive's MANIFEST.json and model-config.yaml as dicts.
        map_location: kind of the device weights are read to: "cpu", "cuda" or another accelerator's.
        explain: whether the request at hand asks for an explanation.
        target: class to explain.
        profiler_args: arguments of torch.profiler.profile, used when ENABLE_TORCH_PROFILER is set.

    Attributes of the native lane:
        sample_kind: what a sample input is made of: ``"json"`` (`example_input` as nested lists), ``"picture"``,
            ``"text"`` (of `source_vocab`) or ``"saved tensor"`` (`example_input` as torch.save writes it).
    """

    sample_kind = "json"
    # For classes that do without this class's __init__.
    context: Context | None = None
    device: torch.device | None = None
    mapping: dict[str, str] | None = None
    explain = False
    _warned_not_finite = False
    _spec: TensorSpec | None = None

    def __init__(self) -> None:
        self.model: Any = None
        self.mapping: dict[str, str] | None = None
        self.device: torch.device | None = None
        self.initialized = False
        self.context: Context | None = None
        self.model_pt_path: str | None = None
        self.manifest: dict[str, Any] | None = None
        self.map_location: str | None = None
        self.model_yaml_config: dict[str, Any] = {}
        self.explain = False
        self.target = 0
        self.profiler_args: dict[str, Any] = {}

    def prepare(self, context: Context) -> None:
        """Everything `initialize` does except loading the weights: device, manifest, configuration, labels.

        Raises:
            ModelLoadError: a file of the archive that the handler needs cannot be used.
        """
        self.context = context
        self.manifest = context.manifest or {}
        self.model_yaml_config = getattr(context, "model_yaml_config", None) or {}
        properties = context.system_properties
        self.device = choose_device(properties.get("gpu_id"))
        self.map_location = self.device.type if self.device.type != "xla" else "cpu"
        model_dir = Path(properties["model_dir"])
        serialized = self.manifest.get("model", {}).get("serializedFile")
        self.model_pt_path = str(model_dir / serialized) if serialized else None
        self.mapping = read_labels(model_dir / "index_to_name.json")
        # A subclass may pass numbers of its own to `preprocess`, which are not those of the model's input.
        if type(self) is BaseHandler and self.model_yaml_config.get("input") is not None:
            self._spec = TensorSpec.from_config(self.model_yaml_config)
        self.initialized = True

    def initialize(self, context: Context) -> None:
        """Load the model from the archive's folder: eager, TorchScript, ONNX, or compiled ahead of time.

        An eager model is compiled, if ``pt2`` in model-config.yaml says so, when it first runs.

        Raises:
            ModelLoadError: there are no weights, they are of an unknown kind, they do not fit the model file, or
                ``pt2`` cannot be followed.
        """
        prepare: Callable[[Context], None] = self.prepare
        if "context" not in inspect.signature(prepare).parameters:
            # A handler written for TorchServe may have a `prepare` of its own, for something else.
            prepare = functools.partial(BaseHandler.prepare, self)
        prepare(context)
        self.initialized = False
        assert self.manifest is not None  # set by prepare
        model_dir = context.system_properties["model_dir"]
        model_file = self.manifest.get("model", {}).get("modelFile")
        if model_file:
            self.model = self._made_ready(self._load_pickled_model(model_dir, model_file, self.model_pt_path))
        elif self.model_pt_path is None:
            raise ModelLoadError("the archive names no weights; repack it with --serialized-file")
        else:
            self.model = self._load_file(self.model_pt_path)
        if is_plain():
            self.initialized = True
            return
        self.model = compiled(self.model, self.model_yaml_config, getattr(context, "model_name", "the model"))
        if IPEX_AVAILABLE and isinstance(self.model, torch.nn.Module):
            self.model = importlib.import_module("intel_extension_for_pytorch").optimize(self.model)
        self.initialized = True

    def _load_file(self, model_pt_path: str) -> Any:
        kind = kind_of(Path(model_pt_path))
        if kind == "torchscript":
            return self._made_ready(self._load_torchscript_model(model_pt_path))
        if kind == "onnx":
            return setup_ort_session(model_pt_path, self.map_location or "cpu")
        if kind == "library":
            return self._load_torch_export_aot_compile(model_pt_path)
        self.device = package_device(Path(model_pt_path), self.get_device())
        return load_package(Path(model_pt_path), self.device)

    def _made_ready(self, model: Any) -> Any:
        """``model`` on the handler's device and in eval mode: a subclass's own way of loading need not see to it."""
        return model.to(self.get_device()).eval() if isinstance(model, torch.nn.Module) else model

    def _load_torchscript_model(self, model_pt_path: str) -> torch.jit.ScriptModule:
        """The TorchScript in a file, on the handler's device, in eval mode."""
        return load_torchscript(Path(model_pt_path), self.device)

    def _load_torch_export_aot_compile(self, model_so_path: str) -> Any:
        """The network in a shared library made by torch.export and AOTInductor."""
        return load_library(Path(model_so_path), self.get_device())

    def _load_pickled_model(self, model_dir: str, model_file: str, model_pt_path: str | None) -> torch.nn.Module:
        """The model of ``model_file``'s one class, filled with the state dict of ``model_pt_path``.

        The weights are mapped, not read, so that worker processes have one copy of them on a CPU.
        """
        weights = Path(model_pt_path) if model_pt_path else None
        return load_eager_model(Path(model_dir), model_file, weights, self.get_device(), plain=is_plain())

    def example_input(self, context: Context) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """A tensor [1, ...] such as `preprocess` makes, for tracing and warm-up; the same one every time.

        Its shape and dtype are those of ``input`` in model-config.yaml.

        Raises:
            ModelLoadError: model-config.yaml has no usable ``input``.
        """
        return TensorSpec.from_config(context.model_yaml_config).example()

    @property
    def takes_json_arrays(self) -> bool:
        """Whether `preprocess` may be given large arrays of numbers as `JsonArray` in place of lists."""
        return type(self) is BaseHandler

    def is_quick(self, size: int) -> bool:
        """Whether `preprocess` of a body of ``size`` bytes takes under 50 us and may run on the event loop."""
        return size <= QUICK_SIZE_MAX

    def preprocess(self, data: Sequence[Any]) -> torch.Tensor:
        """Rows of numbers (nested lists) -> one tensor [n, ...] on the handler's device.

        With ``input`` in model-config.yaml it has that dtype, and sizes and values are checked; else it is what torch
        makes of the numbers.

        Raises:
            InputError: a row holds anything but numbers, or the rows have different shapes.
        """
        given: Any = data
        if isinstance(given, (torch.Tensor, np.ndarray)):  # from a handler that made numbers of the rows
            return torch.as_tensor(given, device=self.device)
        values: list[Any] = [row_value(row) for row in data]
        values = [torch.as_tensor(value) if isinstance(value, np.ndarray) else value for value in values]
        if values and all(isinstance(value, torch.Tensor) for value in values):
            return torch.stack(values).to(self.get_device())
        if len(values) == 1 and isinstance(values[0], JsonArray):
            tensor = self._tensor_of_array(values[0])
            if tensor is not None:
                return tensor
        values = [value.values() if isinstance(value, JsonArray) else value for value in values]
        for value in values:
            if not isinstance(value, (list, int, float)) or isinstance(value, bool):
                raise InputError(f"expected numbers as JSON (Content-Type: application/json), got {found(value)}")
        try:
            if self._spec is not None and values:
                return torch.cat([self._spec.from_nested(value) for value in values]).to(self.get_device())
            return torch.as_tensor(values, device=self.device)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise InputError(f"the input is not a regular array of numbers: {error}") from error

    def _tensor_of_array(self, array: JsonArray) -> torch.Tensor | None:
        """A tensor [1, *shape] on the handler's device; None if lists are to be asked instead."""
        if self._spec is not None:
            return self._spec.from_nested(array).to(self.get_device())
        tensor = array.tensor(array.natural_dtype)
        return None if tensor is None else tensor.unsqueeze(0).to(self.get_device())

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's output for ``data``, a batch from `preprocess`, without recording gradients."""
        if not callable(self.model) and hasattr(self.model, "get_inputs"):
            return run_ort_session(self.model, data)
        with torch.inference_mode():
            return self.model(data.to(self.device), *args, **kwargs)

    def postprocess(self, data: Any) -> list[Any]:
        """Output tensor [n, ...] -> n JSON values; NaN and infinities become null."""
        return self.json_values(data)

    def handle(self, data: Sequence[Any], context: Context) -> list[Any]:
        """Rows of one batch -> one answer per row: preprocess, inference, postprocess.

        Requests marked ``describe`` or ``explain`` get `describe_handle` or `explain_handle` instead.
        """
        started_at = time.perf_counter()
        self.context = context
        if profiling.is_enabled():
            answers, _ = self._infer_with_profiler(data)
        else:
            answers = self._answers(data)
        metrics = getattr(context, "metrics", None)
        if metrics is not None:
            metrics.add_time("HandlerTime", round((time.perf_counter() - started_at) * 1000, 2), None, "ms")
        return answers

    def _answers(self, data: Sequence[Any]) -> list[Any]:
        if self._is_describe():
            return [self.describe_handle()]
        batch = self._stage("preprocess", self.preprocess, data)
        if self._is_explain():
            return self.explain_handle(batch, data)
        output = self._stage("inference", self.inference, batch)
        answers: list[Any] = self._stage("postprocess", self.postprocess, output)
        return answers

    def _stage(self, name: str, call: Callable[[Any], Any], argument: Any) -> Any:
        """One stage of a batch; its time becomes a metric with ``handler: {profile: true}`` in model-config.yaml."""
        section = getattr(self, "model_yaml_config", {}).get("handler")
        metrics = getattr(self.context, "metrics", None)
        # A stage wrapped by `timed` measures itself.
        if not isinstance(section, Mapping) or section.get("profile") is not True or hasattr(call, "__wrapped__"):
            metrics = None
        started_at = time.perf_counter()
        result = call(argument)
        if metrics is not None:
            metrics.add_time(f"ts_handler_{name}", (time.perf_counter() - started_at) * 1000, None, "ms")
        return result

    def _infer_with_profiler(self, data: Sequence[Any]) -> tuple[list[Any], torch.profiler.profile]:
        """The answers of a batch, and the profiler that recorded how they came about and wrote a trace of it."""
        name = (self.manifest or {}).get("model", {}).get("modelName") or getattr(self.context, "model_name", "")
        with profiling.profiler(getattr(self, "profiler_args", {}), str(name)) as profiler:
            answers = self._answers(data)
        return answers, profiler

    def describe_handle(self) -> Any:
        """What the management API adds to a model's description; None adds nothing."""
        return None

    def explain_handle(self, data_preprocess: Any, raw_data: Sequence[Any]) -> list[Any]:
        """Explanations from `get_insights`, for the class named by ``target`` in the first row.

        `get_insights` is given the first row's value, not the rows, as in TorchServe. A ``target`` that is no number
        is for handlers that look it up themselves.

        Raises:
            InputError: ``target`` is no number, and `get_insights` is pyserve's own.
        """
        first = raw_data[0]
        is_own = not getattr(self.get_insights, "__module__", "").startswith(__package__)
        value = (first.get("data") or first.get("body")) if is_own and isinstance(first, Mapping) else row_value(first)
        target = value.get("target") if isinstance(value, Mapping) else None
        if target is None and isinstance(first, Mapping):
            target = first.get("target")
        try:
            self.target = int(target) if target is not None else 0
        except (TypeError, ValueError) as error:
            if is_own:
                return self.get_insights(data_preprocess, value, target)
            raise InputError(f"'target' names the class to explain by its number, got {found(target)}") from error
        return self.get_insights(data_preprocess, value, self.target)

    def get_insights(self, tensor_data: Any, raw_data: Any, target: Any = 0) -> list[Any]:
        """Explanations of a batch; handlers that can explain override it.

        Args:
            tensor_data: what `preprocess` made of the batch.
            raw_data: the value of its first row, as the request has it.
            target: class to explain.

        Raises:
            PredictionException: always here, with status 501.
        """
        raise PredictionException(f"{type(self).__name__} gives no explanations; define get_insights in a handler", 501)

    def get_device(self) -> torch.device:
        return self.device if self.device is not None else torch.device("cpu")

    def _is_explain(self) -> bool:
        self.explain = self._header("explain") == "True"
        return self.explain

    def _is_describe(self) -> bool:
        return self._header("describe") == "True"

    def _header(self, name: str) -> str | None:
        # A context that somebody else made, for a test, need not have all members.
        if self.context is None or not getattr(self.context, "request_ids", True):
            return None
        return self.context.get_request_header(0, name)

    def json_values(self, output: Any) -> list[Any]:
        """Output tensor [n, ...] -> n nested lists, with null for what JSON has no word for (NaN, infinities).

        Raises:
            HandlerError: the output is not a tensor, or its numbers are complex.
        """
        if isinstance(output, np.ndarray):
            output = torch.from_numpy(output)
        if not isinstance(output, torch.Tensor):
            raise HandlerError(f"the model answered with a {type(output).__name__}; this handler expects one tensor")
        if output.is_complex():
            raise HandlerError(f"the model's output is {output.dtype}, which JSON cannot hold")
        values = to_lists(output)
        # The sum is finite only if every number is; it may overflow on its own, so look closely before acting.
        if output.is_floating_point() and not math.isfinite(_total(output, values)):
            values, not_finite_count = _nulls_for_not_finite(values)
            if not_finite_count:
                self._warn_not_finite(not_finite_count)
        return values

    def _warn_not_finite(self, count: int) -> None:
        if not self._warned_not_finite:
            self._warned_not_finite = True
            name = getattr(self.context, "model_name", "?")
            log.warning("model %s answered with %d NaN or infinite numbers, sent as null (reported once)", name, count)


def _total(output: torch.Tensor, values: list[Any]) -> float:
    if output.dim() == 2 and output.numel() <= _PYTHON_SUM_MAX:
        return float(sum(map(sum, values)))
    return output.sum().item()


def _nulls_for_not_finite(value: Any) -> tuple[Any, int]:
    if isinstance(value, list):
        pairs = [_nulls_for_not_finite(item) for item in value]
        return [item for item, _ in pairs], sum(count for _, count in pairs)
    if isinstance(value, float) and not math.isfinite(value):
        return None, 1
    return value, 0
