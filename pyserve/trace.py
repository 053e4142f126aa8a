"""Turns an eager model (model file and state dict) into TorchScript, in a process of its own.

A process of its own because the model file is somebody's code: it may import its neighbours under names another
archive uses too, change globals or crash. What comes out is data, kept in the archive's cache, so that the second
start does not trace again.

The parent side needs no torch, so that a server can begin tracing before it imports torch itself.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from pyserve.archive import Archive, open_archive
from pyserve.errors import ModelLoadError, ServeError

Progress = Callable[[str], None]

# Largest difference between the eager and the traced model's outputs, relative to the largest output.
TOLERANCE = 1e-5


def traced_file(archive: Archive) -> Path:
    """Where the TorchScript made from this archive by this torch is kept."""
    return archive.cache_file(f"traced-torch-{version('torch')}.pt")


class Tracing:
    """A running conversion. `wait` must be called."""

    def __init__(self, archive: Archive):
        self._archive = archive
        folder = Path(__file__).parent.parent
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pyserve.trace", str(archive.path), str(traced_file(archive))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def wait(self, progress: Progress, timeout_s: float) -> Path:
        """The TorchScript file.

        Raises:
            ModelLoadError: the model cannot be built, does not fit its weights, or cannot be traced.
        """
        process = self._process
        assert process.stdout is not None
        problem: str | None = None
        for line in process.stdout:
            if not line.startswith("{"):
                continue  # printed by the model file
            report = json.loads(line)
            problem = report.get("error", problem)
            if "progress" in report:
                progress(report["progress"])
        try:
            _, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.stop()
            raise ModelLoadError(
                f"tracing {self._archive.name} took longer than startup_timeout={timeout_s} s; raise startupTimeout in "
                "its model-config.yaml"
            ) from None
        if process.returncode == 0:
            return traced_file(self._archive)
        if problem is None:
            last = stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            problem = f"tracing {self._archive.name} failed: {last[0]}"
        raise ModelLoadError(problem)

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def needs_tracing(archive: Archive) -> bool:
    return archive.manifest.model_file is not None and not traced_file(archive).exists()


def main(archive_path: str, out_path: str) -> int:
    """The child: prints JSON lines with ``progress`` or ``error``."""
    try:
        _trace(archive_path, Path(out_path))
    except ServeError as error:
        _report(error=error.message)
        return 1
    except Exception as error:
        text = str(error).strip().splitlines()[:1] or [""]
        _report(error=f"{type(error).__name__} while tracing the model: {text[0]}")
        return 1
    return 0


def _report(**fields: str) -> None:
    print(json.dumps(fields), flush=True)


def _trace(archive_path: str, out: Path) -> None:
    import torch

    from pyserve.context import Context
    from pyserve.handler import load_handler
    from pyserve.handlers.eager import load_eager_model

    archive = open_archive(archive_path)
    manifest = archive.manifest
    assert manifest.model_file is not None
    handler = load_handler(archive)
    context = Context(manifest.model_name, str(archive.model_dir), manifest.raw, model_yaml_config=archive.config.raw)
    handler.prepare(context)
    example = handler.example_input(context)
    _report(progress="building the model and reading its weights")
    os.chdir(archive.model_dir)
    weights = archive.weights.open() if archive.weights is not None else None
    model = load_eager_model(archive.model_dir, manifest.model_file, weights)
    _report(progress="tracing")
    with torch.inference_mode(False), torch.no_grad():
        scripted = _to_torchscript(model, example)
    _report(progress="keeping the TorchScript")
    descriptor, temporary = tempfile.mkstemp(dir=out.parent, suffix=".pt")
    os.close(descriptor)
    torch.jit.save(scripted, temporary)
    os.replace(temporary, out)


def _to_torchscript(model, example):  # type: ignore[no-untyped-def]  # torch is imported by the child only
    """Traced if that is true to the eager model on other inputs and another batch size, else scripted."""
    import torch

    generator = torch.Generator().manual_seed(0)
    other = torch.cat([example, example])
    if other.is_floating_point():
        other = other + torch.randn(other.shape, generator=generator, dtype=other.dtype) * 0.1
    expected = model(other)
    try:
        traced = torch.jit.trace(model, example, check_trace=False)
        difference = _largest_difference(expected, traced(other))
        reason = f"the traced model differs from the eager one by {difference:.1e} (relative)"
    except RuntimeError as error:
        difference = float("inf")
        reason = f"tracing failed: {str(error).strip().splitlines()[0]}"
    if difference <= TOLERANCE:
        return traced
    try:
        scripted = torch.jit.script(model)
        if _largest_difference(expected, scripted(other)) <= TOLERANCE:
            return scripted
    except RuntimeError as error:
        reason += f"; scripting failed: {str(error).strip().splitlines()[0]}"
    raise ModelLoadError(
        f"{reason}. Its forward probably depends on the data or the batch size; export the model yourself "
        "(torch.jit.script or torch.export) and pack that as --serialized-file without --model-file."
    )


def _largest_difference(expected, got) -> float:  # type: ignore[no-untyped-def]
    """Relative to the largest magnitude expected; infinite when the structure or a shape differs."""
    import torch

    if isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor):
        if expected.shape != got.shape:
            return float("inf")
        if expected.numel() == 0:
            return 0.0
        scale = max(float(expected.abs().max()), 1e-12)
        difference = float((expected.double() - got.double()).abs().max()) / scale
        return float("inf") if math.isnan(difference) else difference
    if isinstance(expected, dict) and isinstance(got, dict) and expected.keys() == got.keys():
        return max((_largest_difference(expected[key], got[key]) for key in expected), default=0.0)
    if isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)) and len(expected) == len(got):
        return max((_largest_difference(left, right) for left, right in zip(expected, got, strict=True)), default=0.0)
    return float("inf")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
