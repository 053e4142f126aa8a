"""A model to be made for other backends, as the child process has it: built, looked at, run, exported.

Sources are eager models, TorchScript files and programs of torch.export. All end as a `torch.export.ExportedProgram`
with a free batch, from which backends make theirs.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree

from pyserve.archive.archive import Archive
from pyserve.backends.calibration import Asked, calibration_of
from pyserve.backends.lookups import Lookups, find_lookups
from pyserve.context import Context
from pyserve.conversion.child import sample_probes
from pyserve.conversion.eager_answers import EagerAnswers
from pyserve.conversion.export_script import export_inputs, exported
from pyserve.conversion.mode_questions import ASKED_BY
from pyserve.conversion.record import TORCHSCRIPT_SUFFIXES
from pyserve.conversion.torchscript import native_example
from pyserve.errors import ModelLoadError
from pyserve.handlers.eager import load_eager_model
from pyserve.proof.comparison import difference
from pyserve.proof.exact_answers import Run, copy_in_double
from pyserve.proof.package_rules import is_compiled
from pyserve.proof.probe_inputs import (
    ITEMS_MAX,
    LARGEST_SIZE_MAX,
    InputDomain,
    Probe,
    batch_rows,
    probe_inputs,
)
from pyserve.torch_error import cause_of
from pyserve.worker.handler_choice import load_handler

Progress = Callable[[str], None]

# Operators that draw random numbers only if they are asked to, which shows when the model is run twice.
_QUIET_RANDOM = ("dropout", "attention", "lstm", "gru", "rnn", "rrelu")
_SEEDS = (11, 12)


# Precisions that torch computes at, other than in full.
LOWER: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


class UnsuitableError(ModelLoadError):
    """The model works, but cannot be made for another backend; trying again would not help."""


@dataclass
class Source:
    """A model and what is known about it.

    Attributes:
        archive: where it comes from.
        handler: of the archive, prepared with ``context``.
        model: takes and gives what the served model does; in eval mode.
        kind: ``eager``, ``torchscript`` or ``exported``.
        example: one item [1, ...] per input.
        domains: what each input may hold; whole numbers that look up rows of a table within its rows.
        samples: the archive's own samples as inputs.
        questions: what its code asked about how it is being run.
        notes: what a maker has to say about what it made, for a person.
        items: what int8 is calibrated with, and a lower precision compared on: tuples of tensors [1, ...]; or none.
        progress: to be called with a line of text at each step.
    """

    archive: Archive
    handler: Any
    context: Context
    model: torch.nn.Module
    kind: str
    example: tuple[torch.Tensor, ...]
    domains: list[InputDomain]
    samples: list[Probe] = field(default_factory=list)
    questions: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    items: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    progress: Progress = lambda text: None
    _program: Any = None

    def run(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """What the model answers: the parts of its output, in order."""
        with torch.no_grad():
            return leaves(self.model(*inputs))

    def run_at(self, dtype: torch.dtype, inputs: Sequence[torch.Tensor]) -> list[Any]:
        """As `run`, as torch computes it at a lower precision. Its answers are of float32."""
        with torch.autocast("cpu", dtype):
            found = self.run(inputs)
        return [each.float() if isinstance(each, torch.Tensor) and each.dtype == dtype else each for each in found]

    def run_exactly(self) -> Run:
        """What gives the same in double precision; see `in_double`."""
        run = copy_in_double(self.model)
        return lambda inputs: leaves(run(inputs))

    def program(self) -> Any:
        """The ``torch.export.ExportedProgram`` of it, with a free batch and the domains' free dimensions.

        Raises:
            UnsuitableError: it cannot be exported, or not so that it can be believed; the text says why.
        """
        if self._program is None:
            self._program = self._export()
        return self._program

    def export_again(self, module: torch.nn.Module) -> Any:
        """As `program`, of a module that was made of that one. Raises what torch does."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return exported(module, self.example, self.domains)

    def calibrate(self, precision: str) -> None:
        """Reads ``items`` for ``precision``. Raises ModelLoadError: it needs some, and there are none."""
        asked = Asked(self.handler, self.context, self.example, self.domains)
        found = calibration_of(self.archive, asked, precision)
        self.items = [] if found is None else found.items

    def probes(self, batch_size_max: int) -> list[Probe]:
        """Inputs to compare on: samples, numbers and sizes of all kinds, and a batch of ``batch_size_max`` rows."""
        made = [*self.samples, *probe_inputs(self.example, self.domains)]
        if batch_size_max > 1:
            rows = batch_rows(self.example, self.domains, min(batch_size_max, ITEMS_MAX))
            many = [rows[number % len(rows)] for number in range(batch_size_max)]
            whole = tuple(torch.cat(parts) for parts in zip(*many, strict=True))
            made.insert(len(self.samples), Probe(f"unlike rows, batch {batch_size_max}", whole))
        return made

    def _export(self) -> Any:
        asked = ASKED_BY["exported"] & self.questions
        if asked:
            raise UnsuitableError(f"its code asks how it is being run ({', '.join(sorted(asked))})")
        inputs, shapes = export_inputs(self.example, self.domains)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                if self.kind == "eager":
                    program = exported(self.model, self.example, self.domains)
                elif self.kind == "torchscript":
                    program = _exported_script(self.model, inputs, shapes)
                else:
                    program = self._program_of_file()
        except (MemoryError, UnsuitableError):
            raise
        except Exception as error:  # torch's, of many classes, or the model's own
            raise UnsuitableError(f"torch.export: {cause_of(str(error)) or type(error).__name__}") from error
        _check_program(program, len(self.example))
        return program

    def _program_of_file(self) -> Any:
        assert self.archive.weights is not None
        with self.archive.weights.open() as file:
            return torch.export.load(file)


def leaves(output: Any) -> list[Any]:
    """The parts of an output with a structure, in its order."""
    return list(_pytree.tree_leaves(output))


def open_source(archive: Archive, progress: Progress) -> Source:
    """Builds the model of ``archive`` and looks at it. The archive's code runs here.

    Raises:
        UnsuitableError: it cannot be made for any other backend.
        ServeError: it cannot be built.
    """
    handler = load_handler(archive)
    archive.check_complete()
    manifest, weights = archive.manifest, archive.weights
    folder = archive.own_folder()  # the model file is code of the archive, which may write
    context = Context(manifest.model_name, str(folder), manifest.raw, model_yaml_config=archive.config.raw)
    handler.prepare(context)
    example = native_example(handler, context)
    os.chdir(folder)
    progress("building the model and reading its weights")
    model: torch.nn.Module
    if manifest.model_file is not None:
        kind = "eager"
        model = load_eager_model(folder, manifest.model_file, weights.open() if weights is not None else None)
    elif weights is None:
        raise UnsuitableError("there is no model in the archive")
    elif weights.suffix in TORCHSCRIPT_SUFFIXES:
        kind = "torchscript"
        with weights.open() as file:
            model = torch.jit.load(file, map_location="cpu").eval()
    elif weights.suffix == ".pt2" and not is_compiled(weights.as_file()):
        kind = "exported"
        with weights.open() as file:
            model = torch.export.load(file).module()
    else:
        what = "was compiled already" if weights.suffix == ".pt2" else "is of a kind that others cannot be made of"
        raise UnsuitableError(f"{weights.name} {what}")
    domains = InputDomain.of(handler, example)
    source = Source(archive, handler, context, model, kind, example, domains)
    source.progress = progress
    source.samples = sample_probes(handler, archive.model_dir, example)
    _look(source)
    return source


def _look(source: Source) -> None:
    """Refuses what must not be made into something that runs for all workers at once, and finds what inputs may hold.

    Raises:
        UnsuitableError: it keeps state, or draws random numbers.
    """
    if source.kind == "eager":
        truth = EagerAnswers(source.model)
        with torch.no_grad():
            truth.examine(source.example)
        source.questions = truth.questions
        if truth.keeps_state:
            raise UnsuitableError("it changes its own state when it runs")
        source.model = truth.fresh()
    _fit_sizes(source)
    inputs, _ = export_inputs(source.example, source.domains)
    answers = []
    for seed in _SEEDS:
        torch.manual_seed(seed)
        answers.append(source.run([each.clone() for each in inputs]))
    if difference(*answers) != 0.0:
        raise UnsuitableError("two runs on one input differ: it draws random numbers, or keeps state")


def _fit_sizes(source: Source) -> None:
    """Narrows the free dimensions to sizes that the model takes, up to the largest that was tried.

    Raises:
        UnsuitableError: it refuses one between those that it takes.
    """
    if not any(domain.free for domain in source.domains):
        return
    shapes = [tuple(each.shape[1:]) for each in source.example]
    probes = [probe.inputs for probe in probe_inputs(source.example, source.domains)]
    probes += _larger(source)
    taken: set[tuple[int, int, int]] = set()  # input, dimension, size
    refused: set[tuple[int, int, int]] = set()
    for inputs in probes:
        if [tuple(each.shape[1:]) for each in inputs] == shapes:
            continue
        found = {(at, axis, each.shape[axis + 1])
                 for at, each in enumerate(inputs) for axis in source.domains[at].free}  # fmt: skip
        try:
            source.run([each.clone() for each in inputs])
            taken |= found
        except Exception:  # the model's own code
            refused |= found
    for at, domain in enumerate(source.domains):
        sizes = list(domain.sizes)
        for axis in domain.free:
            own = {size for a, b, size in taken if (a, b) == (at, axis)} | {shapes[at][axis]}
            low, high = min(own), max(own)
            for _, _, size in sorted(each for each in refused - taken if each[:2] == (at, axis)):
                if low <= size <= high:
                    raise UnsuitableError(f"it refuses size {size}, but takes {low} and {high}")
            before = sizes[axis]
            sizes[axis] = (max(low, before[0]), high if before[1] is None else min(high, before[1]))
        source.domains[at] = dataclasses.replace(domain, sizes=tuple(sizes))


def _larger(source: Source) -> list[tuple[torch.Tensor, ...]]:
    """Inputs in which all dimensions without a known largest size have a large one; between the largest that the model
    takes and the smallest that it refuses there is nothing in between."""  # fmt: skip

    def inputs(size: int) -> tuple[torch.Tensor, ...]:
        return tuple(each.new_zeros((1, *_enlarged(each, domain, size)))
                     for each, domain in zip(source.example, source.domains, strict=True))  # fmt: skip

    def takes(size: int) -> bool:
        try:
            source.run(inputs(size))
        except Exception:  # the model's own code
            return False
        return True

    if not any(high is None for domain in source.domains for _, high in domain.sizes):
        return []
    low, high = 0, LARGEST_SIZE_MAX + 1
    while high - low > 1:
        middle = LARGEST_SIZE_MAX if high > LARGEST_SIZE_MAX else (low + high) // 2
        low, high = (middle, high) if takes(middle) else (low, middle)
    return [inputs(low)] if low else []


def _enlarged(example: torch.Tensor, domain: InputDomain, size: int) -> list[int]:
    """The example's shape, without the batch, with ``size`` where no largest one is known."""
    return [size if high is None else own for own, (_, high) in zip(example.shape[1:], domain.sizes, strict=True)]


def narrow(source: Source) -> list[tuple[int, int] | None]:
    """Narrows the source's domains to the whole numbers that its program may be asked for, and gives these ranges.

    Raises:
        UnsuitableError: its inputs do not say which rows of a table it looks up.
    """
    found: Lookups = find_lookups(source.program())
    if found.problem:
        raise UnsuitableError(found.problem)
    ranges: list[tuple[int, int] | None] = []
    for position, domain in enumerate(source.domains):
        rows = found.ranges.get(position)
        if rows is not None:
            low, high = rows
            if domain.values is not None:
                low, high = max(low, int(domain.values[0])), min(high, int(domain.values[1]))
            source.domains[position] = dataclasses.replace(domain, values=(max(low, 0), max(high, 0)))
            ranges.append((low, high))
        elif domain.dtype in (torch.int64, torch.int32) and domain.values is not None:
            ranges.append((int(domain.values[0]), int(domain.values[1])))
        elif domain.dtype is torch.int64:
            ranges.append((-(1 << 31), (1 << 31) - 1))  # backends may count in 32 bits
        else:
            ranges.append(None)
    return ranges


def _exported_script(model: Any, inputs: tuple[torch.Tensor, ...], shapes: Any) -> Any:
    """torch's own converter, and its result exported again with the sizes that are to be free."""
    from torch._export.converter import TS2EPConverter

    for name in ("torch._export.converter", "torch.fx.experimental.symbolic_shapes", "torch.export"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    first = TS2EPConverter(model, inputs).convert()
    return torch.export.export(first.module(), inputs, dynamic_shapes=shapes, strict=False)


def _check_program(program: Any, count: int) -> None:
    """That it is one that any batch may be run with, by any worker.

    Raises:
        UnsuitableError: it is not.
    """
    signature = program.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise UnsuitableError("it changes its own state, or its input, when it runs")
    nodes = {node.name: node for node in program.graph.nodes}
    names = list(signature.user_inputs)
    if len(names) != count:
        raise UnsuitableError(f"its program takes {len(names)} inputs where the handler gives {count}")
    batches = {str(nodes[name].meta["val"].shape[0]) for name in names if name in nodes}
    if len(batches) != 1 or next(iter(batches)).isdigit():
        raise UnsuitableError(f"its program was exported for batches of {' and '.join(sorted(batches))} only")
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            tags = getattr(node.target, "tags", ())
            name = str(getattr(node.target, "__name__", node.target))
            if torch.Tag.nondeterministic_seeded in tags and not any(each in name for each in _QUIET_RANDOM):
                raise UnsuitableError(f"it draws random numbers ({name})")
