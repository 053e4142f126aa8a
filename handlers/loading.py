"""Networks from files, and the device they go to, for handlers that run stand-alone."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyserve import devices
from pyserve.handler import ModelLoadError
from pyserve.handlers.safetensors_file import SUFFIX as SAFETENSORS
from pyserve.handlers.shared_weights import share_weights
from pyserve.proof.compiled_code import check_library
from pyserve.proof.export_rules import read_exported
from pyserve.proof.package_machine import check_machine, compiled_for
from pyserve.proof.package_rules import CheckedPackage, check_filling, read_program

log = logging.getLogger(__name__)

# Of torch, in every version pyserve runs with.
PROFILER_AVAILABLE = True
PT2_AVAILABLE = True
# Optional packages; found, not imported.
ONNX_AVAILABLE = importlib.util.find_spec("onnxruntime") is not None
XLA_AVAILABLE = importlib.util.find_spec("torch_xla") is not None
IPEX_AVAILABLE = (
    os.environ.get("TS_IPEX_ENABLE", "false").lower() == "true"
    and importlib.util.find_spec("intel_extension_for_pytorch") is not None
)

_TORCHSCRIPT_SUFFIXES = (".pt", ".pth", ".ts", ".torchscript")


def choose_device(gpu_id: int | None) -> torch.device:
    """The accelerator a worker was given, by the kind this machine has; the CPU without one."""
    if gpu_id is not None:
        if devices.count():
            return torch.device(devices.name_of(gpu_id))
        if torch.backends.mps.is_available():
            return torch.device("mps")
    if XLA_AVAILABLE:
        device: torch.device = importlib.import_module("torch_xla.core.xla_model").xla_device()
        return device
    return torch.device("cpu")


def kind_of(path: Path) -> str:
    """``torchscript``, ``onnx``, ``library`` (.so) or ``package`` (.pt2), by the file's name.

    Raises:
        ModelLoadError: it is none of these.
    """
    suffix = path.suffix.lower()
    kind = {".onnx": "onnx", ".so": "library", ".pt2": "package"}.get(suffix)
    if suffix in _TORCHSCRIPT_SUFFIXES:
        kind = "torchscript"
    if suffix == SAFETENSORS:
        raise ModelLoadError(without_model_file(path.name))
    if kind is None:
        raise ModelLoadError(
            f"{path.name}: this handler loads TorchScript (.pt), ONNX (.onnx), what torch.export compiled (.pt2, .so), "
            "or a state dict (.pth, .safetensors) together with a --model-file"
        )
    return kind


def without_model_file(name: str) -> str:
    """What to say of a file of weights only that came without a model file."""
    return f"{name} holds weights only; pack the file with the model's class too, with --model-file"


def load_torchscript(path: Path, device: torch.device | None) -> torch.jit.ScriptModule:
    """The TorchScript of ``path`` on ``device``, in eval mode; on a CPU its weights are shared between processes.

    Raises:
        ModelLoadError: the file is missing, damaged or not TorchScript.
    """
    _check_exists(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # who serves a model need not hear how it was made
            model: torch.jit.ScriptModule = torch.jit.load(str(path), map_location=device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelLoadError(
            f"{path.name} is not a TorchScript file, and the archive has no --model-file to build an eager model from: "
            f"{_reason(error, path)}"
        ) from error
    model = model.eval()
    share_weights(model, path)
    _make_resizable(model)
    return model


def _make_resizable(model: torch.jit.ScriptModule) -> None:
    """Gives buffers that the graph resizes memory that can grow.

    What was read from a file cannot: resize_ finds that out when it has changed the sizes already, so that the next
    call writes beyond the memory.
    """
    graph = getattr(model, "inlined_graph", None)
    if graph is None or not any(graph.findAllNodes(f"aten::{name}") for name in ("resize_", "resize_as_", "set_")):
        return
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.data = buffer.clone()


def package_device(path: Path, device: torch.device) -> torch.device:
    """Where the network of a ``.pt2`` file runs: on ``device``, or on the CPU if it was compiled for that.

    Raises:
        ModelLoadError: it is damaged, or was compiled for another kind of device.
    """
    _check_exists(path)
    kind = compiled_for(path)
    if kind in ("", device.type):
        return device
    if kind != "cpu":
        raise ModelLoadError(
            f"{path.name} was compiled for {kind}, but the worker has {device}; compile it again for {device.type}, or "
            f"serve it where there is {kind}"
        )
    log.info("%s was compiled for the CPU and runs there, not on %s", path.name, device)
    return torch.device("cpu")


def load_package(path: Path, device: torch.device) -> Any:
    """The network of a ``.pt2`` file: compiled by AOTInductor, or exported by torch.export and run as it is.

    Raises:
        ModelLoadError: the file is missing, damaged, or compiled for another kind of machine.
    """
    _check_exists(path)
    try:
        with zipfile.ZipFile(path) as file:
            is_compiled = any("aotinductor" in name for name in file.namelist())
        if is_compiled:
            check_machine(path, path.name)
            inductor = importlib.import_module("torch._inductor")
            call = inductor.aoti_load_package(str(path), device_index=-1 if device.index is None else device.index)
            return _checked(call, path, device)
        program = torch.export.load(str(path))
        if device.type != "cpu":
            program = importlib.import_module("torch.export.passes").move_to_device_pass(program, device)
        return _checked(program.module(), path, device, is_compiled=False)
    except (torch.OutOfMemoryError, MemoryError, ModelLoadError):
        raise
    except Exception as error:
        # The reader raises errors of many classes on damaged files; whatever it was, the file is at fault.
        raise ModelLoadError(
            f"{path.name} cannot be loaded as a .pt2 package: {_reason(error, path)}. Export it with this torch "
            f"({torch.__version__}) and, if it is compiled, on this kind of machine."
        ) from error


def _checked(call: Any, path: Path, device: torch.device, *, is_compiled: bool = True) -> Any:
    """A compiled or exported program that runs only what it was made for, if it says what that is.

    Raises:
        ModelLoadError: it takes no item alone, and cannot be given one in a batch either.
    """
    try:
        program = (read_program if is_compiled else read_exported)(path, path.name)
    except ModelLoadError as error:
        log.warning("requests cannot be checked: %s", error.message)
        return call
    check_filling(lambda inputs: call(*(each.to(device) for each in inputs)), program, path.name)
    return CheckedPackage(call, program)


def load_library(path: Path, device: torch.device) -> Any:
    """The network in a shared library that ``torch._export.aot_compile`` made.

    Raises:
        ModelLoadError: the file is missing, damaged, or compiled for another torch or kind of machine.
    """
    _check_exists(path)
    check_library(path)
    try:
        return importlib.import_module("torch._export").aot_load(str(path), str(device))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise ModelLoadError(
            f"{path.name} cannot be loaded: {_reason(error, path)}. Compile it again with this torch "
            f"({torch.__version__}) on this kind of machine, preferably as a .pt2 package."
        ) from error


def setup_ort_session(model_pt_path: str, map_location: str) -> Any:
    """An onnxruntime session for the ONNX file, on the GPU if ``map_location`` is ``"cuda"``.

    Raises:
        ModelLoadError: onnxruntime is not installed, or cannot use the file.
    """
    path = Path(model_pt_path)
    if not ONNX_AVAILABLE:
        raise ModelLoadError(f"{path.name} needs onnxruntime, which is not installed here; pip install onnxruntime")
    _check_exists(path)
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = [*(["CUDAExecutionProvider"] if map_location == "cuda" else []), "CPUExecutionProvider"]
    try:
        return runtime.InferenceSession(model_pt_path, sess_options=options, providers=providers)
    except Exception as error:  # onnxruntime's errors have no common class of their own
        raise ModelLoadError(f"{path.name} cannot be loaded by onnxruntime: {_reason(error, path)}") from error


def run_ort_session(session: Any, batch: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
    """The outputs of an onnxruntime session of one input; of one output just that."""
    inputs = {session.get_inputs()[0].name: batch.cpu().numpy()}
    outputs = [torch.from_numpy(np.asarray(output)) for output in session.run(None, inputs)]
    return outputs[0] if len(outputs) == 1 else outputs


def _check_exists(path: Path) -> None:
    if not path.is_file():
        raise ModelLoadError(f"{path.name} is not in the archive; repack it with --serialized-file")


def _reason(error: BaseException, path: Path) -> str:
    """The first line of ``error``'s text, without the folder of ``path``."""
    text = str(error).strip().splitlines()
    return text[0].replace(f"{path.parent}/", "")[:300] if text else type(error).__name__
