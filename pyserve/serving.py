"""A server from Python: `serve` puts a module or a file behind HTTP.

    pyserve.serve(net, example=torch.zeros(1, 4))                       # until Ctrl-C
    with pyserve.serve("net.pt2", port=0, block=False) as server:       # in tests and notebooks
        server.client.predict("net", x)

The server is a process of its own, the one of ``pyserve start``: a module is exported into a file first. Importing this
imports no torch.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from pyserve.client import Client
from pyserve.launch import LIFELINE_VARIABLE

if TYPE_CHECKING:
    import torch

    Model = torch.nn.Module | str | os.PathLike[str]
    Example = torch.Tensor | Sequence[torch.Tensor]

STOP_TIMEOUT_S = 60.0
# torch.export and torch.jit keep what they are at in one place for all threads: two at once make wrong programs.
_EXPORTING = threading.Lock()
_SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []


class ServingError(Exception):
    """The model cannot be served; the text says why, and what to do."""


class Serving:
    """A running server. A context that stops it.

    Attributes:
        url: where it answers predictions.
        management_url: where it is managed.
        models: the names of its models.
        client: a `Client` of it.
    """

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, status: dict[str, Any], lifeline: int):
        self._process = process
        self._lifeline = lifeline
        self._folder = folder
        self.url = str(status["addresses"]["inference"])
        self.management_url = str(status["addresses"]["management"])
        self.models = [str(each["model"]) for each in status["models"]]
        self.client = Client(self.url, management=self.management_url)
        atexit.register(self.stop)

    def wait(self) -> None:
        """Returns when the server has ended."""
        self._process.wait()

    def stop(self) -> None:
        """Answers what was accepted, and ends the server. A second call does nothing."""
        if self._lifeline < 0:
            return
        atexit.unregister(self.stop)
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._lifeline)
        self._lifeline = -1
        self.client.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@overload
def serve(
    model: Model, *, example: Example | None = None, handler: str = "tensor", port: int = 8080, name: str | None = None,
    host: str = "127.0.0.1", labels: str | None = None, model_file: str | None = None, config_file: str | None = None,
    block: Literal[True] = True,
) -> None: ...  # fmt: skip


@overload
def serve(
    model: Model, *, example: Example | None = None, handler: str = "tensor", port: int = 8080, name: str | None = None,
    host: str = "127.0.0.1", labels: str | None = None, model_file: str | None = None, config_file: str | None = None,
    block: Literal[False],
) -> Serving: ...  # fmt: skip


def serve(
    model: Model, *, example: Example | None = None, handler: str = "tensor", port: int = 8080, name: str | None = None,
    host: str = "127.0.0.1", labels: str | None = None, model_file: str | None = None, config_file: str | None = None,
    block: bool = True,
) -> Serving | None:  # fmt: skip
    """Serves a model over HTTP and gRPC's protocols of pyserve: ``POST /predictions/NAME`` and the others.

    Args:
        model: a module, which is exported with `torch.export` as it is in eval mode, or scripted if it cannot be; or
            the path of an archive, a folder or a model's file, as ``pyserve start`` takes them.
        example: what the module is called with: a tensor, or one for each of its inputs, with the batch as their first
            dimension. Needed for a module, and for a file that does not say what it takes.
        handler: a built-in one, or the path of a Python file.
        port: for predictions; the model is managed at the next one. 0 for any that are free.
        name: of the model; by default the module's class in lower case, or the file's name.
        host: the address that is listened at; ``0.0.0.0`` for all, where others reach it.
        labels, model_file, config_file: paths, as for ``pyserve start``.
        block: stay until Ctrl-C or SIGTERM. Otherwise the server is returned, a context that stops it.

    Raises:
        ServingError: it cannot be served.
    """
    if name and set(name) & set("=,"):
        raise ServingError(f"name={name!r} cannot be served: such a name has no '=' and no ','")
    given = {"--handler": "" if handler == "tensor" else handler, "--labels": labels, "--model-file": model_file,
             "--config-file": config_file}  # fmt: skip
    flags = [part for flag, value in given.items() if value for part in (flag, value)]
    kinds = ("inference", "management", "metrics")
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    addresses = [part for number, kind in enumerate(kinds)
                 for part in (f"--{kind}-address", f"http://{shown}:{port + number if port else 0}")]  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="pyserve-serve-"))
    try:
        serving = _started(model, folder, example, name, [*addresses, *flags])
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if not block:
        return serving
    with serving, _ended_by_sigterm(), contextlib.suppress(KeyboardInterrupt):
        print(f"{', '.join(serving.models)}: {serving.url}/predictions/{serving.models[0]}; Ctrl-C stops", flush=True)
        serving.wait()
    return None


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Meanwhile SIGTERM is what Ctrl-C is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _started(model: Model, folder: Path, example: Example | None, name: str | None, flags: list[str]) -> Serving:
    examples = None if example is None else as_tuple(example)
    if isinstance(model, str | os.PathLike):
        path = Path(model).absolute()
        says_inputs = path.is_dir() or examples is None
    else:
        path = written_module(model, folder, examples, name or type(model).__name__.lower())
        says_inputs = path.suffix == ".pt2"
    arguments = [f"{name}={path}" if name else str(path)]
    arguments += flags
    if examples is not None and not says_inputs:
        arguments += [part for text in input_texts(examples) for part in ("--input", text)]
    pid_path = str(folder / "pyserve.pid")
    command = [sys.executable, *_SAFE_PATH, "-m", "pyserve"]
    common = ["--pid-file", pid_path, "--grpc", "false", "--no-config-snapshots", "--strict"]
    # However this process ends, that closes the pipe, and the server ends too.
    lifeline, ours = os.pipe()
    environment = {"PYTHONPATH": _python_path(), "LOG_LOCATION": str(folder / "logs"), LIFELINE_VARIABLE: str(lifeline)}
    try:
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                [*command, "start", *arguments, "--foreground", *common], stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, **environment}, start_new_session=True, pass_fds=[lifeline],
            )  # fmt: skip
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(lifeline)
    if not _is_ready(process):
        process.wait()
        os.close(ours)
        raise ServingError(_reason(folder / "log") or f"the server ended with exit code {process.returncode}")
    status = subprocess.run(
        [*command, "status", "--json", "--pid-file", pid_path], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": _python_path()},
    )  # fmt: skip
    return Serving(process, folder, json.loads(status.stdout), ours)


def as_tuple(example: Example) -> tuple[torch.Tensor, ...]:
    """One tensor for each input."""
    return tuple(example) if isinstance(example, list | tuple) else (cast("torch.Tensor", example),)


def _python_path() -> str:
    own = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, [own, os.environ.get("PYTHONPATH", "")]))


def _is_ready(process: subprocess.Popen[bytes]) -> bool:
    """Reads what the command prints, up to the line that says that it serves."""
    assert process.stdout is not None
    with process.stdout as output:
        return any(line.startswith(b"Model server started") for line in output)


def _reason(log: Path) -> str:
    """The last error in what the server wrote."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("pyserve: error: ")]
    reasons = [line.strip() for line in lines if line.startswith("    ")]  # of models, beneath their rows
    return "; ".join([*(each.removeprefix("pyserve: error: ") for each in errors[-1:]), *reasons[-1:]])


# --- a module -------------------------------------------------------------------------------------------------------


def written_module(module: Any, folder: Path, examples: tuple[torch.Tensor, ...] | None, name: str) -> Path:
    """A file with the module, in eval mode.

    Raises:
        ServingError: it can neither be exported nor scripted, or there is no example.
    """
    import torch

    if "/" in name or not name.isprintable():
        raise ServingError(f"name={name!r} is no name of a model: it is a part of addresses, without '/'")
    if not isinstance(module, torch.nn.Module):
        raise ServingError(f"{type(module).__name__} is neither a torch.nn.Module nor the path of a model")
    if not examples:
        raise ServingError("a module needs example=, what it is called with: a tensor with the batch as dimension 0")
    other = next((each for each in examples if not isinstance(each, torch.Tensor)), None)
    if other is not None:
        kind = type(other).__name__
        raise ServingError(f"example= is a tensor, or one for each input, not {kind}; torch.as_tensor makes one")
    if any(not each.dim() or not each.shape[0] for each in examples):
        raise ServingError("each tensor of example= needs the batch as its first dimension, such as [1, 3, 224, 224]")
    with _EXPORTING, _in_eval_mode(module), torch.no_grad():
        if isinstance(module, torch.jit.ScriptModule):
            torch.jit.save(module, str(folder / f"{name}.pt"))
            return folder / f"{name}.pt"
        try:
            with _quiet_export():
                program = _exported(module, examples)
        except Exception as export_error:  # of many classes
            _check_call(module, examples)
            try:
                torch.jit.save(torch.jit.script(module), str(folder / f"{name}.pt"))
            except Exception:
                first = (str(export_error).strip().splitlines() or [type(export_error).__name__])[0]
                raise ServingError(
                    f"{type(module).__name__} can neither be exported nor scripted: {first}; save its weights and give "
                    "their path with model_file="
                ) from export_error
            return folder / f"{name}.pt"
        torch.export.save(program, folder / f"{name}.pt2")
    return folder / f"{name}.pt2"


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    """torch logs hundreds of lines of a failure that it raises, too."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _check_call(module: torch.nn.Module, examples: tuple[torch.Tensor, ...]) -> None:
    """Raises ServingError if the module cannot be called with them. What a call changes in its state is put back."""
    state = copy.deepcopy(module.state_dict())
    try:
        module(*examples)
    except Exception as error:
        given = ", ".join(f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in examples)
        first = (str(error).strip().splitlines() or [""])[0]
        raise ServingError(
            f"{type(module).__name__} cannot be called with example= ({given}): {type(error).__name__}: {first}"
        ) from error
    finally:
        module.load_state_dict(state)


def _exported(module: torch.nn.Module, examples: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    """With a batch of any size if it can be had."""
    import torch

    # A dimension of one would be taken for a constant.
    two = tuple(torch.cat([each, each]) if each.shape[0] == 1 else each for each in examples)
    batch = torch.export.Dim("batch", min=1)
    try:
        return torch.export.export(module, two, dynamic_shapes=tuple({0: batch} for _ in two))
    except Exception:  # it is for one size, or takes its arguments otherwise
        return torch.export.export(module, examples)


@contextlib.contextmanager
def _in_eval_mode(module: torch.nn.Module) -> Iterator[None]:
    """Meanwhile; each part is put back as it was."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


def input_texts(examples: Sequence[torch.Tensor]) -> list[str]:
    """As ``--input`` takes them, of one item each."""
    shapes = [(str(each.dtype).removeprefix("torch."), ",".join(map(str, each.shape[1:]))) for each in examples]
    if len(shapes) == 1:
        return [f"{dtype}:{sizes}" for dtype, sizes in shapes]
    return [f"input_{number}={dtype}:{sizes}" for number, (dtype, sizes) in enumerate(shapes)]
