"""Which backend a model of the native lane runs on, where that is not settled when it is READY: found out behind its
first requests.

    READY on TorchScript ──> looked at ──> one is made ──> loaded, compared, measured ──> exchanged if better, kept
                                 │             └── the next one is made meanwhile, and has to beat what runs then
                                 └──> stays: too quick to matter, state, random numbers, nothing else installed

The one that is quickest to make comes first. A start that finds a choice in the middle begins with the best so far
(`kept_backend`) and continues here; so does a model whose backend is named and could not be made before it had to be
READY. One model of a server at a time is made and tried for.

Loop thread only, but for what says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar

import torch

from pyserve.archive.archive import Archive
from pyserve.backends.kept import Choice, Made, keep_choice
from pyserve.backends.making import Making
from pyserve.backends.shown import shown
from pyserve.backends.table import AGREEMENT, BACKENDS, TORCHSCRIPT
from pyserve.backends.trial import NO_TIME, TRIAL_DEFAULT_S, Tried, choose, try_backends
from pyserve.errors import ModelLoadError, is_memory_error
from pyserve.lanes.exchange import exchange
from pyserve.lanes.limited_runs import limited_runs
from pyserve.lanes.native import NativeLane
from pyserve.lanes.network import Network
from pyserve.lanes.resources import Services
from pyserve.models.backend_network import (
    Split,
    conservative_reason,
    exact_of,
    load_backend,
    load_named,
    note_named,
    precisions_of,
    prove_backend,
    released_unless_used,
    who_says,
)
from pyserve.models.later_layout import load_in_layout
from pyserve.torch_error import cause_of

T = TypeVar("T")

log = logging.getLogger(__name__)

AUTO = "auto"
# Of one item: below, the network is not what answers take their time for.
TRIAL_MIN_MS = 1.0
# Compilers of large models take minutes, at a low priority beside requests more.
MAKING_LIMIT_S = 3600.0
BESIDE_REQUESTS = (
    "beside requests it is given no more; have it made when the archive is packed: pyserve archive --compile"
)
# For the thread of a making that was stopped.
LEAVING_S = 5.0
_LOOKS = 3  # runs of the example; the shortest counts


class EngineChoice:
    """Of one loaded model.

    Args:
        lane: whose network says in its ``findings`` what is known, see `shown`.
    """

    def __init__(self, services: Services, archive: Archive, lane: NativeLane):
        self._services = services
        self._archive = archive
        self._lane = lane
        self._task: asyncio.Task[None] | None = None
        self._begun: Making | None = None  # before the model had to be READY, of the backend that is named
        known = lane.network.findings.get("backend", {})
        self._chosen = str(known.get("chosen", TORCHSCRIPT))
        self._reason = str(known.get("reason", ""))  # why that one
        self._tried: dict[str, Mapping[str, Any]] = {each["backend"]: each for each in known.get("tried", ())}
        self._passing: set[str] = set()  # backends of which another start may find something else
        self._trial_left_s = float(archive.config.backend_trial_s or TRIAL_DEFAULT_S)
        self._is_trying = False
        self._making_text = ""  # the last that was said

    def start(self) -> None:
        """Begins to choose, or continues, if something is left to be found out and that has not begun."""
        known = self._lane.network.findings.get("backend")
        is_settled = known is not None and known["state"] == "settled"
        if self._task is not None or (is_settled and self._lane.network.in_layout is None):
            return
        if known is None:
            self._show("trying", "it begins on TorchScript, and others are looked at")
        begun, self._lane.network.making = self._lane.network.making, None
        self._begun = begun if isinstance(begun, Making) else None
        self._task = asyncio.get_running_loop().create_task(self._run(is_settled=is_settled))

    async def stop(self) -> None:
        """Ends it, and whatever it has started. Takes as long as files need to be removed, LEAVING_S at most."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._begun is not None:
            self._begun.stop()

    @property
    def _label(self) -> str:
        """What runs the model now, for a person."""
        return BACKENDS[self._chosen].label

    def _show(self, state: str, text: str = "") -> None:
        """What is known so far, and ``text`` about what is done now."""
        reason = "; ".join(filter(None, [self._reason, text]))
        self._lane.network.findings["backend"] = shown(self._chosen, reason, list(self._tried.values()), state=state)

    async def _run(self, *, is_settled: bool) -> None:
        lane = self._lane
        wanted = self._archive.config.backend or self._services.config.default_backend
        try:
            if lane.network.in_layout is not None:
                async with self._services.laying_out:
                    await self._lay_out()
            if is_settled:
                return
            reason = await self._reason_to_stay() if wanted == AUTO and not self._tried else ""
            if reason:
                self._show("settled", reason)
                log.info("%s stays on %s: %s", lane.label, self._label, reason)
                return
            self._show("making", "others are made when it is its turn: one model at a time")
            async with self._services.choosing:
                await (self._choose() if wanted == AUTO else self._follow(wanted))
        except ModelLoadError as error:  # a run that does not come to an end
            log.error("%s stays on %s: %s", lane.label, self._label, error.message)
            self._show("settled", error.message)
        except Exception as error:
            log.exception("%s stays on %s: choosing a backend failed", lane.label, self._label)
            self._show("settled", f"choosing failed with a {type(error).__name__}, see the log: {cause_of(str(error))}")

    async def _lay_out(self) -> None:
        """Has a network that was loaded as the plain graph run in oneDNN's layout, if that changes nothing."""
        lane, network = self._lane, self._lane.network
        await self._batches_tried()
        threads = self._services.engine.intra_op_threads
        candidate = None
        try:
            candidate, note = await self._in_thread(partial(load_in_layout, network, lane.batch_size_max, threads))
            if candidate is not None and (failure := await exchange(lane, candidate)):
                note = f"left out: its workers cannot run it: {failure}"
        except ModelLoadError as error:
            note = f"left out: {error.message}"
        finally:
            if candidate is not None and lane.network is not candidate:
                candidate.release()
        network.in_layout = None
        lane.network.findings["optimization"] = note
        log.info("%s: %s", lane.label, note or "the layout of its graph stays as it is")

    async def _reason_to_stay(self) -> str:
        network, config = self._lane.network, self._archive.config
        if config.backend_trial_s == 0:
            return "model-config.yaml says 'backendTrialSeconds: 0'"
        await self._batches_tried()
        if not _candidates(network.precision):
            reasons = [f"{row.label}: {row.missing()}" for row in BACKENDS.values() if row.missing()]
            return "; ".join(["nothing else runs it here", *reasons])
        return await self._in_thread(
            partial(_reason_of_network, network, self._lane.batch_size_max, self._services.engine.intra_op_threads)
        )

    async def _batches_tried(self) -> None:
        """Until the size of its batches is settled."""
        while (proving := self._lane.proving) is not None and not proving.done():
            await asyncio.wait([proving])

    # --- among all that there are -------------------------------------------------------------------------------------

    async def _choose(self) -> None:
        lane, batch_size = self._lane, self._lane.settings.batch_size
        left = [name for name in _candidates(lane.network.precision) if name not in self._tried]
        async with contextlib.aclosing(self._made(left)) as makes:
            async for made in makes:
                left.remove(made.backend)
                self._is_trying = True
                self._show("trying", f"{BACKENDS[made.backend].label} is compared and measured")
                await self._consider(made, share=1 / (1 + len(left)))
                if self._chosen != TORCHSCRIPT:
                    await self._in_thread(lane.network.torch_model.settle)
                self._is_trying = False
                if lane.settings.batch_size == batch_size:
                    await self._keep(left)
                if left:
                    self._show("making", self._making_text)
        self._show("settled")
        log.info("%s runs on %s: %s", lane.label, self._label, self._reason)

    async def _made(self, backends: Sequence[str]) -> AsyncGenerator[Made, None]:
        """What became of each, as soon as that is known; the next one is being made meanwhile."""
        loop, lane = asyncio.get_running_loop(), self._lane
        found: asyncio.Queue[Made | None] = asyncio.Queue()
        making = self._begun or Making(self._archive, backends, lane.network.precision, lane.batch_size_max)
        self._begun = None

        def tell(call: Callable[..., None], value: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(call, value)

        def make() -> None:
            try:
                progress = partial(tell, self._note_progress)
                for made in making.each(progress, MAKING_LIMIT_S, advice=BESIDE_REQUESTS):
                    tell(found.put_nowait, made)
            finally:
                tell(found.put_nowait, None)

        running = loop.create_task(self._in_thread(make))
        try:
            while (made := await found.get()) is not None:
                yield made
            await running
        finally:
            making.stop()
            try:
                # It ends at once, and removes files of a compiler that nobody else would.
                await asyncio.wait([running], timeout=LEAVING_S)
            finally:
                running.cancel()
                await asyncio.wait([running])

    def _note_progress(self, text: str) -> None:
        self._making_text = text
        if not self._is_trying and self._task is not None and not self._task.done():
            self._show("making", text)

    async def _consider(self, made: Made, share: float) -> None:
        """Measures it beside what runs now, and has it take its place if it is better.

        Args:
            share: of the trial's time that is left.
        """
        lane, network = self._lane, self._lane.network
        await self._batches_tried()
        if not made.lasts:
            self._passing.add(made.backend)
        try:
            candidate = await self._load(made)
        except ModelLoadError as error:
            if is_memory_error(error.__cause__ or error):
                self._passing.add(made.backend)
            log.info("%s: %s is left out: %s", lane.label, BACKENDS[made.backend].label, error.message)
            self._tried[made.backend] = asdict(Tried(made.backend, refused=error.message))
            self._add_reason(f"{made.backend} is left out: {error.message}")
            return
        try:
            tried = await self._measured(made.backend, candidate, share)
            name, reason = choose(tried, self._chosen)
            failure = await exchange(lane, candidate) if name == made.backend else ""
        finally:
            if lane.network is not candidate:
                candidate.release()  # a copy of the weights
        if failure or any(each.refused == NO_TIME for each in tried):
            self._passing.add(made.backend)
        if failure:
            reason = f"{BACKENDS[name].label} was chosen, but cannot run here: {failure}"
        elif name == made.backend:
            self._chosen, self._reason = name, ""
        self._tried |= {each.backend: asdict(each) for each in tried}
        self._add_reason(reason)
        if lane.network is not network:
            self._show("trying")  # at once: the lane has another network
            log.info("%s runs on %s from now on: %s", lane.label, self._label, reason)

    def _add_reason(self, text: str) -> None:
        self._reason = "; ".join(filter(None, [self._reason, text]))

    async def _load(self, made: Made) -> Network:
        """Raises ModelLoadError: it could not be made or loaded, or is not to be believed."""
        lane, engine = self._lane, self._services.engine
        split = Split(max(1, lane.wanted_count), engine.intra_op_threads, engine.cpu_budget)
        return await self._in_thread(partial(_proven, self._archive, self._truth(), made, split, lane.batch_size_max))

    def _truth(self) -> Network:
        """The network as plain TorchScript answers."""
        network = self._lane.network
        return network if self._chosen == TORCHSCRIPT else replace(network, torch_model=_Plain(network.torch_model))

    async def _measured(self, name: str, candidate: Network, share: float) -> list[Tried]:
        lane, network, truth, standing = self._lane, self._lane.network, self._truth(), self._chosen
        threads, batch_size = self._services.engine.intra_op_threads, lane.batch_size_max
        began = time.monotonic()

        def measure() -> list[Tried]:
            torch.set_num_threads(threads)  # of this thread
            return try_backends(
                {standing: network.torch_model, name: candidate.torch_model}, truth.torch_model, network.example,
                network.domains, batch_size=batch_size, limit_s=self._trial_left_s * share, standing=standing,
                tolerances={name: AGREEMENT[network.precision]}, is_over=lambda: lane.is_draining,
                precisions=precisions_of(truth), exact=exact_of(truth),
            )  # fmt: skip

        tried = await self._in_thread(measure)
        self._trial_left_s = max(0.0, self._trial_left_s - (time.monotonic() - began))
        return tried

    async def _keep(self, left: Sequence[str]) -> None:
        """For the next start.

        Args:
            left: backends that are still to be tried.
        """
        lane = self._lane
        is_final = not left and not self._passing
        if not is_final and self._chosen == TORCHSCRIPT:
            return  # it begins with that anyway
        lasting = tuple(dict(each) for name, each in self._tried.items() if name not in self._passing)
        choice = Choice(self._chosen, self._reason, lasting, is_final)
        batch_size, cpus = lane.settings.batch_size, self._services.engine.cpu_budget
        try:
            await asyncio.to_thread(keep_choice, self._archive, lane.network.precision, batch_size, cpus, choice)
        except OSError as error:
            log.warning("%s: its backend will be chosen again at the next start, since the choice cannot be kept: %s",
                        lane.label, error.strerror)  # fmt: skip

    # --- one that is named, and took longer than the model may take to start ------------------------------------------

    async def _follow(self, backend: str) -> None:
        lane, engine, label = self._lane, self._services.engine, BACKENDS[backend].label
        says = who_says(self._archive, backend)
        async with contextlib.aclosing(self._made([backend])) as makes:
            (made,) = [each async for each in makes]
        await self._batches_tried()
        self._show("trying", f"{label} is compared with TorchScript")
        split = Split(max(1, lane.wanted_count), engine.intra_op_threads, engine.cpu_budget)
        load = partial(load_named, self._archive, lane.network, made, batch_size=lane.batch_size_max, split=split)
        try:
            candidate, compared = await self._in_thread(load)
            if failure := await exchange(lane, candidate):
                candidate.release()
                raise ModelLoadError(f"its workers cannot run it: {failure}")
        except ModelLoadError as error:
            self._reason = f"{says} cannot be followed: {error.message}"
            log.warning("%s runs on %s: %s", lane.label, self._label, self._reason)
            self._show("settled")
            return
        self._chosen = backend
        note_named(candidate, backend, says, compared)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        """Calls what may take long, or run a network."""
        lane = self._lane
        return await limited_runs(call, limit_s=lane.settings.startup_timeout_s, stuck=self._services.stuck,
                                  label=lane.label, is_served=True)  # fmt: skip


class _Plain:
    """What runs a network on another backend, asked for what plain TorchScript answers."""

    def __init__(self, torch_model: Any):
        self._torch_model = torch_model

    def run(self, inputs: Sequence[torch.Tensor]) -> Any:
        return self._torch_model.run_plain(inputs)


def _candidates(precision: str) -> list[str]:
    """Backends that can be made and run here, without TorchScript; the quickest to make first."""
    return [
        name for name, row in BACKENDS.items()
        if name != TORCHSCRIPT and precision in row.precisions and not row.missing()
    ]  # fmt: skip


def _reason_of_network(network: Network, batch_size: int, threads: int) -> str:
    """Why it stays on TorchScript, whatever others would take; ``""`` if that is to be found out. Runs it."""
    torch.set_num_threads(threads)  # of this thread
    shortest_ms = min(_run_ms(network) for _ in range(_LOOKS))
    if shortest_ms < TRIAL_MIN_MS:
        return f"one item takes {shortest_ms:.2g} ms, less than the {TRIAL_MIN_MS:g} ms from which another could matter"
    return conservative_reason(network, batch_size)


def _run_ms(network: Network) -> float:
    began = time.perf_counter()
    network.run(network.example)
    return (time.perf_counter() - began) * 1e3


def _proven(archive: Archive, network: Network, made: Made, split: Split, batch_size: int) -> Network:
    """Raises ModelLoadError with the reason why it is not to be used."""
    with released_unless_used(load_backend(archive, network, made, split)) as candidate:
        if problem := prove_backend(network, candidate, batch_size):
            raise ModelLoadError(f"it gives other answers: {problem}")
    return candidate
