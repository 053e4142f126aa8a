"""Whether a handler's answers depend on what else is in the batch: unlike rows together against each of them alone.

A model that normalises over the batch, or mistakes the batch for time, answers every request of a batch with a number
that no model computed for it. Where that shows, or where nothing can be shown, batches hold one request.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from pyserve import devices
from pyserve.errors import JsonObject, is_memory_error
from pyserve.proof.batch_probe import RowNumbers, Step, probe_sizes, size_step, special_steps
from pyserve.proof.comparison import ROUNDING, difference, dtypes, rows
from pyserve.proof.graph_reads import graph_reads
from pyserve.proof.model_state import KeptRandomness, KeptState, models_in
from pyserve.proof.probe_inputs import ITEMS_MAX
from pyserve.proof.traced_reads import ReadsWatch
from pyserve.worker.answer import ERROR
from pyserve.worker.entry_point import EntryPoint
from pyserve.worker.failure import HandlerTimeout, describe_failure
from pyserve.worker.invoker import Invoker
from pyserve.worker.request import Item
from pyserve.worker.sample_requests import MadeUp, trial_rows
from pyserve.worker.spec import WorkerSpec
from pyserve.worker.time_limit import TimeLimit
from pyserve.worker.trial_parts import TrialParts, differ_in_parts

# The largest size that is tried of a model however slow it is.
SLOW_SIZE_MAX = 8
# Trying batches ends when it has taken so long; a batch of two is tried anyway, and special ones of two for longer.
TIME_MAX_S = 1.0
SPECIAL_TIME_MAX_S = 3.0
# Of one answer, above which special batches are of two.
SPECIAL_ANSWER_TIME_MAX_S = 0.025
# Of one answer, above which not even that is.
ANSWER_TIME_MAX_S = 5.0
# Of one answer, above which a model that is to run alone is not tried with more.
IDLE_ANSWER_TIME_MAX_S = 0.1
# Calls that tell how many numbers there are.
COUNTS = ("__len__", "numel", "nelement")
# Seeds of random numbers that a model may draw.
SEEDS = (1, 2)

MEANT = "batchDependent: allowed"
FIX = f"write '{MEANT}' in model-config.yaml if that is meant"
_NUMBER = re.compile(r"[-+]?\d+\.\d*(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+")


@dataclass(frozen=True)
class Verdict:
    """What trying batches came to.

    Attributes:
        note: why batches hold one request; ``""`` if they need not.
        probe: ``passed``, or why nothing is known, or what differed.
        raised_note: the note to be once the batch size is raised above 1, which was not tried.
        warm_up: what else was run, see `warm_up.WarmUp.findings`.
    """

    note: str = ""
    probe: str = ""
    raised_note: str = ""
    warm_up: JsonObject = field(default_factory=dict, compare=False)

    @classmethod
    def untried(cls, spec: WorkerSpec, why: str, *, is_built_in: bool) -> Verdict:
        """Nothing is known. Handlers of the archive's own are believed, as TorchServe does."""
        probe = f"not probed: {why}"
        if not is_built_in or spec.config.get("batchDependent") == "allowed":
            return cls(probe=probe)
        note = f"batches hold one request, since {why}; {FIX}"
        return cls(note, probe, note) if spec.batch_size > 1 else cls(probe=probe, raised_note=note)


class Trial(Protocol):
    """Something to be asked for rows alone and together.

    Attributes:
        rows: the numbers of its rows, by kind.
    """

    rows: RowNumbers

    def answers(self, numbers: Sequence[int]) -> list[Any]:
        """One answer per row of ``numbers``, run together. Raises whatever the model raises."""

    def tolerance(self, answer: Any) -> float:
        """What rounding explains of a difference to ``answer``."""

    def reads(self) -> str:
        """By what the model's code looks at numbers, as far as that can be seen; ``""`` if it does not."""

    def remembers(self) -> bool:
        """Whether a call changes what the next one answers, as far as is known."""


class NotAnswered(Exception):
    """A row has no answer that could be compared; the text says why."""


def try_batches(spec: WorkerSpec, trial: Trial, *, is_built_in: bool) -> Verdict:
    """Runs batches of all sizes that `batch_steps` names, as far as time allows.

    Args:
        is_built_in: whether its answers are a model's and nothing else.
    """
    if spec.config.get("batchDependent") == "allowed":
        return Verdict(probe=f"not probed: {MEANT}")
    if not spec.tries_batches:
        return Verdict()
    try:
        return _tried(spec, trial, is_built_in)
    except (HandlerTimeout, MemoryError):
        raise
    except Exception as error:
        failure = describe_failure(error, spec.model_dir)
        reason = str(error) if isinstance(error, NotAnswered) else f"trying it failed: {failure.line()}"
        return Verdict.untried(spec, reason, is_built_in=is_built_in)


def _tried(spec: WorkerSpec, trial: Trial, is_built_in: bool) -> Verdict:
    if spec.batch_size == 1 and not is_built_in:
        return Verdict.untried(spec, "it was loaded with batch size 1", is_built_in=False)
    began = time.monotonic()
    first = seeded_answers(trial, [0], SEEDS[0])[0]
    answer_s = time.monotonic() - began
    if answer_s > ANSWER_TIME_MAX_S:
        return Verdict.untried(spec, f"one answer takes {answer_s:.0f} s", is_built_in=is_built_in)
    middle = time.monotonic()
    again = seeded_answers(trial, [0], SEEDS[1])[0]
    answer_s = min(answer_s, time.monotonic() - middle)  # the first call may have had to prepare something
    if spec.batch_size == 1 and answer_s > IDLE_ANSWER_TIME_MAX_S:
        return Verdict.untried(spec, "it was loaded with batch size 1", is_built_in=True)
    is_full = trial.tolerance(first) <= ROUNDING["fp32"]
    if not difference(first, again) <= trial.tolerance(first) or (is_full and differ_in_parts(first, again)):
        return Verdict(probe="not probed: its answers to the same request differ from call to call")
    reads = trial.reads()
    if reads:  # a branch may be taken for one number in a million only: no trial shows it
        probe = f"its forward looks at the numbers of a whole batch ({reads})"
        return Verdict(note=f"batches hold one request: {probe}; {FIX}", probe=probe)
    if trial.remembers():
        probe = "its answers depend on the calls before"
        return Verdict(note=f"batches hold one request: {probe}; {FIX}", probe=probe)
    alone, parts = {0: first}, TrialParts() if is_full else None
    for place, step in enumerate(batch_steps(trial.rows, spec.batch_size, answer_s)):
        limit_s = SPECIAL_TIME_MAX_S if step.what else TIME_MAX_S
        if place and time.monotonic() - began > limit_s:
            continue
        problem = _problem_of(spec, trial, step, alone, parts)
        if problem and step.what:  # if it is for its size alone, that says more
            problem = _problem_of(spec, trial, size_step(trial.rows, len(step.numbers)), alone, parts) or problem
        if problem:
            return Verdict(note=f"batches hold one request: {problem}; {FIX}", probe=problem)
    return Verdict(probe="passed")


def batch_steps(rows: RowNumbers, batch_size: int, answer_s: float) -> list[Step]:
    """What to try, what shows most first: a pair, special batches, the largest there may be (a smaller one of a model
    that is slow), an odd one, and all other sizes."""  # fmt: skip
    largest = batch_size if batch_size > 1 else 3
    if batch_size > 3:
        largest = min(batch_size, max(SLOW_SIZE_MAX, int(TIME_MAX_S / 2 / max(answer_s, 1e-6))))
    special = special_steps(rows, largest if answer_s <= SPECIAL_ANSWER_TIME_MAX_S else 2)
    others = [size for size in probe_sizes(largest) if size not in (2, 3, largest)]
    sizes = [*({largest} - {2}), *({3} - {largest} if largest > 3 else ()), *others]
    return [size_step(rows, 2), *special, *(size_step(rows, size) for size in sizes)]


def _problem_of(
    spec: WorkerSpec, trial: Trial, step: Step, alone: dict[int, Any], parts: TrialParts | None
) -> str:  # fmt: skip
    """How the answers of rows together differ from those alone, which it adds to ``alone``; ``""`` if they do not.

    Args:
        parts: of the trial, at full precision.
    """
    numbers = [number for number in step.numbers if _is_answered(trial, number, alone)]
    if len(numbers) < len(step.numbers) and not set(numbers) & set(trial.rows.not_finite):
        return ""
    size = len(numbers)
    try:
        together = seeded_answers(trial, numbers, SEEDS[0])
    except (HandlerTimeout, NotAnswered):
        raise
    except Exception as error:
        if is_memory_error(error):
            return ""  # no wrong number: a batch that does not fit is run in halves
        return f"a batch of {size}{step.what} cannot be run: {describe_failure(error, spec.model_dir).line()}"
    for place, number in enumerate(numbers):
        found = difference(alone[number], together[place])
        if not found <= trial.tolerance(alone[number]):
            how = "another form" if found == float("inf") else f"a relative difference of {found:.1e}"
            where = f"row {place + 1} of {size}{step.what}"
            return f"answers depend on the batch: {where} has {how} to the same row alone"
    if parts is None:
        return ""
    problem = parts.problem(partial(seeded_answers, trial, seed=SEEDS[0]), numbers, alone, together)
    return f"answers depend on the batch: in a batch of {size}{step.what}, {problem}" if problem else ""


def _is_answered(trial: Trial, number: int, alone: dict[int, Any]) -> bool:
    """Whether the row has an answer alone, now in ``alone``. One with NaN or infinities need not have."""
    if number not in alone:
        try:
            alone[number] = seeded_answers(trial, [number], SEEDS[0])[0]
        except (HandlerTimeout, MemoryError):
            raise
        except Exception:  # of the model's own code
            if number not in trial.rows.not_finite:
                raise
            return False
    return True


def seeded_answers(trial: Trial, numbers: Sequence[int], seed: int) -> list[Any]:
    """The answers to rows run together, as if no random number had been drawn before."""
    KeptRandomness.seed(seed)
    return trial.answers(numbers)


class BuiltInTrial:
    """The outputs of a built-in handler's model, before they are made into answers.

    Args:
        like: a request that is answered.
    """

    def __init__(self, spec: WorkerSpec, entry: EntryPoint, like: MadeUp):
        self._handler = entry.handler
        self._state = KeptState(models_in(entry.handler))
        made = trial_rows(entry.handler, like)
        self._rows = [*made.unlike, *made.not_finite, *made.alike]
        self.rows = RowNumbers.of(*map(len, made))
        self._precision = precision_of(spec, entry.handler)

    def answers(self, numbers: Sequence[int]) -> list[Any]:
        """See `Trial`."""
        self._state.restore()
        return self._outputs(numbers)

    def _outputs(self, numbers: Sequence[int]) -> list[Any]:
        handler, count = self._handler, len(numbers)
        output = handler.inference(handler.preprocess([dict(self._rows[number]) for number in numbers]))
        if handler.sample_kind == "saved tensor" or hasattr(handler, "_detections"):
            if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], (list, tuple)):
                output = output[1]
            return [kept(output[place]) for place in range(count)]
        if handler.sample_kind == "text" and isinstance(output, torch.Tensor) and output.dim() == 1:
            output = output.unsqueeze(0)  # scores of one text, which its handler takes too
        return [kept(rows(output, place, 1)) for place in range(count)]

    def reads(self) -> str:
        """See `Trial`."""
        model = self._handler.model
        if isinstance(model, torch.jit.ScriptModule):
            return graph_reads(model.inlined_graph)
        # What torch.compile made does not run as it is written.
        if not isinstance(model, torch.nn.Module) or hasattr(model, "_orig_mod"):
            return ""
        self._state.restore()  # before, since it would take the watch away too
        return reads_of(model, lambda: self._outputs([0]))

    def remembers(self) -> bool:
        """See `Trial`."""
        first = seeded_answers(self, [0], SEEDS[0])[0]
        KeptRandomness.seed(SEEDS[0])
        again = self._outputs([0])[0]  # what the first call left is still there
        return not difference(first, again) <= self.tolerance(first)

    def tolerance(self, answer: Any) -> float:
        """See `Trial`."""
        kinds = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        return max(ROUNDING[kind] for kind in (self._precision, *(kinds.get(each, "fp32") for each in dtypes(answer))))


def reads_of(model: torch.nn.Module, run: Callable[[], object]) -> str:
    """By what the Python code of ``model`` looks at numbers while ``run`` calls it. How many there are is no number of
    a request: a branch on that shows in a trial."""
    watch = ReadsWatch()

    def enter(module: torch.nn.Module, arguments: Any) -> None:
        watch.__enter__()

    def leave(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        watch.__exit__(None, None, None)

    hooks = [model.register_forward_pre_hook(enter), model.register_forward_hook(leave, always_call=True)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return ", ".join(name for name in watch.data_reads if name not in COUNTS)


class AnswerTrial:
    """Whole answers of a handler, as clients get them.

    Args:
        items: requests that are answered when they come alone.
    """

    def __init__(self, spec: WorkerSpec, entry: EntryPoint, invoker: Invoker, items: list[Item], limit: TimeLimit):
        # Copies of a sample are all that is known to be alike.
        self.rows = RowNumbers(tuple(range(min(len(items), ITEMS_MAX))), alike=(0,) if len(items) > 1 else ())
        self._items = items
        self._invoker = invoker
        self._limit = limit
        self._state = KeptState(models_in(entry.handler, entry.code.module))
        self._tolerance = ROUNDING[precision_of(spec, entry.handler)]

    def answers(self, numbers: Sequence[int]) -> list[Any]:
        """See `Trial`. Raises NotAnswered for an error."""
        self._state.restore()
        items = [
            (place, flags, head, bytearray(body))
            for place, number in enumerate(numbers)
            for _, flags, head, body in [self._items[number]]
        ]
        answers = self._invoker.run(items)
        self._limit.check()
        if any(kind == ERROR for _, kind, _, _, _ in answers):
            raise NotAnswered(f"a batch of {len(numbers)} of the archive's samples is answered with an error")
        return [value_of(status, head, body) for _, _, status, head, body in sorted(answers, key=lambda each: each[0])]

    def remembers(self) -> bool:
        """See `Trial`: an own handler may count, or keep what it likes."""
        return False

    def reads(self) -> str:
        """See `Trial`: what an own handler looks at is not known."""
        return ""

    def tolerance(self, answer: Any) -> float:
        """See `Trial`."""
        return self._tolerance


def precision_of(spec: WorkerSpec, handler: Any) -> str:
    """What rounds most: fp32, fp16 or bf16."""
    types = {each.dtype for model in models_in(handler) for each in model.parameters()}
    named = str(spec.config.get("precision") or "fp32")
    if named == "bf16" or torch.bfloat16 in types:
        return "bf16"
    # TF32, which GPUs use for fp32 where that is allowed, has as many digits as fp16.
    is_cuda = devices.kind() == "cuda" and devices.is_used()
    is_tf32 = is_cuda and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
    return "fp16" if named == "fp16" or torch.float16 in types or is_tf32 else "fp32"


def kept(output: Any) -> Any:
    """A copy of an output, which may be the model's own memory."""
    if isinstance(output, torch.Tensor):
        return output.detach().clone()
    if isinstance(output, Mapping):
        return {key: kept(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        return [kept(value) for value in output]
    return output


def value_of(status: int, head: bytes, body: Any) -> Any:
    """An answer as something that `difference` compares number by number: JSON, a tensor, numbers in a text."""
    content = bytes(body)
    _, *texts = head.decode("latin-1").split("\n")
    headers = dict(zip(texts[::2], texts[1::2], strict=False))
    dtype = getattr(torch, headers.get("x-tensor-dtype", ""), None)
    if isinstance(dtype, torch.dtype) and content:
        return [status, torch.frombuffer(bytearray(content), dtype=dtype)]
    if content[:2] == b"PK":  # what torch.save writes, if it is not another zip file
        with contextlib.suppress(Exception):
            return [status, torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)]
    try:
        return [status, comparable(json.loads(content))]
    except (ValueError, RecursionError):
        pass
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return [status, content]
    return [status, _NUMBER.sub("#", text), [float(each) for each in _NUMBER.findall(text)]]


def comparable(value: Any) -> Any:
    """JSON in which the numbers of an object, such as labels with their scores, are compared as one tensor."""
    if isinstance(value, dict):
        if value and all(isinstance(each, float) for each in value.values()):
            names = sorted(value)
            return [names, [value[name] for name in names]]
        return {name: comparable(each) for name, each in value.items()}
    return [comparable(each) for each in value] if isinstance(value, list) else value
