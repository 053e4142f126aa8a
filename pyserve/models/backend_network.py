"""A loaded network on another backend than TorchScript: loaded, compared, or left out with the reason.

Runs in a thread of its own; nothing here touches the event loop.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pyserve.archive.archive import Archive
from pyserve.backends import openvino
from pyserve.backends.exact_numbers import exact_ranges
from pyserve.backends.kept import Made, forget_damaged, main_file
from pyserve.backends.making import Making
from pyserve.backends.precision import plain_precision
from pyserve.backends.shown import shown
from pyserve.backends.table import AGREEMENT, AOTINDUCTOR, BACKENDS, OPENVINO, TORCHSCRIPT
from pyserve.backends.trial import PROBES_MIN, probes_of
from pyserve.conversion.export_script import free_names
from pyserve.conversion.torchscript import Progress, traced_file
from pyserve.devices import CPU
from pyserve.engine import load_core
from pyserve.errors import ModelLoadError
from pyserve.lanes.network import Network
from pyserve.proof.agreement import Agreement, Precisions, agreement
from pyserve.proof.exact_answers import in_double
from pyserve.proof.native_proof import BatchProof, hides_overflow, single_row_differs
from pyserve.proof.package_rules import SPECIALIZED_MIN, Dimension, Program, read_program
from pyserve.proof.probe_inputs import ITEMS_MAX, LARGEST_SIZE_MAX, InputDomain, batch_rows
from pyserve.proof.repeats import why_composed, why_not_repeated

log = logging.getLogger(__name__)

_ANY = Dimension(1, None)
# How long batches of a backend that is named may be tried before the model is ready; the lane tries larger ones later.
BATCHES_S = 10.0
# What is known of a network for the way that TorchScript runs it, and says nothing of another backend.
_OF_TORCHSCRIPT = ("optimization", "memoryFormat", "precision")


@dataclass(frozen=True)
class Split:
    """How the CPUs are shared: batches that run at once, and the threads of each."""

    workers: int = 1
    threads: int = 1
    runners_max: int = 1

    @classmethod
    def of(cls, workers: int, cpu_budget: int) -> Split:
        """Of ``workers``, where no other model has any."""
        return cls(workers, max(1, cpu_budget // max(1, workers)), max(1, cpu_budget))


def conservative_reason(network: Network, batch_size: int) -> str:
    """Why a network stays on the backend that it was loaded for, whatever others would give; ``""`` if it need not.

    Runs it some times: an answer has to be its input's alone.
    """
    model = network.torch_model
    if network.device != CPU:
        return f"it runs on {network.device}"
    if getattr(model, "backend", TORCHSCRIPT) != TORCHSCRIPT:
        return "its archive has a compiled package, which runs as it is"
    if model.state:
        return f"it keeps state: {model.state}"
    items = batch_rows(network.example, network.domains, ITEMS_MAX)
    if problem := why_not_repeated(network.run, items):
        return f"it {problem}"
    proof = network.batches
    if proof is not None and proof.note and proof.rows_max is None:
        return f"its answers depend on the batch, or could not be shown not to: {proof.probe or proof.note}"
    problem = why_composed(network.run, items) if batch_size > 1 else ""
    return f"it {problem}" if problem else ""


def load_backend(archive: Archive, network: Network, made: Made, split: Split) -> Network:
    """``network`` on the backend of ``made``, with nothing shown of it yet but that it takes the example.

    Its answers have the structure of the network's own, and what it was not made for goes to the plain TorchScript.

    Raises:
        ModelLoadError: it cannot be loaded, or cannot be believed; the text says why.
    """
    if made.error:
        raise ModelLoadError(made.error)
    row = BACKENDS[made.backend]
    if damaged := forget_damaged(archive, [made.backend], made.precision):
        raise ModelLoadError(f"{damaged[made.backend]}; it is made again when it is asked for next")
    path = main_file(archive, made.backend, made.precision)
    program = read_program(path, row.label) if made.backend == AOTINDUCTOR else None
    library = openvino.library() if made.backend == OPENVINO else None
    options: dict[str, Any] = {
        "backend": made.backend,
        "library": "" if library is None else str(library),
        "precision": plain_precision(made.precision),  # int8 takes and gives fp32
        "rules": input_rules(network, program, made.sizes),
        "value_ranges": _value_ranges(made, network.domains),
        "rows_min": program.rows_min if program is not None else 1,
        "rows_max": _rows_max(network, program),
        "runners_max": split.runners_max,
        "workers": split.workers,
        "threads": split.threads,
    }
    if options["precision"] != "fp32":
        options["others"] = [list(item) for item in batch_rows(network.example, network.domains, ITEMS_MAX)]
    model = _load(archive, network, path, options)
    # torch compiles a free batch for two rows and more, and says nothing of one.
    if program is not None and program.takes_one_row_unsaid and single_row_differs(model, network.example):
        model = _load(archive, network, path, {**options, "rows_min": SPECIALIZED_MIN})
    findings = {name: value for name, value in network.findings.items() if name not in _OF_TORCHSCRIPT}
    candidate = replace(network, torch_model=model, copies={}, findings=findings, in_layout=None, making=None)
    candidate.batches = fresh_proof(network.batches, candidate)
    return candidate


@contextlib.contextmanager
def released_unless_used(candidate: Network) -> Iterator[Network]:
    """Lets go of its weights where the block raises: the error, which somebody may keep, refers to what was in it."""
    try:
        yield candidate
    except BaseException:
        candidate.release()
        raise


def _value_ranges(made: Made, domains: Sequence[InputDomain]) -> list[tuple[int, int] | None]:
    """The whole numbers that each input may hold: those that it was made for, as far as the backend is exact."""
    ranges = list(made.ranges) or [None] * len(domains)
    return exact_ranges(ranges, domains) if made.backend == OPENVINO else ranges


def _load(archive: Archive, network: Network, path: Path, options: dict[str, Any]) -> Any:
    try:
        return _with_plain(
            archive, lambda plain: load_core().TorchModel.load(str(path), network.example, plain=plain, **options)
        )
    except (RuntimeError, ValueError) as error:
        label = BACKENDS[options["backend"]].label
        raise ModelLoadError(
            f"{label} cannot run it: {openvino.cause_of(str(error)) or type(error).__name__}"
        ) from error


def _rows_max(network: Network, program: Program | None) -> int:
    """The largest batch that it may be called with; 0 for any."""
    known = [
        rows for rows in (network.batches.rows_max if network.batches is not None else None,
                          program.rows_max if program is not None else None) if rows is not None
    ]  # fmt: skip
    return min(known, default=0)


def _with_plain(archive: Archive, load: Callable[[tuple[str, int, int]], Any]) -> Any:
    """Calls ``load`` with where the plain TorchScript lies: (path, offset, size)."""
    if traced_file(archive).exists():
        return load((str(traced_file(archive)), 0, -1))
    weights = archive.weights
    assert weights is not None
    with weights.pinned() as descriptor:
        return load((str(Path(f"/proc/self/fd/{descriptor}")), weights.offset, weights.size))


def fresh_proof(proof: BatchProof | None, candidate: Network) -> BatchProof | None:
    """What is to be shown of the candidate's batches: as of TorchScript's, from the beginning."""
    if proof is None:
        return None
    # Of a twin: a network that its own proof refers to, and the weights, would stay until a full collection.
    run = replace(candidate, batches=None).run
    return BatchProof(run, proof.rows, proof.tolerance, proof.rows_max, proof.is_allowed, proof.look, proof.others)


def input_rules(
    network: Network, program: Program | None = None, made: Sequence[Sequence[tuple[int, int | None]]] = ()
) -> list[tuple[str, Any, list[tuple[int, int, str]]]]:
    """What a backend was made for, as ``_core.TorchModel.load`` takes it: the sizes of each input without the batch.

    Free dimensions that were exported under one name have one size. One without a largest size ends where trying it
    did.

    Args:
        program: what the source of a compiled package says.
        made: the sizes that the program was proven for, see `kept.Made`; empty if nothing is known.
    """
    rules = []
    for number, domain in enumerate(network.domains):
        names = dict(free_names(domain))
        limits = program.inputs[number].dimensions[1:] if program is not None else [_ANY] * len(domain.sizes)
        proven = made[number] if made else [(1, None)] * len(domain.sizes)
        sizes = []
        for axis, (known, limit, shown_for) in enumerate(zip(domain.sizes, limits, proven, strict=True)):
            least = max(known[0], limit.min, shown_for[0])
            largest = [each for each in (known[1], limit.max, shown_for[1]) if each is not None]
            sizes.append((least, min(largest, default=max(known[0], LARGEST_SIZE_MAX)), names.get(axis, "")))
        rules.append((f"input {number + 1}", domain.dtype, sizes))
    return rules


def compare_backend(network: Network, candidate: Network, *, probes_max: int | None = None) -> Agreement:
    """How far a candidate's answers are from the network's own, on inputs made to disagree.

    Args:
        probes_max: for what was compared on this machine before: the first of them are enough.
    """
    probes = probes_of(network.example, network.domains, 2)
    return agreement(
        network.torch_model.run, candidate.torch_model.run, probes[:probes_max], AGREEMENT[network.precision],
        precisions=precisions_of(network), exact=exact_of(network),
    )  # fmt: skip


def exact_of(network: Network) -> Callable[[Sequence[torch.Tensor]], Any] | None:
    """What answers as it does in double precision, see `in_double`; its weights go with the object. None where nothing
    is to be judged by that."""  # fmt: skip
    return None if network.in_double is None else in_double(network.in_double)


def precisions_of(network: Network) -> Precisions | None:
    """It at full precision, too: its weights are loaded for that when they are first needed, and go with the object.

    None where it runs at that anyway.
    """
    load = network.in_fp32
    if load is None:
        return None
    loaded: list[Any] = []

    def run(inputs: list[torch.Tensor]) -> Any:
        if not loaded:
            loaded.append(load())
        return loaded[0].run(inputs)

    return Precisions(run, network.torch_model.run)


def _why_plain(candidate: Network) -> str:
    """Why a candidate would answer ordinary requests by TorchScript after all; ``""`` if it would not."""
    model = candidate.torch_model
    for size in (1, 2):
        before = model.plain_runs
        try:
            model.run([torch.cat([each] * size) for each in candidate.example])
        except RuntimeError as error:  # TorchScript's own
            return f"a batch of {size} fails: {openvino.cause_of(str(error))}"
        if model.plain_runs != before:
            return f"it leaves a batch of {size} to TorchScript: it fails there, or its answer is not finite"
    return ""


def prove_backend(network: Network, candidate: Network, batch_size: int, budget_s: float = math.inf) -> str:
    """Why a candidate is not to be used that agrees on single probes; ``""`` if it may be, with batches as far as
    ``budget_s`` seconds showed.

    Batches of ``network`` are what it has to match: it may have smaller ones afterwards only if time ended.
    """
    if problem := _why_plain(candidate):
        return problem
    # At lower precisions overflows are their own, and what is int8 is cut off.
    is_exact = candidate.precision == "fp32"
    if is_exact and hides_overflow(network.run, candidate.run, network.example, network.domains):
        return "numbers of about 1e6 overflow within the model, which one of both hides"
    proof, before = candidate.batches, network.batches
    if proof is None or before is None:
        return ""
    size = min(batch_size, before.size_max)
    proof.extend(size, budget_s)
    return "" if not proof.note or proof.size_max >= size else proof.probe or proof.note


# --- a backend that model-config.yaml names ---------------------------------------------------------------------------


class _NotMadeYetError(ModelLoadError):
    """Making it takes longer than the model may take to start.

    Attributes:
        making: continues.
    """

    def __init__(self, text: str, making: Making):
        super().__init__(text)
        self.making = making


def who_says(archive: Archive, backend: str) -> str:
    """Where the backend is named, for a person."""
    return f"'backend: {backend}'" if archive.config.backend else f"default_backend={backend}"


def on_named_backend(
    archive: Archive, network: Network, backend: str, *, batch_size: int, split: Split, timeout_s: float,
    progress: Progress, is_over: Callable[[], bool] = lambda: False,
) -> Network:  # fmt: skip
    """``network`` on ``backend``, made first if it is not kept; else as it is, with the reason in its findings.

    Takes ``network``: it is released if another comes back. Where making it takes longer than ``timeout_s`` seconds,
    the findings' state is ``making``: that is left to do behind the first requests, see `EngineChoice`.

    Args:
        is_over: nobody wants the model any more.
    """
    name = network.context.model_name
    says = who_says(archive, backend)
    if backend == TORCHSCRIPT:
        network.findings["backend"] = shown(getattr(network.torch_model, "backend", TORCHSCRIPT), f"as {says} says")
        return network
    try:
        made = _made(archive, network, backend, batch_size=batch_size, timeout_s=timeout_s, progress=progress,
                     is_over=is_over)  # fmt: skip
        progress(f"comparing {BACKENDS[backend].label} with TorchScript")
        candidate, compared = load_named(archive, network, made, batch_size=batch_size, split=split)
    except _NotMadeYetError as error:
        log.warning("%s begins on %s: %s", name, BACKENDS[TORCHSCRIPT].label, error.message)
        network.findings["backend"] = shown(TORCHSCRIPT, error.message, state="making")
        network.making = error.making
        return network
    except ModelLoadError as error:
        reason = f"{says} cannot be followed: {error.message}"
        log.warning("%s runs on %s: %s", name, BACKENDS[TORCHSCRIPT].label, reason)
        network.findings["backend"] = shown(getattr(network.torch_model, "backend", TORCHSCRIPT), reason)
        return network
    note_named(candidate, backend, says, compared)
    network.release()
    return candidate


def note_named(candidate: Network, backend: str, says: str, compared: Agreement) -> None:
    """Has the findings of ``candidate``, and the log, say what it runs on and why."""
    tried = {"backend": backend, "difference": compared.difference, "probes": compared.probes}
    candidate.findings["backend"] = shown(backend, f"as {says} says", [tried])
    log.info("%s runs on %s; largest difference to TorchScript %.1e (relative) on %d inputs",
             candidate.context.model_name, BACKENDS[backend].label, compared.difference, compared.probes)  # fmt: skip


def _made(
    archive: Archive, network: Network, backend: str, *, batch_size: int, timeout_s: float, progress: Progress,
    is_over: Callable[[], bool],
) -> Made:  # fmt: skip
    """Raises ModelLoadError with the reason why it cannot be."""
    row = BACKENDS[backend]
    if reason := row.missing():
        raise ModelLoadError(reason)
    if network.batches is not None:
        network.batches.extend(batch_size, BATCHES_S)
    if reason := conservative_reason(network, batch_size):
        raise ModelLoadError(reason)
    progress(f"making it for {row.label}")
    making = Making(archive, [backend], network.precision, batch_size, nice=0, is_over=is_over)
    found = list(making.each(progress, timeout_s, continues=True))
    if making.is_late:
        making.give_way()
        raise _NotMadeYetError(
            f"making it for {row.label}, as {who_says(archive, backend)} says, takes longer than startup_timeout="
            f"{timeout_s:g} s; it is made behind the requests, which TorchScript answers until then. To have it at the "
            "start, raise startupTimeout in model-config.yaml, or have it made when the archive is packed: pyserve "
            "archive --compile", making
        )  # fmt: skip
    return found[0]


def load_named(
    archive: Archive, network: Network, made: Made, *, batch_size: int, split: Split
) -> tuple[Network, Agreement]:
    """``network`` as it was made for a backend, and how far its answers are from the network's own.

    Raises:
        ModelLoadError: it cannot be used; the text says why.
    """
    label = BACKENDS[made.backend].label
    with released_unless_used(load_backend(archive, network, made, split)) as candidate:
        compared = compare_backend(network, candidate)
        if compared.objection:
            raise ModelLoadError(f"{label} gives other answers: {compared.objection}")
        if problem := prove_backend(network, candidate, batch_size, BATCHES_S):
            raise ModelLoadError(f"{label} is of no use: {problem}")
        candidate.torch_model.settle()
        return candidate, compared


def compare_kept(network: Network, candidate: Network) -> str:
    """Why a backend that was chosen at an earlier start is not to be used now; ``""`` if it may be."""
    return compare_backend(network, candidate, probes_max=PROBES_MIN).objection
