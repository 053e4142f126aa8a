"""The whole way of a request, gone before a worker reports that it is loaded: decode, preprocess, inference,
postprocess, encode. What cannot be answered is found when a model is loaded, not by its first client.

A built-in handler is sent a request made up from what it says of its input, and the archive's own samples. If none of
the ways to ask it is answered, the model cannot be served. Handlers of the archive's own are sent its samples only,
since nobody else knows what they take; one that is not answered is worth a warning, no more. Without samples batches of
the network alone are tried, if everything before it is inherited. What was answered, what the archive has in
``warmup/`` and, for a built-in handler, every size of ``pad_to`` is then run in batches of all sizes (`warm_up`).

Nothing of it stays: no metric, no request id, no state of the model, no random number drawn.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from pyserve.archive.samples import Sample, archive_samples, warm_up_samples
from pyserve.context import Context
from pyserve.errors import JsonObject
from pyserve.proof.model_state import KeptRandomness, KeptState, models_in
from pyserve.proof.probe_inputs import InputDomain, padded_examples
from pyserve.worker.answer import ERROR, Answer, Parts
from pyserve.worker.batch_trial import AnswerTrial, BuiltInTrial, Verdict, try_batches
from pyserve.worker.entry_point import EntryPoint, HandlerLoadError, HandlerMemoryError
from pyserve.worker.failure import Failure, HandlerTimeout
from pyserve.worker.invoker import Invoker
from pyserve.worker.request import Item
from pyserve.worker.sample_requests import MadeUp, example_of, has_input, made_up_requests, makes_samples, ways
from pyserve.worker.spec import BATCH, WorkerSpec
from pyserve.worker.time_limit import TimeLimit, time_limit
from pyserve.worker.warm_up import Tried, WarmUp, sizes_up_to

log = logging.getLogger("pyserve.worker")

# Of the time that a worker has to start, the share that trying out may take.
TIME_SHARE_MAX = 0.5
# What makes an output of a request.
INHERITED = ("handle", "preprocess", "inference")
DESCRIBE_FIX = (
    "If it takes other inputs than that, describe them with 'input' in model-config.yaml, or pack one as "
    "sample_input.json"
)


class _DroppedParts(Parts):
    """Parts of streamed answers that nobody waits for."""

    def send(self, answer: Answer) -> None:
        """Drops it."""


class Outcome(NamedTuple):
    """What became of a request.

    Attributes:
        failure: why it was not answered, None if it was.
    """

    sample: Sample
    answer: Answer
    failure: Failure | None

    @property
    def is_answered(self) -> bool:
        return self.answer[1] != ERROR

    @property
    def is_callers_fault(self) -> bool:
        return not self.is_answered and self.answer[2] < 500

    def reason(self) -> str:
        """Why it was not answered, in one line."""
        if self.failure is not None:
            return self.failure.line()
        told = json.loads(bytes(self.answer[4]))
        return str(told.get("detail", {}).get("text") or told.get("message"))


def rehearse(spec: WorkerSpec, entry: EntryPoint, context: Context, *, began: float) -> Verdict:
    """Sends samples to a handler that is initialized; tries batches.

    Args:
        began: when the worker began to load, ``time.monotonic()``.

    Returns:
        What trying batches came to.

    Raises:
        HandlerLoadError, HandlerMemoryError: the model cannot answer.
    """
    if spec.mode != BATCH or spec.config.get("sequenceBatching"):
        # A call of one of these is a step of something longer, with state that only real requests begin and end.
        return Verdict(probe="not probed: requests of this kind of model depend on those before them")
    limit_s = began + TIME_SHARE_MAX * spec.startup_timeout_s - time.monotonic()
    notes: list[str] = []
    try:
        with nothing_stays(entry, context), time_limit(max(limit_s, 1.0)) as limit:
            rehearsal = _Rehearsal(spec, entry, context, limit, notes)
            verdict = rehearsal.run_built_in() if entry.is_built_in else rehearsal.run_own()
            return replace(verdict, warm_up=rehearsal.warm_up(verdict, began + TIME_SHARE_MAX * spec.startup_timeout_s))
    except HandlerTimeout:
        notes.append(f"the model was not tried out to the end within half of startup_timeout={spec.startup_timeout_s:g}"
                     " s: its first requests may take long. Raise startupTimeout in model-config.yaml")  # fmt: skip
        return Verdict.untried(spec, "trying it took too long", is_built_in=entry.is_built_in)
    finally:
        for note in notes:
            log.warning("%s", note)


class _Rehearsal:
    """One handler's.

    Args:
        notes: filled with what the log should say.
    """

    def __init__(self, spec: WorkerSpec, entry: EntryPoint, context: Context, limit: TimeLimit, notes: list[str]):
        self._spec = spec
        self._entry = entry
        self._context = context
        self._limit = limit
        self._notes = notes
        self._failures: list[Failure] = []
        self._answered: list[tuple[Sample, float]] = []  # and the seconds it took, alone
        self._invoker = Invoker(
            spec, entry, context, parts=_DroppedParts(), log_failure=lambda ids, failure: self._failures.append(failure)
        )

    def ask(self, sample: Sample) -> Outcome:
        """Sends one."""
        self._failures.clear()
        began = time.monotonic()
        (answer,) = self._invoker.run([item_of(sample, 0)])
        self._limit.check()
        outcome = Outcome(sample, answer, self._failures[0] if self._failures else None)
        if outcome.is_answered:
            self._answered.append((sample, time.monotonic() - began))
        return outcome

    # --- before the first request -----------------------------------------------------------------------------------

    def warm_up(self, verdict: Verdict, until: float) -> JsonObject:
        """Runs what requests may be like, in batches of the sizes that they may come in. Returns what was run.

        Args:
            verdict: on batches.
            until: when no run begins any more, ``time.monotonic()``.
        """
        spec = self._spec
        warm_up = WarmUp(self._run_batch, until, self._notes)
        for sample, seconds in self._answered:
            warm_up.note_answered(sample, seconds)
        samples = [sample for sample, _ in self._answered] + warm_up_samples(spec.model_dir) + self._padded()
        # What an own handler does with a request beside answering it is not to happen more often than it has to.
        largest = 1 if verdict.note or spec.has_side_effects else spec.batch_size
        warm_up.run_all(samples, sizes_up_to(largest, spec.config.get("batchBuckets")))
        return warm_up.findings()

    def _run_batch(self, sample: Sample, size: int) -> Tried:
        self._failures.clear()
        began = time.monotonic()
        answers = self._invoker.run([item_of(sample, number) for number in range(size)])
        self._limit.check()
        seconds = time.monotonic() - began
        refused = next((answer for answer in answers if answer[1] == ERROR), None)
        if refused is None:
            return Tried(seconds)
        return Tried(seconds, Outcome(sample, refused, self._failures[0] if self._failures else None).reason())

    def _padded(self) -> list[Sample]:
        """Requests for a built-in handler, one of every size that its inputs are filled up to."""
        handler = self._entry.handler
        is_asked = self._entry.is_built_in and self._spec.decode_input and not self._spec.envelope
        if not is_asked or not makes_samples(handler):
            return []
        with contextlib.suppress(Exception):  # model-config.yaml does not describe the input
            example = example_of(handler, self._context)
            domains = InputDomain.of(handler, example)
            return [
                replace(ways(handler, tuple(inputs))[0], name=name)
                for inputs, name in padded_examples(example, domains)
            ]
        return []

    # --- built-in handlers ----------------------------------------------------------------------------------------

    def run_built_in(self) -> Verdict:
        """Everything for a handler that comes with pyserve."""
        spec, handler = self._spec, self._entry.handler
        answered = self._ask_samples(refuses=not spec.envelope)
        if spec.envelope or not spec.decode_input or not makes_samples(handler):
            return self._try_samples(answered)  # how requests look like is not for the handler to say
        try:
            like = self._ask_made_up(is_answered=bool(answered))
        except (HandlerLoadError, HandlerMemoryError, HandlerTimeout):
            raise
        except Exception as error:  # model-config.yaml does not describe the input
            self._notes.append(f"no request can be made up to try the model: {' '.join(str(error).split())}")
            like = None
        if like is None:
            return self._try_samples(answered)
        return try_batches(spec, BuiltInTrial(spec, self._entry, like), is_built_in=True)

    def _ask_made_up(self, *, is_answered: bool) -> MadeUp | None:
        """A request that was made up and answered; None if there is none and that is no proof of anything.

        Raises:
            HandlerLoadError, HandlerMemoryError: none was, nor a sample.
        """
        handler, built_in = self._entry.handler, self._entry.code.built_in
        first: Outcome | None = None
        for made_up in made_up_requests(handler, self._context):
            outcome = self.ask(made_up.sample)
            if outcome.is_answered:
                return made_up
            if first is None or first.is_callers_fault:
                first = outcome
        assert first is not None
        # Pictures of other sizes may do, where the handler leaves them as they are.
        is_native = built_in is not None and built_in.lane == "native"
        is_certain = has_input(self._context) or is_native or _is_form(first)
        if is_answered or first.is_callers_fault or not is_certain:
            self._notes.append(f"{first.sample.name} was not answered: {first.reason()}")
            return None
        raise self._refusal(first)

    def _refusal(self, outcome: Outcome) -> HandlerLoadError | HandlerMemoryError:
        failure = outcome.failure
        name = outcome.sample.name
        text = f"the model was tried with {name} and cannot answer it"
        detail = dict(failure.detail()) if failure is not None else {}
        said = detail.get("text") if failure is not None else outcome.reason()  # what and where stand beside it
        detail["text"] = f"{text}: {said}" if said else text
        if name.startswith("a made-up"):
            detail.setdefault("fix", DESCRIBE_FIX)
        kind = HandlerMemoryError if outcome.answer[2] == 507 else HandlerLoadError
        error = kind(f"{text}: {outcome.reason()}", detail=detail)
        error.traceback = failure.traceback if failure is not None else ""
        return error

    # --- samples of the archive -----------------------------------------------------------------------------------

    def run_own(self) -> Verdict:
        """Everything for a handler of the archive's own."""
        answered = self._ask_samples(refuses=False)
        trial = None if answered else self._trial_of_network()
        return self._try_samples(answered) if trial is None else try_batches(self._spec, trial, is_built_in=False)

    def _trial_of_network(self) -> BuiltInTrial | None:
        """Of a handler that has what leads to its model's output from a built-in one: nothing else of it is called.

        None if it has not, or its model takes nothing that can be made up.
        """
        handler = self._entry.handler
        if not (makes_samples(handler) and all(self._entry.inherits(name) for name in INHERITED)):
            return None
        with contextlib.suppress(Exception):  # model-config.yaml does not describe the input
            for made_up in made_up_requests(handler, self._context):
                trial = BuiltInTrial(self._spec, self._entry, made_up)
                with contextlib.suppress(Exception):  # the next may fit
                    trial.answers([0])
                    return trial
        return None

    def _ask_samples(self, *, refuses: bool) -> list[Sample]:
        """Those that were answered.

        Raises:
            HandlerLoadError, HandlerMemoryError: one was not, and that is the model's fault, and ``refuses``.
        """
        answered = []
        for sample in archive_samples(self._spec.model_dir):
            outcome = self.ask(sample)
            if outcome.is_answered:
                answered.append(sample)
            elif refuses and not outcome.is_callers_fault:
                raise self._refusal(outcome)
            else:
                self._notes.append(f"the archive's {sample.name} was not answered: {outcome.reason()}")
        return answered

    def _try_samples(self, answered: list[Sample]) -> Verdict:
        if not answered:
            return Verdict(probe="not probed: no sample_input* file in the archive that it answers")
        items = [item_of(sample, number) for number, sample in enumerate(answered)]
        trial = AnswerTrial(self._spec, self._entry, self._invoker, items, self._limit)
        return try_batches(self._spec, trial, is_built_in=False)


def item_of(sample: Sample, number: int) -> Item:
    """The request as it comes over the wire to a worker."""
    pairs = (("content-type", sample.content_type), ("explain", "False"), ("url_path", ""))
    headers = "\n".join(text for pair in pairs for text in pair)
    return number, 0, f"rehearsal-{number}\0{headers}\0".encode(), bytearray(sample.body)


def _is_form(outcome: Outcome) -> bool:
    """Whether the model's output is of a form that its handler can do nothing with, whatever the input."""
    return outcome.failure is not None and outcome.failure.exception == "HandlerError"


class _Muted(logging.Filter):
    """Leaves out warnings of the thread that makes it; those of others, such as stuck ones, are not its own."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread or record.levelno > logging.WARNING


@contextlib.contextmanager
def nothing_stays(entry: EntryPoint, context: Context) -> Iterator[None]:
    """What the handler's calls within leave behind is undone: metrics, state of modules, random numbers, requests and
    attributes of the context."""
    handler = entry.handler
    kept = KeptAttributes(context, handler)
    state, randomness = KeptState(models_in(handler, entry.code.module)), KeptRandomness()
    attributes = dict(vars(handler)) if entry.is_built_in else None
    metrics = context.metrics
    if metrics is not None:
        metrics.is_muted = True
    muted = _Muted()
    # What a built-in handler says once, of NaN for instance, is for real answers.
    outputs = list(logging.root.handlers) if entry.is_built_in else []
    for output in outputs:
        output.addFilter(muted)
    try:
        yield
    finally:
        for output in outputs:
            output.removeFilter(muted)
        if metrics is not None:
            metrics.is_muted = False
            metrics.bind({})
        if attributes is not None:
            vars(handler).clear()
            vars(handler).update(attributes)
        context.bind(None)
        kept.restore()
        state.restore()
        randomness.restore()


class KeptAttributes:
    """The attributes of a context, and what containers among them hold, before calls that are not to be noticed.

    They stay as the calls leave them if the handler has changed attributes of its own, which stay too: it may have made
    something ready once, and count on all of it.
    """

    def __init__(self, context: Context, handler: Any):
        self._context = context
        self._handler = handler
        self._own = dict(getattr(handler, "__dict__", {}))
        self._attributes = dict(vars(context))
        # Not those that describe the model, which are large and nobody's to write.
        self._copies = [
            (value, value.copy()) for name, value in self._attributes.items()
            if type(value) in (dict, list, set) and name not in ("manifest", "model_yaml_config", "system_properties")
        ]  # fmt: skip

    def restore(self) -> None:
        """Makes the context what it was."""
        now = getattr(self._handler, "__dict__", {})
        if now.keys() != self._own.keys() or any(now[name] is not value for name, value in self._own.items()):
            return
        vars(self._context).clear()
        vars(self._context).update(self._attributes)
        for value, copy in self._copies:
            if isinstance(value, list):
                value[:] = copy
            else:
                value.clear()
                value.update(copy)
