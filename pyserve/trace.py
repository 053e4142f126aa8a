"""Turns an eager model (model file and state dict) into TorchScript, in a process of its own.

A process of its own because the model file is somebody's code: it may import its neighbours under names another
archive uses too, change globals or crash. What comes out is data, kept in the archive's cache, so that the second
start does not trace again.

The parent side needs no torch, so that a server can begin tracing before it imports torch itself.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from pyserve.archive import Archive, open_archive
from pyserve.errors import ModelLoadError, ServeError
from pyserve.manifest import PYTHON_HANDLERS

Progress = Callable[[str], None]

# Models are frozen here, where it is done once, if nothing has to be changed in them afterwards.
_FROZEN_AS = ("fp32", "contiguous")
# Largest difference between the eager and the traced model's outputs, relative to the largest output.
TOLERANCE = 1e-5


class NeedsPythonError(ModelLoadError):
    """The archive is fine, but the native lane cannot run it: it has to run in a worker process."""


def traced_file(archive: Archive) -> Path:
    """Where the TorchScript made from this archive by this torch, for its precision, is kept."""
    kind = "traced" if _is_frozen(archive) else "traced-unfrozen"
    return archive.cache_file(f"{kind}-torch-{version('torch')}.pt")


def _is_frozen(archive: Archive) -> bool:
    config = archive.config
    return (config.precision or "fp32", config.memory_format or "contiguous") == _FROZEN_AS


def untraceable_note(archive: Archive) -> Path:
    """Where it is kept why this torch cannot make TorchScript of this archive, so that it is tried only once."""
    return archive.cache_file(f"untraceable-torch-{version('torch')}.txt")


class Tracing:
    """A running conversion. `wait` or `stop` must be called.

    The child reports through a pipe of its own, so that what the model file prints is nobody's business.
    """

    def __init__(self, archive: Archive):
        self._archive = archive
        folder = Path(__file__).parent.parent
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
        freezes = "frozen" if _is_frozen(archive) else "unfrozen"
        self._reports, for_child = os.pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop; a pipe would have to be read too
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pyserve.trace", str(archive.path), str(traced_file(archive)), freezes,
                 str(for_child)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=(for_child,),
                env={**os.environ, "PYTHONPATH": path},
            )
        finally:
            os.close(for_child)
        self._is_over = False

    def wait(self, progress: Progress, timeout_s: float) -> Path:
        """The TorchScript file.

        Raises:
            NeedsPythonError: it works, but cannot be converted.
            ModelLoadError: the model cannot be built, or does not fit its weights.
        """
        deadline = time.monotonic() + timeout_s
        problem: str | None = None
        works = False
        try:
            for line in self._lines(deadline):
                report = json.loads(line)
                problem = report.get("error", problem)
                works = report.get("works", works)
                if "progress" in report:
                    progress(report["progress"])
            status = self._process.wait(max(0.0, deadline - time.monotonic()))
            last = self._last_error_line()
        except (TimeoutError, subprocess.TimeoutExpired):
            raise ModelLoadError(
                f"tracing {self._archive.name} took longer than startup_timeout={timeout_s} s; raise startupTimeout in "
                "its model-config.yaml"
            ) from None
        finally:
            self.stop()
        if status == 0:
            return traced_file(self._archive)
        if works and problem:
            untraceable_note(self._archive).write_text(problem)
            raise NeedsPythonError(problem)
        raise ModelLoadError(problem or f"tracing {self._archive.name} failed: {_ending(status)}{last}")

    def _lines(self, deadline: float) -> Iterator[bytes]:
        """The child's reports until it ends.

        Raises:
            TimeoutError: it has not by ``deadline``.
        """
        rest = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._reports, selectors.EVENT_READ)
            while selector.select(max(0.0, deadline - time.monotonic())):
                chunk = os.read(self._reports, 1 << 16)
                if not chunk:
                    return
                *lines, rest = (rest + chunk).split(b"\n")
                yield from lines
        raise TimeoutError

    def _last_error_line(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def stop(self) -> None:
        """Ends the child, if it still runs, and lets go of it."""
        if self._is_over:
            return
        self._is_over = True
        self._process.kill()
        self._process.wait()
        os.close(self._reports)
        self._stderr.close()


def _ending(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def needs_tracing(archive: Archive) -> bool:
    """Whether there is a model file, a handler that runs in the native lane, and no conversion kept."""
    if archive.manifest.model_file is None or runs_in_python(archive):
        return False
    return not traced_file(archive).exists() and not untraceable_note(archive).exists()


def runs_in_python(archive: Archive) -> bool:
    """Whether the archive's handler, as far as can be told without torch, is one for worker processes."""
    name, colon, _ = archive.manifest.handler.rpartition("/")[2].partition(":")
    name = name.removesuffix(".py")
    brings_code = f"{name}.py" in archive.files and archive.config.raw.get("isolation") != "thread"
    return bool(colon) or brings_code or name in PYTHON_HANDLERS


def native_example(handler, context):  # type: ignore[no-untyped-def]  # the parent side has no torch
    """One item as the handler's `preprocess` makes it: a tuple of tensors [1, ...], one per input of the model.

    Raises:
        NeedsPythonError: nobody says what it looks like, so nothing can be traced or warmed up with it.
    """
    try:
        example = handler.example_input(context)
        return example if isinstance(example, tuple) else (example,)
    except ModelLoadError as error:
        raise NeedsPythonError(error.message) from error


def check_packed(path: Path, progress: Progress, timeout_s: float = 600.0) -> str:
    """Traces a freshly packed eager archive: it is shown to load, and its first start here finds the work done.

    Does nothing for other archives, and where torch is not installed.

    Returns:
        Why it will run in worker processes although its handler would not need them; or ``""``.

    Raises:
        ModelLoadError: it cannot be served as it was packed.
    """
    if importlib.util.find_spec("torch") is None:
        return ""
    with open_archive(path) as archive:
        if needs_tracing(archive):
            try:
                Tracing(archive).wait(progress, timeout_s)
            except NeedsPythonError as error:
                return error.message
    return ""


def main(archive_path: str, out_path: str, freezes: str, descriptor: str) -> int:
    """The child: writes JSON lines with ``progress`` or ``error`` to ``descriptor``."""
    gc.disable()  # importing torch makes millions of objects that all stay
    os.set_inheritable(int(descriptor), False)

    def report(**fields: str | bool) -> None:
        os.write(int(descriptor), json.dumps(fields).encode() + b"\n")

    try:
        _trace(archive_path, Path(out_path), lambda text: report(progress=text), freezes=freezes == "frozen")
    except ServeError as error:
        report(error=error.message, works=isinstance(error, NeedsPythonError))
        return 1
    except Exception as error:
        report(error=f"{type(error).__name__} while tracing the model: {_first_line(error)}")
        return 1
    return 0


def _trace(archive_path: str, out: Path, progress: Progress, *, freezes: bool) -> None:
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
    example = native_example(handler, context)
    progress("building the model and reading its weights")
    os.chdir(archive.model_dir)
    weights = archive.weights.open() if archive.weights is not None else None
    model = load_eager_model(archive.model_dir, manifest.model_file, weights)
    progress("tracing")
    # A network runs only a few times here; the profiling executor would spend those on measuring it.
    torch._C._jit_set_profiling_mode(False)
    with torch.inference_mode(False), torch.no_grad():
        scripted = _to_torchscript(model, example, freezes=freezes)
    progress("keeping the TorchScript")
    descriptor, temporary = tempfile.mkstemp(dir=out.parent, suffix=".pt")
    os.close(descriptor)
    try:
        torch.jit.save(scripted, temporary)
        os.replace(temporary, out)
    except BaseException:
        os.unlink(temporary)
        raise


def _to_torchscript(model, example, *, freezes: bool):  # type: ignore[no-untyped-def]  # the child imports torch
    """Traced if that is true to the eager model on other inputs and another batch size, else scripted.

    Where the tracer warns that it follows one branch of several, scripting comes first, and the comparison is made
    on more inputs: one that happens to take the traced branch proves nothing.
    """
    import torch

    torch.manual_seed(0)
    other = [torch.cat([each, each]) for each in example]
    other = [each + torch.randn_like(each) * 0.1 if each.is_floating_point() else each for each in other]
    inputs = [other]
    reasons = []
    traced = None

    def copied(tensors):  # type: ignore[no-untyped-def]  # a model may change its input in place
        return tuple(each.clone() for each in tensors)

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", torch.jit.TracerWarning)
            traced = torch.jit.trace(model, copied(example), check_trace=False)
        if any(issubclass(warning.category, torch.jit.TracerWarning) for warning in caught):
            inputs.append([-3 * each if each.is_floating_point() else each.flip(-1) for each in other])
            inputs.append([torch.zeros_like(each) if each.is_floating_point() else each for each in other])
    except Exception as error:  # the model's own code runs here, and may raise anything
        reasons.append(f"tracing failed: {_first_line(error)}")
    expected = [model(*copied(each)) for each in inputs]

    def is_true(converted) -> bool:  # type: ignore[no-untyped-def]
        pairs = zip(expected, inputs, strict=True)
        difference = max(_largest_difference(wanted, converted(*copied(each))) for wanted, each in pairs)
        if difference > TOLERANCE:
            reasons.append(f"the converted model differs from the eager one by {difference:.1e} (relative)")
        return difference <= TOLERANCE

    for convert in (lambda: traced, lambda: torch.jit.script(model))[:: -1 if len(inputs) > 1 else 1]:
        try:
            converted = convert()
            if converted is None:
                continue
            if freezes:
                converted = torch.jit.freeze(converted.eval())
            if is_true(converted):
                return converted
        except Exception as error:
            reasons.append(f"scripting failed: {_first_line(error)}")
    raise NeedsPythonError(
        f"{'; '.join(reasons)}. Its forward probably depends on the data or the batch size; export the model yourself "
        "(torch.jit.script or torch.export) and pack that as --serialized-file without --model-file."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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
    sys.exit(main(*sys.argv[1:]))
