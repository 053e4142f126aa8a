"""BaseHandler as worker processes call it: files of every kind, compilation, metrics, traces, what others override."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from abc import ABC
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyserve import _http
from pyserve.archive.model_folder import file_identity
from pyserve.context import Context
from pyserve.handler import HandlerError, InputError, ModelLoadError, PredictionException
from pyserve.handlers import base_handler, loading, mapped_load, profiling
from pyserve.handlers.base_handler import BaseHandler
from pyserve.handlers.compiled import PT2_BACKENDS, compile_arguments
from pyserve.handlers.loading import choose_device

MODEL_FILE = """
import torch

class Doubler(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, numbers):
        return 2 * self.linear(numbers)
"""
EAGER = {"modelFile": "model.py", "serializedFile": "weights.pth", "modelName": "doubler"}


class Metrics:
    """Keeps what handlers say."""

    def __init__(self) -> None:
        self.times: list[tuple[str, float, Any, str]] = []

    def add_time(self, name: str, value: float, idx: Any = None, unit: str = "ms") -> None:
        self.times.append((name, value, idx, unit))


def context_for(folder: Path, model: Mapping[str, str] | None = None, **config: Any) -> Context:
    return Context("m", str(folder), {"model": dict(model or {})}, model_yaml_config=config)


def batch_of(context: Context, *headers: Mapping[str, str]) -> Context:
    return context.for_batch([f"id-{i}" for i in range(len(headers))], [list(each.items()) for each in headers])


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL_FILE)
    torch.save({"linear.weight": torch.eye(2), "linear.bias": torch.ones(2)}, tmp_path / "weights.pth")
    return tmp_path


def answers_of(handler: BaseHandler, folder: Path, model: Mapping[str, str], **config: Any) -> list[Any]:
    context = context_for(folder, model, **config)
    handler.initialize(context)
    return handler.handle([{"body": [1.0, 2.0]}, {"data": [0.0, 0.0]}], batch_of(context, {}, {}))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_copy", [True, False])
def test_eager_weights_are_mapped_where_nobody_writes_to_them(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, is_copy: bool
) -> None:
    torch.manual_seed(0)
    state = {"linear.weight": torch.randn(2, 2), "linear.bias": torch.randn(2)}
    copy, original = model_dir / "weights.pth", model_dir / "cache.pth"
    torch.save(state, copy)
    shutil.copyfile(copy, original)
    known = {os.path.realpath(copy): (str(original), file_identity(original), file_identity(copy))}
    monkeypatch.setattr(mapped_load, "_originals", known if is_copy else {})
    handler = BaseHandler()
    handler.initialize(context_for(model_dir, EAGER))
    maps = Path("/proc/self/maps").read_text()
    assert (str(original) in maps) == is_copy
    assert str(copy) not in maps
    assert torch.equal(handler.model.linear.weight, state["linear.weight"])


def test_model_file_and_handler_share_one_module_where_the_folder_is_importable(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model_dir / "my_network_file.py").write_text(MODEL_FILE)
    monkeypatch.syspath_prepend(str(model_dir))
    handler = BaseHandler()
    handler.initialize(context_for(model_dir, {**EAGER, "modelFile": "my_network_file.py"}))
    module = importlib.import_module("my_network_file")
    assert isinstance(handler.model, module.Doubler)


def exported(folder: Path) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=8)
    return torch.export.export(torch.nn.ReLU(), (torch.zeros(2, 2),), dynamic_shapes=({0: batch},))


def test_exported_program_runs(tmp_path: Path) -> None:
    torch.export.save(exported(tmp_path), str(tmp_path / "relu.pt2"))
    assert answers_of(BaseHandler(), tmp_path, {"serializedFile": "relu.pt2"}) == [[1.0, 2.0], [0.0, 0.0]]


@pytest.mark.compiles
def test_package_compiled_ahead_of_time_runs(tmp_path: Path) -> None:
    path = str(tmp_path / "relu.pt2")
    torch._inductor.aoti_compile_and_package(exported(tmp_path), package_path=path)
    assert answers_of(BaseHandler(), tmp_path, {"serializedFile": "relu.pt2"}) == [[1.0, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", ["bad.pt2", "bad.so", "bad.pt"])
def test_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK nonsense")
    with pytest.raises(ModelLoadError, match=name) as caught:
        BaseHandler().initialize(context_for(tmp_path, {"serializedFile": name}))
    assert str(tmp_path) not in caught.value.message


def test_a_library_that_was_cut_short_is_not_mapped(tmp_path: Path) -> None:
    data = Path(_http.__file__).read_bytes()
    (tmp_path / "m.so").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelLoadError, match=r"^m\.so is cut short: .* copy the file again"):
        BaseHandler().initialize(context_for(tmp_path, {"serializedFile": "m.so"}))


@pytest.mark.skipif(loading.ONNX_AVAILABLE, reason="onnxruntime is installed")
def test_onnx_without_its_runtime_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"m\.onnx needs onnxruntime.*pip install onnxruntime"):
        BaseHandler().initialize(context_for(tmp_path, {"serializedFile": "m.onnx"}))


def test_onnx_session_is_run_by_inference() -> None:
    class Input:
        name = "numbers"

    class Session:
        def get_inputs(self) -> list[Input]:
            return [Input()]

        def run(self, names: Any, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [inputs["numbers"] * 2]

    handler = BaseHandler()
    handler.model = Session()
    assert handler.postprocess(handler.inference(torch.tensor([[1.0, 2.0]]))) == [[2.0, 4.0]]


def test_device_is_the_one_given_if_there_is_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "XLA_AVAILABLE", False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for kind in ("cuda", "xpu"):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", partial(torch.device, kind))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
        assert choose_device(1) == torch.device(kind, 1)
        assert choose_device(None) == torch.device("cpu")
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
        assert choose_device(0) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", partial(torch.device, "mps"))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(0) == torch.device("mps")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device(0) == torch.device("cpu")


# --- pt2 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "arguments"),
    [
        (None, None),
        ({}, None),
        ("inductor", {"backend": "inductor"}),
        ({"backend": "eager", "mode": "reduce-overhead"}, {"backend": "eager", "mode": "reduce-overhead"}),
        ({"compile": {"enable": True}}, {}),
        ({"compile": {"enable": True, "backend": "eager", "dynamic": True}}, {"backend": "eager", "dynamic": True}),
        ({"compile": {"enable": False, "backend": "eager"}}, None),
        ({"compile": {"backend": "eager"}}, None),
        ({"export": {"aot_compile": True}}, None),
    ],
)
def test_every_form_of_pt2_is_understood(entry: Any, arguments: Any) -> None:
    assert compile_arguments({"pt2": entry}) == arguments


def test_eager_model_is_compiled(model_dir: Path) -> None:
    handler = BaseHandler()
    config = {"pt2": {"compile": {"enable": True, "backend": "eager"}}}
    assert answers_of(handler, model_dir, EAGER, **config) == [[4.0, 6.0], [2.0, 2.0]]
    assert isinstance(handler.model, torch._dynamo.eval_frame.OptimizedModule)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("indutor", "'indutor', which does not exist, did you mean 'inductor'"),
        ({"compile": {"enable": True, "backend": "nvfuser"}}, "'nvfuser', which is not part of this torch"),
        ({"compile": {"enable": True, "backend": "tensorrt"}}, "which comes with torch_tensorrt"),
        ({"compile": {"enable": "yes"}}, "'pt2.compile.enable' in model-config.yaml is 'yes'"),
        ({"bakend": "inductor"}, "'bakend', which torch.compile does not know, did you mean 'backend'"),
        ({"mode": "fastest"}, "torch.compile refuses"),
        ({"backend": 3}, "has backend 3"),
        ([1], "is \\[1\\], not a backend"),
    ],
)
def test_pt2_that_cannot_be_followed_says_why(model_dir: Path, entry: Any, text: str) -> None:
    handler = BaseHandler()
    with pytest.raises(ModelLoadError, match=text):
        handler.initialize(context_for(model_dir, EAGER, pt2=entry))
    assert not handler.initialized


def test_all_backends_of_torchserve_are_known_by_name(model_dir: Path) -> None:
    for backend in PT2_BACKENDS:
        try:
            BaseHandler().initialize(context_for(model_dir, EAGER, pt2=backend))
        except ModelLoadError as error:
            assert "does not exist" not in error.message


# --- handle -----------------------------------------------------------------------------------------------------------


def test_handle_reports_its_time(model_dir: Path) -> None:
    handler = BaseHandler()
    context = context_for(model_dir, EAGER, handler={"profile": True})
    handler.initialize(context)
    context.metrics = metrics = Metrics()
    handler.handle([{"body": [1.0, 2.0]}], batch_of(context, {}))
    stages = ["ts_handler_preprocess", "ts_handler_inference", "ts_handler_postprocess"]
    assert [name for name, *_ in metrics.times] == [*stages, "HandlerTime"]
    assert all(idx is None and unit == "ms" and value >= 0 for _, value, idx, unit in metrics.times)
    handler.model_yaml_config = {}
    metrics.times.clear()
    handler.handle([{"body": [1.0, 2.0]}], batch_of(context, {}))
    assert [name for name, *_ in metrics.times] == ["HandlerTime"]
    value = metrics.times[0][1]
    assert value == round(value, 2)


def test_profiler_writes_a_chrome_trace(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "TRACE_FOLDER", str(tmp_path / "traces"))
    monkeypatch.setenv("ENABLE_TORCH_PROFILER", "1")
    assert answers_of(BaseHandler(), model_dir, EAGER) == [[4.0, 6.0], [2.0, 2.0]]
    (trace,) = (tmp_path / "traces" / "doubler").iterdir()
    assert any(event.get("name") == "aten::linear" for event in json.loads(trace.read_text())["traceEvents"])


def test_profiler_arguments_of_a_handler_are_used(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready: list[Any] = []

    class Profiled(BaseHandler):
        def initialize(self, context: Context) -> None:
            super().initialize(context)
            self.profiler_args = {"on_trace_ready": ready.append}

    monkeypatch.setenv("ENABLE_TORCH_PROFILER", "true")
    answers_of(Profiled(), model_dir, EAGER)
    assert len(ready) == 1


def test_describe_and_explain_take_their_own_ways(model_dir: Path) -> None:
    class Talkative(BaseHandler):
        def describe_handle(self) -> Any:
            return {"classes": 2}

        def get_insights(self, tensor_data: Any, raw_data: Any, target: Any = 0) -> list[Any]:
            return [[row, raw_data, target] for row in tensor_data.tolist()]

    handler = Talkative()
    context = context_for(model_dir, EAGER)
    handler.initialize(context)
    assert handler.handle([{}], batch_of(context, {"describe": "True"})) == [{"classes": 2}]
    rows = [{"data": [1.0, 2.0], "target": b"1"}, {"data": [3.0, 4.0]}]
    assert handler.handle(rows, batch_of(context, {"explain": "True"}, {"explain": "True"})) == [
        [[1.0, 2.0], [1.0, 2.0], 1], [[3.0, 4.0], [1.0, 2.0], 1]
    ]  # fmt: skip
    assert handler.explain and handler.target == 1
    assert handler.handle([{"data": [1.0, 2.0]}], batch_of(context, {"explain": "False"})) == [[4.0, 6.0]]
    assert not handler.explain
    named = [{"data": [1.0, 2.0], "target": "cat"}]
    assert handler.handle(named, batch_of(context, {"explain": "True"})) == [[[1.0, 2.0], [1.0, 2.0], "cat"]]
    plain = BaseHandler()
    plain.initialize(context)
    with pytest.raises(InputError, match="by its number"):
        plain.handle(named, batch_of(context, {"explain": "True"}))
    with pytest.raises(PredictionException, match="no explanations") as caught:
        plain.handle(rows, batch_of(context, {"explain": "True"}, {"explain": "True"}))
    assert caught.value.error_code == 501


def test_a_model_that_an_overridden_method_loads_is_in_eval_mode(model_dir: Path) -> None:
    class Frozen(BaseHandler):
        def _load_torchscript_model(self, model_pt_path: str) -> Any:
            return torch.jit.optimize_for_inference(torch.jit.freeze(super()._load_torchscript_model(model_pt_path)))

    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 1)), str(model_dir / "script.pt"))
    handler = Frozen()
    handler.initialize(context_for(model_dir, {"serializedFile": "script.pt"}))
    assert not handler.model.training


def test_what_cannot_be_loaded_is_a_runtime_error(model_dir: Path) -> None:
    with pytest.raises(RuntimeError, match="absent"):
        BaseHandler().initialize(context_for(model_dir, {"serializedFile": "absent.pt"}))


def test_batched_answers_are_those_of_single_requests(model_dir: Path) -> None:
    torch.manual_seed(3)
    handler = BaseHandler()
    context = context_for(model_dir, EAGER)
    handler.initialize(context)
    rows = [{"body": row} for row in torch.randn(7, 2).tolist()]
    together = handler.handle(rows, batch_of(context, *[{}] * 7))
    alone = [handler.handle([row], batch_of(context, {}))[0] for row in rows]
    assert torch.allclose(torch.tensor(together), torch.tensor(alone))


# --- what others override ---------------------------------------------------------------------------------------------


def test_handler_that_overrides_everything_works(model_dir: Path) -> None:
    calls = []

    class Own(BaseHandler, ABC):
        def __init__(self) -> None:  # without super().__init__()
            self.model = None
            self.initialized = False

        def prepare(self, line: str) -> str:  # type: ignore[override]  # a word of its own
            return line.strip()

        def _load_pickled_model(self, model_dir: str, model_file: str, model_pt_path: str | None) -> torch.nn.Module:
            calls.append((Path(model_dir), model_file, model_pt_path))
            return super()._load_pickled_model(model_dir, model_file, model_pt_path).train()

        def preprocess(self, data: Any) -> Any:
            return super().preprocess([[float(part) for part in self.prepare(row["body"]).split()] for row in data])

        def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
            return super().inference(data).numpy()

        def postprocess(self, data: Any) -> list[Any]:
            return [{"sum": sum(row)} for row in super().postprocess(data)]

    handler = Own()
    context = context_for(model_dir, EAGER)
    handler.initialize(context)
    assert not handler.model.training and handler.initialized
    assert calls == [(model_dir, "model.py", str(model_dir / "weights.pth"))]
    assert handler.handle([{"body": " 1 2 "}], batch_of(context, {})) == [{"sum": 10.0}]


def test_own_loading_of_torchscript_is_called(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "relu.pt"))

    class Own(BaseHandler):
        def _load_torchscript_model(self, model_pt_path: str) -> torch.jit.ScriptModule:
            assert model_pt_path == str(tmp_path / "relu.pt")
            return torch.jit.script(torch.nn.Identity())

    assert answers_of(Own(), tmp_path, {"serializedFile": "relu.pt"}) == [[1.0, 2.0], [0.0, 0.0]]


def test_numbers_that_are_tensors_already_are_taken() -> None:
    handler = BaseHandler()
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    rows = [{"data": row} for row in expected]
    for given in (expected, expected.numpy(), list(expected), list(expected.numpy()), rows):
        assert torch.equal(handler.preprocess(given), expected)


def test_what_is_no_tensor_is_said_to_be_none() -> None:
    with pytest.raises(HandlerError, match="answered with a dict"):
        BaseHandler().postprocess({"a": 1})


def test_names_that_others_import_are_there() -> None:
    for name in ("PROFILER_AVAILABLE", "PT2_AVAILABLE", "XLA_AVAILABLE", "ONNX_AVAILABLE", "IPEX_AVAILABLE"):
        assert isinstance(getattr(base_handler, name), bool)
    assert callable(base_handler.setup_ort_session)
    assert (importlib.util.find_spec("onnxruntime") is not None) is base_handler.ONNX_AVAILABLE
    members = set(vars(BaseHandler()))
    assert members >= {
        "model", "mapping", "device", "initialized", "context", "model_pt_path", "manifest", "map_location", "explain",
        "target", "profiler_args", "model_yaml_config",
    }  # fmt: skip
