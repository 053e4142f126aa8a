"""AOTInductor's package of a program: compiled for this CPU with a free batch, loaded again, and run for the
comparison."""  # fmt: skip

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pyserve.backends.divisions import counts_inexactly
from pyserve.backends.quantized import inductor_program
from pyserve.backends.sources import Source, UnsuitableError, leaves
from pyserve.backends.table import AOTINDUCTOR, BACKENDS
from pyserve.conversion.export_script import export_inputs
from pyserve.errors import ModelLoadError
from pyserve.proof.package_rules import read_program
from pyserve.torch_error import cause_of

_SETTINGS: dict[str, Any] = {
    "freezing": True,  # weights are laid out once, when it is compiled
    "cpp.dynamic_threads": True,  # as many as the worker that runs it has, not as many as this process
    "cpp_cache_precompile_headers": False,  # made anew for each, which takes longer than it saves
    "aot_inductor.precompile_headers": False,
    "compile_threads": 1,
    "worker_start_method": "subprocess",
}


def make(source: Source, folder: Path, precision: str) -> Callable[[Sequence[torch.Tensor]], list[Any]]:
    """Writes ``package.pt2`` to ``folder``.

    Returns:
        what answers as the model does: the parts of its output, in order.

    Raises:
        UnsuitableError: it cannot be made; the text says why.
        Exception: torch's, of many classes, if compiling fails.
    """
    scratch = folder / "scratch"
    scratch.mkdir()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch)
    import torch._inductor
    from torch._inductor import config

    path = folder / BACKENDS[AOTINDUCTOR].file
    known = {name: value for name, value in _SETTINGS.items() if _has(config, name)}
    _check(source.program())
    lowered = _at(source, precision)
    with torch.no_grad(), config.patch(known):
        torch._inductor.aoti_compile_and_package(lowered, package_path=str(path))
    try:
        program = read_program(path, path.name)
    except ModelLoadError as error:
        raise UnsuitableError(error.message) from error
    if program.written:
        raise UnsuitableError(f"the package writes to its buffer {program.written[0]}, or gives it away")
    call = torch._inductor.aoti_load_package(str(path))

    def run(inputs: Sequence[torch.Tensor]) -> list[Any]:
        with torch.no_grad():
            return [each.clone() if isinstance(each, torch.Tensor) else each for each in leaves(call(*inputs))]

    return run


def _check(program: Any) -> None:
    """That what is compiled computes as torch does, as far as probes cannot show it.

    Raises:
        UnsuitableError: it does not.
    """
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point() and counts_inexactly(node):
            raise UnsuitableError("it asks how often one number goes into another, which AOTInductor rounds otherwise")


def _at(source: Source, precision: str) -> Any:
    """The program at ``precision``; it takes and gives fp32."""
    inputs, _ = export_inputs(source.example, source.domains)
    try:
        program, note = inductor_program(
            source.program(), precision, source.items, example=inputs, export=source.export_again,
            progress=source.progress,
        )  # fmt: skip
    except Exception as error:  # torch's and torchao's, of many classes
        cause = cause_of(str(error)) or type(error).__name__
        raise UnsuitableError(f"torch cannot make it {precision}: {cause}") from error
    source.notes += [note] if note else []
    return program


def _has(config: Any, name: str) -> bool:
    """Whether this torch knows the setting."""
    for part in name.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True
