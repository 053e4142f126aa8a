"""The one that knows what a cluster serves, and that has it changed on all replicas or on none.

    committed state ── a change makes the next one of it
       prepare     every replica loads what the next state has beside what it serves, and says whether it could
       commit      once all could: the next state is written down, and is what every replica serves from then on
       abort       one could not, or did not in time: what was loaded goes again, and its reasons are the answer

Replicas ask in turns for the newest directive (`Control.poll`), act, and answer (`Control.answer`); nobody has to know
how to reach them. A directive says all that is to be: one that is missed is made up for by the next. Nothing here
imports ray; `pyserve.replicas.actor` makes an actor of it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyserve.errors import ConflictError, JsonObject, ServeError
from pyserve.replicas.changing import changed
from pyserve.replicas.link import PREPARE_TIMEOUT_DEFAULT_S
from pyserve.replicas.state import State
from pyserve.replicas.stock import Stock

log = logging.getLogger(__name__)

# How long a poll waits for news, and after how long without one a replica counts as gone.
POLL_S = 2.0
GONE_S = 20.0
# Once one cannot prepare, how long the others have to say so, too.
REASONS_S = 3.0
# How long a commit waits to hear from all. It takes effect in milliseconds; who is silent is named.
COMMIT_S = 20.0
# After it was started again: until then replicas may not have found it, and nothing is committed that none has tried.
SETTLED_S = 8.0


@dataclass
class Member:
    """A replica that serves the committed state.

    Attributes:
        node: a name of the machine that people know.
        generation: that it serves.
        seen_at: when it last asked, on the control's clock.
        answered: the directive that it answered last.
        problem: why it could not follow it.
    """

    node: str
    generation: int
    seen_at: float
    answered: str = ""
    problem: str = ""


class Control:
    """Event loop only; made within it.

    Args:
        keep: writes the committed state down; blocks.
        kept: what was written down last; None for nothing.
        stock: the archives.
    """

    def __init__(
        self, keep: Callable[[bytes], object], kept: bytes | None, stock: Stock,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self._keep = keep
        self._clock = clock
        self._stock = stock
        self._state = State.from_json(json.loads(kept)) if kept else None
        self._members: dict[str, Member] = {}
        self._failures: dict[str, str] = {}  # by node: why a replica there could not begin
        self._archive_keys: set[str] = set()
        self._settled_at = clock() + SETTLED_S if kept else clock()
        self._changing = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._is_called_off = False
        self._news = asyncio.Event()
        self._epoch, self._count = os.urandom(4).hex(), 0
        self._directive: JsonObject = {}
        self._direct("serve")
        self._note_archives()
        for entry in self._state.entries if self._state else ():
            if entry.sha256 and not entry.url:
                stock.want(entry.sha256, entry.file)

    # --- replicas -------------------------------------------------------------------------------------------------

    async def committed(self, base: str) -> JsonObject | None:
        """The state that a new replica is to load; None if it has to say itself (`seed`)."""
        return self._state.to_json() if self._state is not None and self._state.base == base else None

    async def seed(self, state: JsonObject) -> JsonObject:
        """Begins with what the first replica has, unless another one was faster. What is to be served.

        Replicas with other arguments than the ones before, in a rollout of Ray Serve, take the place of those.
        """
        given = State.from_json(state)
        async with self._changing:
            if self._state is None or self._state.base != given.base:
                generation = given.generation if self._state is None else self._state.generation + 1
                await self._commit(State(generation, given.base, given.entries, given.defaults))
            assert self._state is not None
            return self._state.to_json()

    async def admit(self, member: str, node: str, base: str, generation: int) -> JsonObject:
        """Takes a replica in that has loaded ``generation``: ``{}``, or what it has to load before.

        Whatever is prepared meanwhile, it prepares too before that is committed.
        """
        async with self._writing:  # what is being written down is prepared by nobody any more: it is what comes next
            state = self._state
            if state is None or state.base != base:
                return {"phase": "leave"}
            if generation != state.generation:
                return {"phase": "behind", "state": state.to_json()}
            self._members[member] = Member(node, generation, self._clock())
            self._failures.pop(node, None)
            self._tell()
            return {}

    async def poll(self, member: str, seen: str, base: str) -> JsonObject:
        """The newest directive, as soon as it is another than ``seen``, or after POLL_S."""
        ends_at = self._clock() + POLL_S
        while True:
            if self._state is not None and self._state.base != base:
                return {"phase": "leave"}
            known = self._members.get(member)
            if known is None:
                return {"phase": "unknown"}
            known.seen_at = self._clock()
            if self._directive["id"] != seen or known.seen_at >= ends_at:
                return self._directive
            wanted = self._stock.wanted_of_one()
            if wanted:
                return {**self._directive, "give": wanted}
            await self._wait(ends_at - self._clock())

    async def answer(self, member: str, directive: str, generation: int, problem: str) -> None:
        """A replica has followed ``directive``, or could not. What comes late, of one before, says nothing any more."""
        known = self._members.get(member)
        if known is None:
            return
        known.seen_at = self._clock()
        if directive == self._directive["id"]:
            known.generation, known.answered, known.problem = generation, directive, problem
            self._tell()

    async def fail(self, node: str, reason: str) -> None:
        """A replica could not begin. Ray Serve, which tries again, does not tell its reason."""
        self._failures[node] = reason

    async def leave(self, member: str) -> None:
        """A replica ends."""
        self._members.pop(member, None)
        self._tell()

    # --- changes --------------------------------------------------------------------------------------------------

    async def change(
        self, kind: str, arguments: JsonObject, timeout_s: float = PREPARE_TIMEOUT_DEFAULT_S, turn_s: float = 0.0
    ) -> JsonObject:
        """Has a change made on all replicas or on none.

        Args:
            kind, arguments: see `pyserve.replicas.changing.changed`.
            timeout_s: how long the replicas may take to prepare.
            turn_s: how long it may wait for other changes, in the order in which they came.

        Returns:
            ``generation`` that is served now and, if it is the new one, ``committed``: the time in s that took, with
            ``silent``, the nodes that have not confirmed it yet. Otherwise ``reasons`` by node, or ``error`` if the
            change cannot be made of what is served.
        """
        if not await self._is_its_turn(turn_s):
            return self._refused(ConflictError("Another change of the cluster is under way; try again when it is done"))
        try:
            while self._clock() < self._settled_at:
                await self._wait(self._settled_at - self._clock())
            if self._state is None:
                return self._refused(ConflictError("No replica has started yet; see `pyserve status`"))
            try:
                state = changed(self._state, kind, arguments)
            except ServeError as error:
                return self._refused(error)
            return await self._change(state, arguments.get("sample"), timeout_s)
        finally:
            self._changing.release()

    async def _is_its_turn(self, turn_s: float) -> bool:
        """Whether this change is now the one that is made."""
        if self._changing.locked() and not turn_s:
            return False
        try:
            return await asyncio.wait_for(self._changing.acquire(), turn_s or None)
        except asyncio.TimeoutError:
            return False

    async def cancel(self) -> None:
        """Calls off the change that is being prepared; one that is committed already stays."""
        self._is_called_off = True
        self._tell()

    def _refused(self, error: ServeError) -> JsonObject:
        generation = self._state.generation if self._state else 0
        return {"generation": generation, "error": error.message, "status": error.status, "type": error.type,
                "detail": error.detail}  # fmt: skip

    async def _change(self, state: State, sample: JsonObject | None, timeout_s: float) -> JsonObject:
        before = self._state
        assert before is not None
        self._is_called_off = False
        self._archive_keys |= {each.archive_key for each in state.entries}
        self._direct("prepare", next=state.to_json(), sample=sample)
        try:
            reasons = await self._followed(timeout_s, gives_up=True)
        except BaseException:
            self._direct("serve")
            raise
        if reasons:
            self._direct("serve")
            await self._followed(REASONS_S)
            return {"generation": before.generation, "reasons": reasons}
        started = self._clock()
        try:
            await self._commit(state)
        except Exception as error:
            log.exception("the state of the cluster cannot be written down")
            self._direct("serve")
            await self._followed(REASONS_S)
            return {"generation": before.generation, "reasons": {"control": f"it cannot be written down: {error}"}}
        silent = await self._followed(COMMIT_S)
        self._stock.forget({entry.archive_key for entry in state.entries})
        return {
            "generation": state.generation, "committed": self._clock() - started, "silent": silent,
            "replicas": len(self._members), "nodes": len({member.node for member in self._members.values()}),
        }  # fmt: skip

    async def _commit(self, state: State) -> None:
        """Writes the state down, and has it served. From here on there is no way back.

        Replicas of other arguments take no part in it: their next `poll` says so.
        """
        async with self._writing:
            await asyncio.to_thread(self._keep, state.text().encode())
            if self._state is None or self._state.base != state.base:
                self._members.clear()
            self._state = state
            self._note_archives()
            self._direct("serve")

    def _note_archives(self) -> None:
        self._archive_keys |= {each.archive_key for each in self._state.entries} if self._state else set()

    def _direct(self, phase: str, **more: Any) -> None:
        self._count += 1
        state = self._state.to_json() if self._state else None
        self._directive = {"id": f"{self._epoch}-{self._count}", "phase": phase, "state": state, **more}
        self._tell()

    async def _followed(self, limit_s: float, *, gives_up: bool = False) -> dict[str, str]:
        """Waits until every replica has answered the newest directive. The problems, by node.

        Args:
            gives_up: once there is one, wait no longer than REASONS_S for others.
        """
        now = self._clock()
        ends_at = now + limit_s
        while True:
            now = self._clock()
            for name in [name for name, member in self._members.items() if now - member.seen_at > GONE_S]:
                log.warning("replica %s on %s has not been heard of for %g s", name, self._members[name].node, GONE_S)
                del self._members[name]
            current = self._directive["id"]
            late = {each.node for each in self._members.values() if each.answered != current}
            problems = {each.node: each.problem for each in self._members.values()
                        if each.answered == current and each.problem}  # fmt: skip
            if gives_up and self._is_called_off:
                return {"command": "it was called off"}
            if not late:
                return problems
            if problems and gives_up:
                ends_at = min(ends_at, now + REASONS_S)
                gives_up = False
            if now >= ends_at:
                return problems or dict.fromkeys(sorted(late), f"no answer within {limit_s:g} s")
            await self._wait(min(1.0, ends_at - now))

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _wait(self, limit_s: float) -> None:
        waiting = asyncio.ensure_future(self._news.wait())
        try:
            await asyncio.wait([waiting], timeout=max(limit_s, 0.001))
        finally:
            waiting.cancel()

    # --- looking --------------------------------------------------------------------------------------------------

    async def status(self) -> JsonObject:
        """``generation``, ``models`` with their versions, ``replicas``, why others could not begin (``failures``),
        whether a change is ``changing`` them, and the bytes of archives that were ``sent`` to each node.
        """
        state = self._state
        return {
            "generation": state.generation if state else 0,
            "models": [] if state is None else [
                {"model": entry.name, "version": entry.version, "default": state.defaults[entry.name] == entry.version,
                 "file": entry.file, "durable": bool(entry.url or entry.path)}
                for entry in state.entries
            ],
            "replicas": [
                {"id": name, "node": member.node, "generation": member.generation,
                 "heard": self._clock() - member.seen_at}
                for name, member in self._members.items()
            ],
            "failures": dict(self._failures),
            "changing": self._changing.locked(),
            "sent": self._stock.sent,
        }  # fmt: skip

    # --- archives -------------------------------------------------------------------------------------------------

    async def archive_keys(self) -> list[str]:
        """Of all archives that nodes may keep for what is and was served, or was to be."""
        return sorted(self._archive_keys - {""})

    async def has(self, sha256: str, file: str) -> bool:
        """Whether this node has an archive, so that replicas can get it here."""
        return await self._stock.has(sha256, file)

    async def receive(self, sha256: str, file: str, size: int, offset: int, data: bytes) -> None:
        """A part of an archive; the last one completes it. See `Stock.receive`."""
        self._archive_keys.add(sha256)
        await self._stock.receive(sha256, file, size, offset, data)
        self._tell()

    async def part(self, sha256: str, file: str, offset: int, node: str) -> Any:
        """A part of an archive, for a replica on ``node``. See `Stock.part`."""
        self._stock.want(sha256, file)
        self._tell()
        return await self._stock.part(sha256, file, offset, node)
