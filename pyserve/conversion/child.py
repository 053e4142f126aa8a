"""The process that converts one archive's model, eager or exported: builds it, makes TorchScript of it, and keeps that.

What it finds goes to the parent (`conversion.torchscript`) as JSON lines, so that what the model file prints is
nobody's business.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pyserve.archive.archive import Archive, open_archive
from pyserve.archive.drafts import check_writable, write_whole
from pyserve.archive.samples import archive_samples
from pyserve.conversion.record import NeedsPythonError, conversion_file, conversion_text
from pyserve.conversion.torchscript import native_example
from pyserve.errors import ModelLoadError, ServeError
from pyserve.os_errors import cause_of as os_cause_of
from pyserve.torch_error import cause_of

CODE_SIZE = 1 << 20  # bytes; of TorchScript beside its weights


def main(archive_path: str, out_path: str, freezes: str, handler: str, descriptor: str) -> int:
    """Writes JSON lines with ``progress`` or ``error`` to ``descriptor``. Returns the exit code."""
    gc.disable()  # importing torch makes millions of objects that all stay
    os.set_inheritable(int(descriptor), False)
    threading.Thread(target=_end_with_reader, args=(int(descriptor),), daemon=True).start()

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


def _end_with_reader(descriptor: int) -> None:
    """Ends this process once nobody reads its reports: the process that wanted the model has gone."""
    poll = select.poll()
    poll.register(descriptor, 0)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)


def _convert(archive: Archive, out: Path, progress: Callable[[str], None], *, freezes: bool) -> None:
    from pyserve.context import Context
    from pyserve.worker.handler_choice import load_handler

    handler = load_handler(archive)
    archive.check_complete()
    folder = archive.own_folder()  # the model file is code of the archive, which may write
    manifest = archive.manifest
    context = Context(manifest.model_name, str(folder), manifest.raw, model_yaml_config=archive.config.raw)
    handler.prepare(context)
    example = native_example(handler, context)
    samples = sample_probes(handler, archive.model_dir, example)
    os.chdir(folder)
    program, conversion, size = (_exported if manifest.model_file is None else _eager)(
        archive, handler, example, samples, progress, folder=folder, freezes=freezes
    )
    progress("keeping the TorchScript")
    check_room(archive.name, out.parent, size)
    try:
        write_whole(conversion_file(out), lambda path: Path(path).write_text(conversion_text(conversion)))
        write_whole(out, lambda path: _save(program, Path(path), size))
    except OSError as error:
        raise ModelLoadError(
            f"{archive.name}: its TorchScript cannot be kept in the cache folder: {os_cause_of(error)}; free space, or "
            "set PYSERVE_CACHE to a folder on a larger disk"
        ) from error


def _save(program: Any, path: Path, size: int) -> None:
    import torch

    check_writable(path, size)  # torch would end the process
    torch.jit.save(program, path)


def _eager(
    archive: Archive, handler: Any, example: tuple[Any, ...], samples: list[Any], progress: Callable[[str], None], *,
    folder: Path, freezes: bool,
) -> tuple[Any, Any, int]:  # fmt: skip
    """TorchScript of the model file's model, how it came about, and the size of the weights in bytes."""
    from pyserve.conversion.convert import convert
    from pyserve.handlers.eager import load_eager_model
    from pyserve.proof.probe_inputs import InputDomain

    model_file, weights = archive.manifest.model_file, archive.weights
    assert model_file is not None
    progress("building the model and reading its weights")
    name = weights.name if weights is not None else ""
    model = load_eager_model(folder, model_file, weights.open() if weights is not None else None, name=name)
    progress("tracing")
    with _converting():
        domains = InputDomain.of(handler, example)
        how = archive.config.conversion
        program, conversion = convert(model, example, domains, samples, how=how, freezes=freezes)
    return program, conversion, weights_size(model)


def _exported(
    archive: Archive, handler: Any, example: tuple[Any, ...], samples: list[Any], progress: Callable[[str], None], *,
    folder: Path, freezes: bool,
) -> tuple[Any, Any, int]:  # fmt: skip
    """As `_eager`, of a program that torch.export saved."""
    from pyserve.conversion.exported import script_exported

    progress("reading the exported program")
    with _converting():
        program, conversion = script_exported(archive, handler, example, samples, freezes=freezes)
    return program, conversion, archive.weights.size if archive.weights is not None else 0


@contextlib.contextmanager
def _converting() -> Iterator[None]:
    """No gradients inside of it; whatever fails there and is no error of ours is left to worker processes."""
    import torch

    # A network runs only a few times here; the profiling executor would spend those on measuring it.
    torch._C._jit_set_profiling_mode(False)
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    except ServeError:
        raise
    except Exception as error:
        # Models are copied to be tried, which not all survive. A worker process tries the one that was built.
        cause = cause_of(str(error))
        raise NeedsPythonError(f"converting it failed: {type(error).__name__}{': ' if cause else ''}{cause}") from error


def sample_probes(handler: Any, model_dir: Path, example: tuple[Any, ...]) -> list[Any]:
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


def weights_size(model: Any) -> int:
    """In bytes; 0 if its tensors do not say."""
    try:
        return sum(tensor.nbytes for tensor in dict.fromkeys([*model.parameters(), *model.buffers()]))
    except Exception:  # of tensors that have no such size, or no memory yet
        return 0


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    atexit._run_exitfuncs()  # the model's, perhaps
    sys.stderr.flush()
    os._exit(code)  # somebody waits: to take all of torch apart takes a while, and threads of the model's may not end
