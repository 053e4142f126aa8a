"""Which backend a model of the native lane runs on, where nobody says: chosen behind its first requests.

    READY on TorchScript ──> looked at ──> made ──> loaded, compared, measured ──> chosen and kept ──> exchanged
                                 └──> stays: too quick to matter, state, random numbers, nothing else installed

What was chosen before is loaded at once (`kept_backend`). One model of a server at a time is made and tried for.

Loop thread only, but for what says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TypeVar

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
from pyserve.models.backend_network import Split, conservative_reason, load_backend, prove_backend, released_unless_used
from pyserve.torch_error import cause_of

T = TypeVar("T")

log = logging.getLogger(__name__)

AUTO = "auto"
# Of one item: below, the network is not what answers take their time for.
TRIAL_MIN_MS = 1.0
# Compilers of large models take minutes, at a low priority beside requests more.
MAKING_LIMIT_S = 3600.0
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
        self._was_short_of_memory = False

    def start(self) -> None:
        """Begins to choose, if that is wanted and has not begun."""
        wanted = self._archive.config.backend or self._services.config.default_backend
        if self._task is not None or "backend" in self._lane.network.findings:
            return
        if wanted != AUTO:
            self._show("settled", f"model-config.yaml or default_backend says 'backend: {wanted}'")
            return
        self._show("trying", "it begins on TorchScript, and others are looked at")
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Ends it, and whatever it has started. Returns at once."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _show(self, state: str, reason: str, tried: Sequence[Tried] = (), chosen: str = TORCHSCRIPT) -> None:
        entries = [asdict(each) for each in tried]
        self._lane.network.findings["backend"] = shown(chosen, reason, entries, state=state)

    async def _run(self) -> None:
        try:
            reason = await self._reason_to_stay()
            if reason:
                self._show("settled", reason)
                log.info("%s stays on TorchScript: %s", self._lane.label, reason)
                return
            self._show("making", "others are made when it is its turn: one model at a time")
            async with self._services.choosing:
                await self._choose()
        except ModelLoadError as error:  # a run that does not come to an end
            log.error("%s stays on TorchScript: %s", self._lane.label, error.message)
            self._show("settled", error.message)
        except Exception as error:
            log.exception("%s stays on TorchScript: choosing a backend failed", self._lane.label)
            self._show("settled", f"choosing failed with a {type(error).__name__}, see the log: {cause_of(str(error))}")

    async def _reason_to_stay(self) -> str:
        network, config = self._lane.network, self._archive.config
        if config.backend_trial_s == 0:
            return "model-config.yaml says 'backendTrialSeconds: 0'"
        while (proving := self._lane.proving) is not None and not proving.done():  # the size of its batches is open
            await asyncio.wait([proving])
        if not _candidates(network.precision):
            reasons = [f"{row.label}: {row.missing()}" for row in BACKENDS.values() if row.missing()]
            return "; ".join(["nothing else runs it here", *reasons])
        return await self._in_thread(
            partial(_reason_of_network, network, self._lane.batch_size_max, self._services.engine.intra_op_threads)
        )

    async def _choose(self) -> None:
        candidates: dict[str, Network] = {}
        try:
            await self._choose_among(candidates)
        finally:
            for each in candidates.values():
                if each is not self._lane.network:
                    each.release()  # a copy of the weights

    async def _choose_among(self, candidates: dict[str, Network]) -> None:
        """Fills in ``candidates``: backend -> the network that was loaded for it."""
        lane, network = self._lane, self._lane.network
        batch_size = lane.settings.batch_size
        made = await self._made(_candidates(network.precision), network)
        self._show("trying", "what was made is compared with TorchScript and measured")
        tried = await self._load(made, network, candidates)
        tried = [*(await self._tried(network, candidates) if candidates else [Tried(TORCHSCRIPT)]), *tried]
        name, reason = choose(tried)
        failure = await exchange(lane, candidates[name]) if name != TORCHSCRIPT else ""
        is_same_size = lane.settings.batch_size == batch_size
        if failure:
            name, reason = TORCHSCRIPT, f"{BACKENDS[name].label} was chosen, but cannot run here: {failure}"
        self._show("trying", reason, tried, name)  # at once: the lane may have another network
        has_time = not any(each.refused == NO_TIME for each in tried)
        is_final = all(each.lasts for each in made) and has_time and not self._was_short_of_memory
        if is_final and is_same_size and not failure:
            # Else the next start may come to another choice, or would begin with what cannot run.
            await self._keep(network.precision, Choice(name, reason, tuple(asdict(each) for each in tried)))
        self._show("settled", reason, tried, name)
        log.info("%s runs on %s: %s", lane.label, BACKENDS[name].label, reason)
        if name != TORCHSCRIPT:
            await self._in_thread(lane.network.torch_model.settle)

    async def _made(self, backends: list[str], network: Network) -> list[Made]:
        making = Making(self._archive, backends, network.precision, self._lane.batch_size_max)
        try:
            wait = partial(making.wait, lambda text: self._show("making", text), MAKING_LIMIT_S)
            return await self._in_thread(wait)
        finally:
            making.stop()

    async def _load(self, made: list[Made], network: Network, candidates: dict[str, Network]) -> list[Tried]:
        """Fills in what could be loaded and may be believed; returns the others with the reason."""
        lane, engine = self._lane, self._services.engine
        split = Split(max(1, lane.wanted_count), engine.intra_op_threads, engine.cpu_budget)
        refused: list[Tried] = []
        for each in made:
            try:
                load = partial(_proven, self._archive, network, each, split, lane.batch_size_max)
                candidates[each.backend] = await self._in_thread(load)
            except ModelLoadError as error:
                refused.append(Tried(each.backend, refused=error.message))
                self._was_short_of_memory |= is_memory_error(error.__cause__ or error)
                log.info("%s: %s is left out: %s", lane.label, BACKENDS[each.backend].label, error.message)
        return refused

    async def _tried(self, network: Network, candidates: dict[str, Network]) -> list[Tried]:
        lane = self._lane
        threads, batch_size = self._services.engine.intra_op_threads, lane.batch_size_max
        limit_s = self._archive.config.backend_trial_s or TRIAL_DEFAULT_S

        def measure() -> list[Tried]:
            torch.set_num_threads(threads)  # of this thread
            models = {TORCHSCRIPT: network.torch_model, **{n: each.torch_model for n, each in candidates.items()}}
            return try_backends(
                models, network.torch_model, network.example, network.domains, batch_size=batch_size,
                limit_s=limit_s, tolerances=dict.fromkeys(candidates, AGREEMENT[network.precision]),
                is_over=lambda: lane.is_draining,
            )  # fmt: skip

        return await self._in_thread(measure)

    async def _keep(self, precision: str, choice: Choice) -> None:
        batch_size, cpus = self._lane.settings.batch_size, self._services.engine.cpu_budget
        try:
            await asyncio.to_thread(keep_choice, self._archive, precision, batch_size, cpus, choice)
        except OSError as error:
            log.warning("%s: its backend will be chosen again at the next start, since the choice cannot be kept: %s",
                        self._lane.label, error.strerror)  # fmt: skip

    async def _in_thread(self, call: Callable[[], T]) -> T:
        """Calls what may take long, or run a network."""
        lane = self._lane
        return await limited_runs(call, limit_s=lane.settings.startup_timeout_s, stuck=self._services.stuck,
                                  label=lane.label, is_served=True)  # fmt: skip


def _candidates(precision: str) -> list[str]:
    """Backends that can be made and run here, without TorchScript."""
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
