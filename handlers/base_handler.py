"""The handler every other one starts from, with TorchServe's attributes and methods.

The server calls a handler in one of two ways:

* native lane: `prepare`, then per request `preprocess` (several threads at once, one row each), the model
  in a native thread, and per batch `postprocess`. `example_input` is used for tracing and warm-up.
* stand-alone, as TorchServe does: `initialize`, then per batch `handle`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyserve.context import Context
from pyserve.handler import HandlerError, InputError, ModelLoadError, PredictionException
from pyserve.handlers.eager import load_eager_model
from pyserve.handlers.labels import read_labels
from pyserve.handlers.rows import found, row_value
from pyserve.handlers.tensor_spec import TensorSpec

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
        context: the batch's context while `handle` or `postprocess` runs, else the model's.
        model_pt_path: path of the weights, None if the archive has none.
        manifest, model_yaml_config: the archive's MANIFEST.json and model-config.yaml as dicts.
        map_location: "cuda" or "cpu".
        explain: whether the request at hand asks for an explanation.
        target: class to explain.

    Attributes of the native lane:
        sample_kind: what a sample input is made of: ``"json"`` (`example_input` as nested lists) or ``"picture"``.
    """

    sample_kind = "json"

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
        self._warned_not_finite = False

    def prepare(self, context: Context) -> None:
        """Everything `initialize` does except loading the weights: device, manifest, configuration, labels.

        Raises:
            ModelLoadError: a file of the archive that the handler needs cannot be used.
        """
        self.context = context
        self.manifest = context.manifest or {}
        self.model_yaml_config = context.model_yaml_config
        properties = context.system_properties
        gpu = properties.get("gpu_id")
        on_gpu = gpu is not None and torch.cuda.is_available()
        self.map_location = "cuda" if on_gpu else "cpu"
        self.device = torch.device(f"cuda:{gpu}" if on_gpu else "cpu")
        model_dir = Path(properties["model_dir"])
        serialized = self.manifest.get("model", {}).get("serializedFile")
        self.model_pt_path = str(model_dir / serialized) if serialized else None
        self.mapping = read_labels(model_dir / "index_to_name.json")
        self.initialized = True

    def initialize(self, context: Context) -> None:
        """Load the model, eager or TorchScript, from the archive's folder.

        Raises:
            ModelLoadError: there are no weights, they are of an unknown kind, or they do not fit the model file.
        """
        self.prepare(context)
        self.initialized = False
        assert self.manifest is not None  # set by prepare
        model_dir = Path(context.system_properties["model_dir"])
        model_file = self.manifest.get("model", {}).get("modelFile")
        if model_file:
            self.model = self._load_pickled_model(str(model_dir), model_file, self.model_pt_path)
        elif self.model_pt_path is None:
            raise ModelLoadError("the archive names no weights; repack it with --serialized-file")
        elif self.model_pt_path.endswith((".pt", ".pth")):
            self.model = self._load_torchscript_model(self.model_pt_path)
        else:
            raise ModelLoadError(
                f"{Path(self.model_pt_path).name}: this handler loads TorchScript (.pt), "
                "or a state dict (.pth) together with a --model-file"
            )
        self.initialized = True

    def _load_torchscript_model(self, model_pt_path: str) -> torch.jit.ScriptModule:
        name = Path(model_pt_path).name
        try:
            model: torch.jit.ScriptModule = torch.jit.load(model_pt_path, map_location=self.device)
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelLoadError(
                f"{name} is not a TorchScript file, and the archive has no --model-file to build an eager model from: "
                f"{str(error).strip().splitlines()[0][:300]}"
            ) from error
        return model.eval()

    def _load_pickled_model(self, model_dir: str, model_file: str, model_pt_path: str | None) -> torch.nn.Module:
        weights = Path(model_pt_path) if model_pt_path else None
        return load_eager_model(Path(model_dir), model_file, weights, self.get_device())

    def example_input(self, context: Context) -> torch.Tensor:
        """A tensor [1, ...] such as `preprocess` makes, for tracing and warm-up; the same one every time.

        Its shape and dtype are those of ``input`` in model-config.yaml.

        Raises:
            ModelLoadError: model-config.yaml has no usable ``input``.
        """
        return TensorSpec.from_config(context.model_yaml_config).example()

    def is_quick(self, size: int) -> bool:
        """Whether `preprocess` of a body of ``size`` bytes takes under 50 us and may run on the event loop."""
        return size <= QUICK_SIZE_MAX

    def preprocess(self, data: Sequence[Any]) -> torch.Tensor:
        """Rows of numbers (nested lists) -> one tensor [n, ...] on the handler's device.

        Raises:
            InputError: a row holds anything but numbers, or the rows have different shapes.
        """
        values = [row_value(row) for row in data]
        for value in values:
            if not isinstance(value, (list, int, float)) or isinstance(value, bool):
                raise InputError(f"expected numbers as JSON (Content-Type: application/json), got {found(value)}")
        try:
            return torch.as_tensor(values, device=self.device)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise InputError(f"the input is not a regular array of numbers: {error}") from error

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's output for ``data``, a batch from `preprocess`, without recording gradients."""
        with torch.inference_mode():
            return self.model(data.to(self.device), *args, **kwargs)

    def postprocess(self, data: Any) -> list[Any]:
        """Output tensor [n, ...] -> n JSON values; NaN and infinities become null."""
        return self.json_values(data)

    def handle(self, data: Sequence[Any], context: Context) -> list[Any]:
        """Rows of one batch -> one answer per row: preprocess, inference, postprocess.

        Requests marked ``describe`` or ``explain`` get `describe_handle` or `explain_handle` instead.
        """
        self.context = context
        if self._is_describe():
            return [self.describe_handle()]
        batch = self.preprocess(data)
        if self._is_explain():
            return self.explain_handle(batch, data)
        return self.postprocess(self.inference(batch))

    def describe_handle(self) -> Any:
        """What the management API adds to a model's description; None adds nothing."""
        return None

    def explain_handle(self, data_preprocess: Any, raw_data: Sequence[Any]) -> list[Any]:
        """Explanations from `get_insights`, for the class named by ``target`` in the first row."""
        first = raw_data[0]
        value = row_value(first)
        target = value.get("target") if isinstance(value, Mapping) else None
        if target is None and isinstance(first, Mapping):
            target = first.get("target")
        try:
            self.target = int(target) if target is not None else 0
        except (TypeError, ValueError) as error:
            raise InputError(f"'target' names the class to explain by its number, got {found(target)}") from error
        return self.get_insights(data_preprocess, raw_data, self.target)

    def get_insights(self, tensor_data: Any, raw_data: Sequence[Any], target: int = 0) -> list[Any]:
        """Explanations of a batch; handlers that can explain override it.

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
        if self.context is None or not self.context.request_ids:
            return None
        return self.context.get_request_header(0, name)

    def json_values(self, output: Any) -> list[Any]:
        """Output tensor [n, ...] -> n nested lists, with null for what JSON has no word for (NaN, infinities).

        Raises:
            HandlerError: the output is not a tensor, or its numbers are complex.
        """
        if not isinstance(output, torch.Tensor):
            raise HandlerError(f"the model answered with a {type(output).__name__}; this handler expects one tensor")
        if output.is_complex():
            raise HandlerError(f"the model's output is {output.dtype}, which JSON cannot hold")
        values: list[Any] = output.tolist()
        # The sum is finite only if every number is; it may overflow on its own, so look closely before acting.
        if output.is_floating_point() and not math.isfinite(_total(output, values)):
            values, not_finite_count = _nulls_for_not_finite(values)
            if not_finite_count:
                self._warn_not_finite(not_finite_count)
        return values

    def _warn_not_finite(self, count: int) -> None:
        if not self._warned_not_finite:
            self._warned_not_finite = True
            name = self.context.model_name if self.context is not None else "?"
            log.warning("model %s answered with %d NaN or infinite numbers, sent as null (said once)", name, count)


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
