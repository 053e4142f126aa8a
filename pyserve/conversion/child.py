"""The process that converts one eager archive's model: builds it, makes TorchScript of it, and keeps that.

What it finds goes to the parent (pyserve/trace.py) as JSON lines, so that what the model file prints is nobody's
business.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyserve.archive.archive import Archive, open_archive
from pyserve.archive.samples import archive_samples
from pyserve.conversion.record import NeedsPythonError, conversion_file, conversion_text
from pyserve.conversion.torchscript import native_example
from pyserve.errors import ModelLoadError, ServeError
from pyserve.torch_error import cause_of

CODE_SIZE = 1 << 20  # bytes; of TorchScript beside its weights


def main(archive_path: str, out_path: str, freezes: str, handler: str, descriptor: str) -> int:
    """Writes JSON lines with ``progress`` or ``error`` to ``descriptor``. Returns the exit code."""
    gc.disable()  # importing torch makes millions of objects that all stay
    atexit.register(gc.freeze)  # even at the end: to look through them takes 0.4 s, and the memory goes back anyway
    os.set_inheritable(int(descriptor), False)

    def report(**fields: str | bool) -> None:
        os.write(int(descriptor), json.dumps(fields).encode() + b"\n")

    try:
        with open_archive(archive_path) as archive:
            archive.use_handler(handler)
            _convert(archive, Path(out_path), lambda text: report(progress=text), freezes=freezes == "frozen")
    except ServeError as error:
        report(error=error.message, works=isinstance(error, NeedsPythonError))
        return 1
    except Exception as error:
        cause = cause_of(str(error))
        report(error=f"{type(error).__name__} while tracing the model{': ' if cause else ''}{cause}")
        return 1
    return 0


def _convert(archive: Archive, out: Path, progress: Callable[[str], None], *, freezes: bool) -> None:
    import torch

    from pyserve.context import Context
    from pyserve.conversion.convert import convert
    from pyserve.handlers.eager import load_eager_model
    from pyserve.proof.probe_inputs import InputDomain
    from pyserve.worker.handler_choice import load_handler

    manifest = archive.manifest
    assert manifest.model_file is not None
    handler = load_handler(archive)
    archive.check_complete()
    folder = archive.own_folder()  # the model file is code of the archive, which may write
    context = Context(manifest.model_name, str(folder), manifest.raw, model_yaml_config=archive.config.raw)
    handler.prepare(context)
    example = native_example(handler, context)
    samples = _sample_probes(handler, archive.model_dir, example)
    progress("building the model and reading its weights")
    os.chdir(folder)
    weights = archive.weights.open() if archive.weights is not None else None
    model = load_eager_model(folder, manifest.model_file, weights)
    progress("tracing")
    # A network runs only a few times here; the profiling executor would spend those on measuring it.
    torch._C._jit_set_profiling_mode(False)
    try:
        with torch.inference_mode(False), torch.no_grad():
            domains = InputDomain.of(handler, example)
            how = archive.config.conversion
            program, conversion = convert(model, example, domains, samples, how=how, freezes=freezes)
    except ServeError:
        raise
    except Exception as error:
        # Models are copied to be tried, which not all survive. A worker process tries the one that was built.
        cause = cause_of(str(error))
        raise NeedsPythonError(f"converting it failed: {type(error).__name__}{': ' if cause else ''}{cause}") from error
    progress("keeping the TorchScript")
    check_room(archive.name, out.parent, _weights_size(model))
    _keep(conversion_file(out), lambda path: Path(path).write_text(conversion_text(conversion)))
    _keep(out, lambda path: torch.jit.save(program, path))


def _sample_probes(handler: Any, model_dir: Path, example: tuple[Any, ...]) -> list[Any]:
    """What the handler makes of the archive's own samples; those that it cannot read, or not alone, are left out."""
    import torch

    from pyserve.proof.probe_inputs import Probe

    probes = []
    for sample in archive_samples(model_dir):
        try:
            body = json.loads(sample.body) if sample.content_type == "application/json" else sample.body
            made = handler.preprocess([{"body": body}])
        except Exception:
            continue
        inputs = made if isinstance(made, tuple) else (made,)
        if len(inputs) == len(example) and all(isinstance(each, torch.Tensor) for each in inputs):
            probes.append(Probe(sample.name, inputs))
    return probes


def check_room(name: str, folder: Path, size: int) -> None:
    """That ``size`` bytes and a little more can be written to ``folder``: torch ends the process on a full disk.

    Raises:
        ModelLoadError: they cannot.
    """
    room = shutil.disk_usage(folder).free
    if room < size + CODE_SIZE:
        raise ModelLoadError(
            f"{name}: its TorchScript, about {size + CODE_SIZE} bytes, cannot be kept: the disk of the cache folder is "
            f"full ({room} bytes are free); free space, or set PYSERVE_CACHE to a folder on a larger disk"
        )


def _weights_size(model: Any) -> int:
    """In bytes; 0 if it cannot be told."""
    try:
        return sum(tensor.nbytes for tensor in dict.fromkeys([*model.parameters(), *model.buffers()]))
    except Exception:  # of tensors that have no such size, or no memory yet
        return 0


def _keep(path: Path, write: Callable[[str], object]) -> None:
    """Writes a file under another name first: a file that is there is whole."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(descriptor)
    try:
        write(temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
