"""Inference engines as a program of one's own would call them: what ``direct.py --engine`` measures without a server.

Each is made of the same network, as an exported program (``torch.export``) or a TorchScript file, and is given
``workers`` threads to be called from and ``threads`` intra-op threads for each of them. What takes long to make (an
AOTInductor package, an ONNX file, a quantised network) is kept in a folder, named by the weights and the versions.

A further engine is one class and one row of `ENGINES`.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

# One batch -> the program's first output, float32. Called by one thread each.
Runner = Callable[[Tensor], Tensor]

PRECISIONS = ("fp32", "bf16", "int8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# OpenVINO's and NNCF's wheels count their uses over the network; without this module they have nothing to do it with.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


class EngineError(Exception):
    """The engine cannot run this; the text says why."""


@dataclass(frozen=True)
class Source:
    """What an engine is made of.

    Attributes:
        program: a file of ``torch.export.save``, with a free batch dimension and one input.
        torchscript: the same network as a TorchScript file.
        precision: one of `PRECISIONS`.
        kept: a folder for what takes long to make; it is made if it is not there.
        samples: tensors [1, ...] to calibrate int8 with.
    """

    program: Path
    torchscript: Path
    precision: str
    kept: Path
    samples: tuple[Tensor, ...] = ()

    def load(self) -> torch.export.ExportedProgram:
        return torch.export.load(str(self.program))

    def digest(self, program: torch.export.ExportedProgram, *packages: str) -> str:
        """Names what is made of this program by these versions of packages."""
        found = hashlib.sha256(str(program.graph).encode())
        for name, weight in sorted(program.state_dict.items()):
            found.update(name.encode())
            found.update(weight.detach().contiguous().view(torch.uint8).numpy().tobytes() if weight.dim() else b"")
        for each in self.samples if self.precision == "int8" else ():
            found.update(each.numpy().tobytes())
        versions = [f"{each}={importlib.metadata.version(each)}" for each in packages]
        found.update(" ".join([self.precision, *versions]).encode())
        return found.hexdigest()[:16]


class Engine(ABC):
    """One engine, for one program."""

    label: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    packages: ClassVar[tuple[str, ...]]

    def __init__(self, source: Source):
        self.source = source
        source.kept.mkdir(parents=True, exist_ok=True)

    @classmethod
    def missing(cls) -> str:
        """Which package is not installed; empty if all are."""
        return next((each for each in cls.packages if importlib.util.find_spec(each) is None), "")

    @abstractmethod
    def runners(self, workers: int, threads: int) -> list[Runner]:
        """One for each of ``workers`` threads, each with ``threads`` threads to compute with.

        The caller has set ``torch.set_num_threads(threads)`` in each thread that calls one.
        """


class TorchScript(Engine):
    """Frozen TorchScript."""

    label = "TorchScript"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "bf16")
    packages = ("torch",)

    def __init__(self, source: Source):
        super().__init__(source)
        network = torch.jit.load(str(source.torchscript), map_location="cpu").eval()
        if source.precision != "fp32":
            network = network.to(DTYPES[source.precision]).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            self.network = self.finished(torch.jit.freeze(network))

    def finished(self, network: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
        return network

    def cast(self, batch: Tensor) -> Tensor:
        if self.source.precision == "fp32" or not batch.is_floating_point():
            return batch
        layout = torch.channels_last if batch.dim() == 4 else torch.contiguous_format
        return batch.to(DTYPES[self.source.precision], memory_format=layout)

    def runners(self, workers: int, threads: int) -> list[Runner]:
        return [lambda batch: first(self.network(self.cast(batch))).float()] * workers


class OptimizedTorchScript(TorchScript):
    """Frozen TorchScript with convolutions in oneDNN's layout."""

    label = "TorchScript, optimized"
    precisions = ("fp32",)

    def finished(self, network: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
        return torch.jit.optimize_for_inference(network)


class AotInductor(Engine):
    """A package of ``aoti_compile_and_package``, its weights folded in. The number of threads is read at each call."""

    label = "AOTInductor"
    precisions = ("fp32", "bf16")
    packages = ("torch",)

    def __init__(self, source: Source):
        super().__init__(source)
        program = source.load()
        self.package = source.kept / f"aotinductor-{source.digest(program, 'torch')}.pt2"
        if not self.package.exists():
            self.compile(program)

    def compile(self, program: torch.export.ExportedProgram) -> None:
        if self.source.precision != "fp32":
            program = in_precision(program, DTYPES[self.source.precision])
        making = self.package.with_suffix(f".{os.getpid()}.pt2")
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(making), inductor_configs={"freezing": True, "cpp.dynamic_threads": True}
        )
        making.replace(self.package)

    def runners(self, workers: int, threads: int) -> list[Runner]:
        from torch._inductor.package import load_package

        dtype = DTYPES[self.source.precision]
        package: Any = load_package(str(self.package), run_single_threaded=False, num_runners=workers)

        def run(batch: Tensor) -> Tensor:
            return first(package(batch.to(dtype) if batch.is_floating_point() else batch)).float()

        return [run] * workers


class OpenVino(Engine):
    """One compiled model with a stream for each worker; int8 by NNCF."""

    label = "OpenVINO"
    precisions = PRECISIONS
    packages = ("openvino",)

    def __init__(self, source: Source):
        super().__init__(source)
        import openvino

        self.core = openvino.Core()
        program = source.load()
        packages = ("openvino", "nncf") if source.precision == "int8" else ("openvino",)
        file = source.kept / f"openvino-{source.digest(program, *packages)}.xml"
        if not file.exists():
            model = openvino.convert_model(program)
            # The conversion frees every dimension; kernels for sizes that are known are quicker.
            model.reshape(openvino.PartialShape([-1 if is_free else size for size, is_free in sizes(program)]))
            if source.precision == "int8":
                model = quantised(model, source.samples)
            openvino.save_model(model, str(file), compress_to_fp16=False)
        self.model = self.core.read_model(str(file))

    def runners(self, workers: int, threads: int) -> list[Runner]:
        hint = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}[self.source.precision]
        compiled = self.core.compile_model(
            self.model, "CPU",
            {"NUM_STREAMS": str(workers), "INFERENCE_NUM_THREADS": str(workers * threads),
             "INFERENCE_PRECISION_HINT": hint},
        )  # fmt: skip

        def runner() -> Runner:
            request = compiled.create_infer_request()

            def run(batch: Tensor) -> Tensor:
                # Its output is written over by the next call, after which nobody reads this one.
                answers = request.infer([batch.numpy()], share_inputs=True, share_outputs=True)
                return torch.from_numpy(next(iter(answers.values())))

            return run

        return [runner() for _ in range(workers)]


def quantised(model: Any, samples: tuple[Tensor, ...]) -> Any:
    """An OpenVINO model with int8 weights and activations; EngineError without NNCF or samples."""
    if importlib.util.find_spec("nncf") is None:
        raise EngineError("int8 needs NNCF: pip install nncf")
    if not samples:
        raise EngineError("int8 needs samples to calibrate with: --samples FILE.pt")
    import nncf

    return nncf.quantize(model, nncf.Dataset([each.numpy() for each in samples]), subset_size=len(samples))


class OnnxRuntime(Engine):
    """A session for each worker; int8 by its own static quantiser."""

    label = "ONNX Runtime"
    precisions = ("fp32", "int8")
    packages = ("onnxruntime", "onnx", "onnxscript")

    def __init__(self, source: Source):
        super().__init__(source)
        program = source.load()
        self.file = source.kept / f"onnx-{source.digest(program, 'onnxruntime', 'onnx', 'torch')}.onnx"
        if not self.file.exists():
            making = self.file.with_suffix(f".{os.getpid()}.onnx")
            exported: Any = torch.onnx.export(program, dynamo=True, verbose=False)
            exported.save(str(making))
            if source.precision == "int8":
                self.quantise(making)
            making.replace(self.file)

    def quantise(self, file: Path) -> None:
        """In place."""
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

        if not self.source.samples:
            raise EngineError("int8 needs samples to calibrate with: --samples FILE.pt")

        class Samples(quantization.CalibrationDataReader):
            def __init__(self, name: str, samples: tuple[Tensor, ...]):
                self.left = iter([{name: each.numpy()} for each in samples])

            def get_next(self) -> Any:
                return next(self.left, None)

        prepared, done = file.with_suffix(".prepared"), file.with_suffix(".quantised")
        quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
        name = self.session(1, prepared).get_inputs()[0].name
        quantization.quantize_static(
            str(prepared), str(done), Samples(name, self.source.samples), per_channel=True, reduce_range=True
        )
        done.replace(file)
        prepared.unlink()

    def session(self, threads: int, file: Path | None = None) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(str(file or self.file), options, providers=["CPUExecutionProvider"])

    def runners(self, workers: int, threads: int) -> list[Runner]:
        def runner() -> Runner:
            session = self.session(threads)
            name = session.get_inputs()[0].name
            return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])

        return [runner() for _ in range(workers)]


ENGINES: dict[str, type[Engine]] = {
    "torchscript": TorchScript,
    "torchscript-optimized": OptimizedTorchScript,
    "aotinductor": AotInductor,
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
}


def first(output: Any) -> Tensor:
    """The tensor of an output that is one, or the first of a list."""
    found: Tensor = output[0] if isinstance(output, (list, tuple)) else output
    return found


def sizes(program: torch.export.ExportedProgram) -> list[tuple[int, bool]]:
    """Of each dimension of its one input: the example's size, and whether it is free."""
    (taken,) = [each.meta["val"] for each in program.graph.nodes if each.name in program.graph_signature.user_inputs]
    (example,) = program.example_inputs[0]
    return [
        (int(given), isinstance(size, torch.SymInt)) for given, size in zip(example.shape, taken.shape, strict=True)
    ]


def in_precision(program: torch.export.ExportedProgram, dtype: torch.dtype) -> torch.export.ExportedProgram:
    """The same program exported again with its floats in another dtype."""
    network = copy.deepcopy(program.module()).to(dtype)
    (example,) = program.example_inputs[0]
    if example.is_floating_point():
        example = example.to(dtype)
    free = {index: torch.export.Dim.AUTO for index, (_, is_free) in enumerate(sizes(program)) if is_free}
    return torch.export.export(network, (example,), dynamic_shapes=(free,))


def difference(engine: Engine, batch: Tensor) -> float:
    """The largest difference of the engine's answers from the program's, by the largest of these."""
    with torch.inference_mode():
        wanted = first(engine.source.load().module()(batch)).float()
        given = engine.runners(1, 1)[0](batch)
    return float((given - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
