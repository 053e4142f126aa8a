"""Makes TorchScript of an eager model that is true to it for every input, or says why not.

In this order of trust:

    traced      no number of the input and no size that may change became one of Python's, so there is one path
    scripted    control flow is kept
    exported    torch.export has proven one path for all sizes in their ranges; its graph is kept with symbolic sizes

Whatever it is, it must also agree with the eager model on inputs made to disagree: same numbers, shapes, dtypes and
structure, and errors where the eager model raises.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from pyserve.conversion.eager_answers import EagerAnswers, Refusal, runs
from pyserve.conversion.export_script import exported, script_of
from pyserve.conversion.mode_questions import ASKED_BY
from pyserve.conversion.record import Conversion, NeedsPythonError
from pyserve.conversion.tracing import InOne, trace_watched
from pyserve.proof.comparison import ROUNDING, difference, dtypes
from pyserve.proof.probe_inputs import InputDomain, Probe, probe_inputs
from pyserve.proof.traced_reads import ReadsWatch
from pyserve.torch_error import cause_of

# Probes are run for no longer than this, seconds, but so many of them: where nothing in the code depends on the input,
# and where control flow was translated.
PROBING_S = {"traced": 1.0, "scripted": 10.0, "exported": 10.0}
PROBES_MIN = {"traced": 2, "scripted": 6, "exported": 6}
# How many probes a frozen program is compared on: freezing changes roundings, not paths.
FROZEN_PROBES = 2

Inputs = tuple[torch.Tensor, ...]
Module = torch.jit.ScriptModule
# The tracer says this of outputs with a structure, which the probes compare.
_ABOUT_OUTPUTS = "Encountering a"


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """Lets only the general way of torch's attention be converted.

    The fast one is for some inputs only and cannot be converted. Where something is masked it answers in its own way,
    as the comparison with the model shows, which takes it.
    """
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


@dataclass
class Trace:
    """What tracing gave.

    Attributes:
        program: None if the model cannot be traced.
        problem: why not, or what the code learned about the input; ``""`` if there is one path only.
    """

    program: Module | None
    problem: str = ""


@dataclass
class _Converter:
    model: torch.nn.Module
    example: Inputs
    domains: Sequence[InputDomain]
    probes: Sequence[Probe]
    truth: EagerAnswers
    freezes: bool
    tolerance: float
    reads: str = ""
    sample_count: int = 0  # of the probes; they come first, and all of them are run
    questions: set[str] = field(default_factory=set)  # of the model's code, about how it is being run
    answered: dict[int, list[Any] | Refusal] = field(default_factory=dict)  # by the program that is compared next
    objections: list[str] = field(default_factory=list)

    def convert(self) -> tuple[Module, Conversion]:
        trace = self.trace()
        if trace.program is not None and not trace.problem:
            found = self._accepted("traced", lambda: trace.program, "nothing in it depends on sizes or data")
            if found:
                return found
        elif trace.problem:
            self.objections.append(f"tracing: {trace.problem}")
        for how, make, reason in (
            ("scripted", self.script, "its control flow is kept"),
            ("exported", self._export, "torch.export has proven one path for all sizes"),
        ):
            asked = ASKED_BY[how] & self.questions
            if asked:
                self.objections.append(f"{_NAMES[how]}: {_asking(asked)}")
                continue
            found = self._accepted(how, make, reason)
            if found:
                return found
        raise NeedsPythonError(
            f"{'; '.join(self.objections)}. Its forward probably depends on the data or the batch size in a way that "
            "cannot be converted; export the model yourself (torch.jit.script or torch.export) and pack that as "
            "--serialized-file without --model-file, or write 'conversion: trace' in model-config.yaml to have it "
            "traced all the same"
        )

    def trace(self) -> Trace:
        """The trace of a batch of two, and what the model's code learned about it."""
        pair = tuple(torch.cat([each, each]) for each in self.example)
        found = self._traced(pair)
        if found.program is None and isinstance(runs(self.truth.fresh, pair, 0, twice=False), Refusal):
            found = self._traced(tuple(each.clone() for each in self.example))  # it takes single items only
        return found

    def _traced(self, inputs: Inputs) -> Trace:
        if self.freezes and not self.truth.keeps_state and (model := self.truth.without_gradients()) is not None:
            found = self._traced_as(InOne(model), inputs)
            if found.program is not None:
                return found
        # It does not run without its gradients, or has parts that the tracer has to know, such as scripts.
        return self._traced_as(self.truth.fresh(), inputs)

    def _traced_as(self, model: torch.nn.Module, inputs: Inputs) -> Trace:
        kept = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        watch = ReadsWatch()
        try:
            with warnings.catch_warnings(record=True) as caught, _without_fast_path(), watch, ExitStack() as stack:
                warnings.simplefilter("always", torch.jit.TracerWarning)
                program, asked = trace_watched(model, inputs, stack)
        except Exception as error:  # the model's own code runs here, and may raise anything
            return Trace(None, cause_of(str(error)) or type(error).__name__)
        with torch.no_grad():  # tracing has run it once
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])
        said = [str(each.message) for each in caught if issubclass(each.category, torch.jit.TracerWarning)]
        said = [text for text in said if not text.startswith(_ABOUT_OUTPUTS)]
        if asked & ASKED_BY["traced"]:
            return Trace(program, _asking(asked & ASKED_BY["traced"]))
        if watch.reads:
            return Trace(program, f"its code reads numbers or sizes of its input ({', '.join(_some(watch.reads))})")
        if said:
            return Trace(program, cause_of(said[0]))
        if watch.splits and any(domain.free for domain in self.domains):
            return Trace(program, f"its code makes lists along a dimension ({', '.join(_some(watch.splits))})")
        return Trace(program)

    def script(self) -> Module:
        with _without_fast_path():
            program: Module = torch.jit.script(self.truth.fresh())
        if "annotated to be ignored" in str(program.inlined_graph):
            raise NeedsPythonError("it calls a method that torch.jit.ignore or torch.jit.unused left out")
        return program

    def _export(self) -> Module:
        with _without_fast_path():
            return script_of(exported(self.truth.fresh(), self.example, self.domains))

    def _affordable(self, how: str) -> int:
        once = max(self.truth.run_s, 1e-4) * 4  # both models, and batches of more than the example's one
        return min(len(self.probes), self.sample_count + max(PROBES_MIN[how], int(PROBING_S[how] / once)))

    def _accepted(self, how: str, make: Callable[[], Module | None], reason: str) -> tuple[Module, Conversion] | None:
        """The program if it is true on the probes; else None, and why not among the objections."""
        count = self._affordable(how)
        self.answered.clear()  # of a program that was refused before all of its answers were looked at
        try:
            program = make()
            assert program is not None
            program = program.eval()
            largest, objection = 0.0, ""
            is_heavy = count < len(self.probes) and self.freezes
            if not is_heavy:  # a heavy one is compared as it will be kept, once
                largest, objection = self.compared(program, count)
            if not objection and self.freezes:
                program = self._frozen(program, count) if is_heavy else torch.jit.freeze(program)
                largest, objection = self.compared(program, count if is_heavy else FROZEN_PROBES, largest)
        except Exception as error:  # torch's converters raise errors of many classes
            objection = cause_of(str(error)) or type(error).__name__
        if objection or program is None:
            self.objections.append(f"{_NAMES[how]}: {objection.rstrip('.')}")
            return None
        reads = "" if how == "traced" else self.reads
        return program, Conversion(how, reason, count, largest, reads=reads, run_s=self.truth.run_s)

    def _frozen(self, program: Module, count: int) -> Module:
        """The frozen program, which has answered the first ``count`` probes meanwhile, beside the model: each with one
        thread, which keeps two cores busier than two threads in turn."""
        if self.truth.keeps_state or self.truth.draws:
            return torch.jit.freeze(program)
        threads = torch.get_num_threads()

        def answer() -> Module:
            torch.set_num_threads(1)
            with torch.inference_mode(False), torch.no_grad():  # of this thread
                frozen = torch.jit.freeze(program)
                for number, probe in enumerate(self.probes[:count]):
                    self.answered[number] = runs(lambda: frozen, probe.inputs, number, twice=False)
            return frozen

        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(1) as pool:
                other = pool.submit(answer)
                for number, probe in enumerate(self.probes[:count]):  # in this thread, whose the model's code is
                    self.truth.answers(number, probe.inputs)
                return other.result()
        finally:
            torch.set_num_threads(threads)

    def compared(self, program: Module, count: int, largest: float = 0.0) -> tuple[float, str]:
        """The largest difference to the eager model on the first ``count`` probes, and what is against the program."""
        twice = self.truth.keeps_state

        def fresh() -> Module:
            return copy.deepcopy(program) if twice else program

        for number, probe in enumerate(self.probes[:count]):
            wanted = self.truth.answers(number, probe.inputs)
            got = self.answered.pop(number, None) or runs(fresh, probe.inputs, number, twice=twice)
            if isinstance(wanted, Refusal):
                if not isinstance(got, Refusal):
                    return math.inf, f"it answers {probe.name}, which the model refuses ({wanted.cause})"
                continue
            if isinstance(got, Refusal):
                return math.inf, f"it fails on {probe.name}: {got.cause}"
            worst = max(difference(left, right) for left, right in zip(wanted, got, strict=True))
            if dtypes(wanted) != dtypes(got) or math.isinf(worst):
                return math.inf, f"its answer differs from the model's in shape, kind or structure on {probe.name}"
            if worst > self.tolerance:
                return worst, f"its answer differs from the model's by {worst:.1e} on {probe.name}"
            largest = max(largest, worst)
        return largest, ""


_NAMES = {"traced": "tracing", "scripted": "scripting", "exported": "torch.export"}


def convert(
    model: torch.nn.Module,
    example: Sequence[torch.Tensor],
    domains: Sequence[InputDomain],
    samples: Sequence[Probe] = (),
    *,
    how: str | None = None,
    freezes: bool = True,
) -> tuple[Module, Conversion]:
    """TorchScript of ``model``, in eval mode, and how it came about. Call it without gradients.

    Args:
        example: one item [1, ...] per input.
        domains: what each input may hold.
        samples: inputs that it is compared on before those made up here.
        how: ``trace`` or ``script`` takes that one though it cannot be proven; None finds one that can.
        freezes: whether the result is frozen.

    Raises:
        NeedsPythonError: none was found; the text says why.
        Exception: whatever the model raises for the example.
    """
    truth = EagerAnswers(model)
    watch = truth.examine(example)
    domains = _with_vocabularies(domains, watch.vocabularies)
    probes = [*samples, *probe_inputs(example, domains)]
    reads = ", ".join(watch.data_reads)
    converter = _Converter(
        model, tuple(example), domains, probes, truth, freezes, _tolerance(model), reads, len(samples),
        truth.questions,
    )  # fmt: skip
    if how in ("trace", "script"):
        return _as_told(converter, how)
    return converter.convert()


def convert_exported(
    program: Any,
    model: torch.nn.Module,
    example: Sequence[torch.Tensor],
    domains: Sequence[InputDomain],
    samples: Sequence[Probe] = (),
    *,
    rows_max: int | None = None,
    freezes: bool = True,
) -> tuple[Module, Conversion]:
    """TorchScript of the ``torch.export.ExportedProgram`` that ``model`` is the module of. Call it without gradients.

    Args:
        example, domains, samples, freezes: see `convert`.
        rows_max: of a batch; None if any is taken.

    Raises:
        NeedsPythonError: TorchScript has no word for something in it, or does not agree with it.
        Exception: whatever the program raises for the example.
    """
    truth = EagerAnswers(model)
    watch = truth.examine(example)
    probes = [*samples, *probe_inputs(example, _with_vocabularies(domains, watch.vocabularies))]
    probes = [dataclasses.replace(each, inputs=tuple(tensor[:rows_max] for tensor in each.inputs)) for each in probes]
    converter = _Converter(
        model, tuple(example), domains, probes, truth, freezes, _tolerance(model), ", ".join(watch.data_reads),
        len(samples),
    )  # fmt: skip
    with _without_fast_path():
        found = converter._accepted("exported", lambda: script_of(program), "it is the graph of the exported program")
    if found is None:
        raise NeedsPythonError("; ".join(converter.objections))
    return found


def _with_vocabularies(domains: Sequence[InputDomain], vocabularies: Mapping[int, int]) -> list[InputDomain]:
    return [
        dataclasses.replace(domain, values=(0, vocabularies[position] - 1))
        if domain.values is None and position in vocabularies else domain
        for position, domain in enumerate(domains)
    ]  # fmt: skip


def _as_told(converter: _Converter, how: str) -> tuple[Module, Conversion]:
    trace = converter.trace() if how == "trace" else Trace(None)
    try:
        program = trace.program if how == "trace" else converter.script()
    except Exception as error:
        raise NeedsPythonError(f"scripting: {cause_of(str(error)) or type(error).__name__}") from error
    if program is None:
        raise NeedsPythonError(f"tracing: {trace.problem}")
    program = torch.jit.freeze(program.eval()) if converter.freezes else program.eval()
    largest, objection = converter.compared(program, len(converter.probes))
    text = "; ".join(filter(None, [trace.problem, objection])) or "nothing was found against it"
    name = "traced" if how == "trace" else "scripted"
    reads = "" if how == "trace" else converter.reads  # a trace knows the one branch that it took
    return program, Conversion(name, text, len(converter.probes), largest, True, reads)


def _tolerance(model: torch.nn.Module) -> float:
    found = {each.dtype for each in (*model.parameters(), *model.buffers())}
    if torch.bfloat16 in found:
        return ROUNDING["bf16"]
    return ROUNDING["fp16"] if torch.float16 in found else ROUNDING["fp32"]


def _asking(questions: Collection[str]) -> str:
    return f"its code asks how it is being run ({', '.join(sorted(questions))}), and may compute something else then"


def _some(names: Sequence[str]) -> list[str]:
    return sorted(set(names))[:3]
