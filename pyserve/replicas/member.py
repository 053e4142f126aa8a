"""A replica's part in what its cluster serves: it loads what the control says, and switches when that says so.

join      the committed state is loaded before the replica is ready; if it changed meanwhile, what it is now
prepare   what the next state has is loaded beside what is served, warmed and tried
serve     defaults change at once; what is not served any more is drained, and goes

Where the control cannot be reached, what is served stays as it is. Nothing here imports ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from pyserve.background import Background
from pyserve.config.archive_url import is_url, parse_url
from pyserve.config.model_source import resolve_models
from pyserve.embedding.running import Running
from pyserve.errors import JsonObject, ModelLoadError, ServeError
from pyserve.fetch.sources import ArchiveSources, Obtained
from pyserve.models.model import Model
from pyserve.models.registry import Registry
from pyserve.replicas.archives import NodeArchives
from pyserve.replicas.delivery import Delivery
from pyserve.replicas.link import PREPARE_TIMEOUT_DEFAULT_S, RETRY_S, TURN_S, Link, LinkError
from pyserve.replicas.state import Entry, State
from pyserve.replicas.trying import try_sample

log = logging.getLogger(__name__)


class Member:
    """Loop of the engine only.

    Args:
        id: of this replica.
        node: a name of this machine that people know.
        base: of the application's arguments.

    Attributes:
        state: what is served; None before `join`.
        generation: its number; requests from now on get what it says.
        problem: why this replica cannot serve what the cluster serves; ``""`` if nothing is wrong.
        on_generation: told each.
    """

    def __init__(
        self, link: Link, *, id: str, node: str, base: str, archives: NodeArchives | None = None,
        on_generation: Callable[[int], object] = bool,
    ):  # fmt: skip
        self._link = link
        self._id = id
        self._node = node
        self._base = base
        self._delivery = Delivery(link, archives or NodeArchives(), node)
        self.on_generation = on_generation
        self.state: State | None = None
        self.generation = 0
        self.problem = ""
        self._loaded: dict[tuple[str, str], Entry] = {}  # by name and version: what it was loaded from
        self._running: Running | None = None
        self._following: list[asyncio.Future[None]] = []
        self._background = Background()
        self._seen = ""
        self._directive: JsonObject = {}
        self._news = asyncio.Event()

    async def committed(self) -> bool:
        """Whether the control says what is to be loaded. Otherwise the replica is the first, and says it itself."""
        found = await self._call("committed", self._base)
        self.state = State.from_json(found) if found is not None else None
        return self.state is not None

    async def join(self, running: Running, models: Sequence[str] = ()) -> None:
        """Loads what is served, and takes part from now on; returns when both are so.

        Args:
            running: the engine.
            models: that it was started with, as they were given, where this is the first replica.

        Raises:
            ServeError: it cannot be loaded, or there is nothing.
        """
        registry = running.server.registry
        self._running = running
        registry.on_names = self._look_at_names
        if self.state is None:
            urls = _urls(models, running.config.model_store)
            entries = tuple(_entry_of(model, urls) for model in registry.all_models())
            if not entries:
                raise ModelLoadError(
                    "nobody knows what this cluster is to serve; stop its application, and start it again"
                )
            self._loaded = {entry.key: entry for entry in entries}
            found = await self._call("seed", State.first(self._base, entries).to_json())
            self.state = State.from_json(found)
        await self._catch_up(self.state)
        self._following = [asyncio.ensure_future(self._lasting(each)) for each in (self._poll, self._work)]

    async def _catch_up(self, state: State) -> None:
        while True:
            await self._switch(state)
            told = await self._call("admit", self._id, self._node, self._base, self.generation)
            if told.get("phase") != "behind":
                return
            state = State.from_json(told["state"])

    async def fail(self, reason: str) -> None:
        """The replica cannot begin."""
        with contextlib.suppress(LinkError, ServeError, asyncio.TimeoutError):
            await asyncio.wait_for(self._link.call("fail", self._node, reason), RETRY_S)

    async def leave(self) -> None:
        """The replica ends."""
        while self._following:  # before Python 3.12 `wait_for` may swallow a cancellation
            for task in self._following:
                task.cancel()
            done, _ = await asyncio.wait(self._following, timeout=RETRY_S)
            self._following = [task for task in self._following if task not in done]
        await self._background.finish()  # a version that goes is to be gone
        with contextlib.suppress(LinkError, ServeError, asyncio.TimeoutError):
            await asyncio.wait_for(self._link.call("leave", self._id), RETRY_S)

    async def change(self, kind: str, arguments: JsonObject) -> JsonObject:
        """Has the cluster changed, see `Control.change`; after the changes that came before.

        Raises:
            LinkError: the control cannot be reached; whether the change was made is not known.
        """
        found: JsonObject = await self._link.call("change", kind, arguments, PREPARE_TIMEOUT_DEFAULT_S, TURN_S)
        return found

    async def give(self, sha256: str, file: str, path: Path) -> None:
        """Gives the control an archive of this node, unless it has it.

        Raises:
            LinkError, ServeError: it was not taken.
        """
        if not await self._link.call("has", sha256, file):
            await self._delivery.send(path, sha256, file)

    async def found(self, name: str) -> Obtained:
        """An archive in the model store of this replica.

        Raises:
            ServeError: there is none.
        """
        assert self._running is not None
        return await ArchiveSources(self._running.config).obtain(name)

    async def fetched(self, url: str) -> Path:
        """What this node has from a URL.

        Raises:
            ServeError: it cannot be fetched.
        """
        assert self._running is not None
        return await self._delivery.brought(Entry("", "", "", url=url), self._running.config)

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Until the control can be reached."""
        while True:
            try:
                return await self._link.call(method, *arguments)
            except LinkError as error:
                log.warning("the control of the cluster cannot be reached: %s", error)
                await asyncio.sleep(RETRY_S)

    # --- following ------------------------------------------------------------------------------------------------

    async def _lasting(self, work: Callable[[], Awaitable[None]]) -> None:
        """Without it nothing of the cluster would reach this replica: another one is to take its place."""
        try:
            await work()
        except Exception as error:
            log.exception("following the control failed")
            self.problem = f"this replica cannot follow the cluster's control: {type(error).__name__}: {error}"

    async def _poll(self) -> None:
        while True:
            told = await self._call("poll", self._id, self._seen, self._base)
            phase = told["phase"]
            if phase == "leave":
                log.info("the application has other arguments by now; this replica stays as it is until it is stopped")
                return
            for sha256, file in told.get("give", ()):
                self._background.begin(self._delivery.give(sha256, file), f"giving {file}")
            if phase == "unknown":
                # The control was started again, or has not heard of us for long.
                told = {"phase": "rejoin", "id": ""}
                self._directive = told
                self._news.set()
                self._seen = ""
                await asyncio.sleep(RETRY_S)
            elif told["id"] != self._seen:
                self._seen = told["id"]
                self._directive = told
                self._news.set()

    async def _work(self) -> None:
        """Follows the newest directive; what has come meanwhile, next."""
        while True:
            await self._news.wait()
            self._news.clear()
            told = self._directive
            try:
                problem = await self._follow(told)
            except Exception as error:
                log.exception("following the control failed")
                problem = f"{type(error).__name__}: {error}"
            if told["phase"] != "prepare":
                self.problem = f"this replica cannot serve what the cluster serves: {problem}" if problem else ""
            if told["id"]:
                await self._call("answer", self._id, told["id"], self.generation, problem)

    async def _follow(self, told: JsonObject) -> str:
        """Why it cannot be followed; ``""`` if it was."""
        try:
            if told["phase"] == "rejoin":
                await self._rejoin()
            elif told["phase"] == "prepare":
                if told["state"]["generation"] != self.generation:  # what was committed before has been missed
                    await self._switch(State.from_json(told["state"]))
                state = State.from_json(told["next"])
                await self._load(state)
                await self._try(state, told.get("sample"))
            elif told["state"] is not None:
                await self._switch(State.from_json(told["state"]))
        except ServeError as error:
            return error.reason()
        return ""

    async def _rejoin(self) -> None:
        assert self.state is not None
        if await self._call("committed", self._base) is None:
            found = await self._call("seed", self.state.to_json())
            if found["base"] != self._base:
                return  # there are others by now
            await self._catch_up(State.from_json(found))
        else:
            await self._catch_up(self.state)

    # --- the engine -----------------------------------------------------------------------------------------------

    @property
    def _registry(self) -> Registry:
        assert self._running is not None
        return self._running.server.registry

    async def _switch(self, state: State) -> None:
        """Loads what of ``state`` is not there yet, and serves it.

        Raises:
            ServeError: names what could not be loaded, each with its reason.
        """
        self._check_content(state)
        self.state = state
        await self._load(state)
        await self._serve(state)

    def _check_content(self, state: State) -> None:
        """Raises ModelLoadError: a version was removed, and came again from another archive, while nothing was heard of
        either. A replica that begins anew has the right one."""  # fmt: skip
        for entry in state.entries:
            loaded = self._loaded.get(entry.key)
            if loaded is not None and loaded.content != entry.content and self._model(entry) is not None:
                raise ModelLoadError(f"{entry.shown}: this replica serves another archive of that version")

    async def _load(self, state: State) -> None:
        """Loads what of ``state`` is not there yet.

        Raises:
            ServeError: names what could not be, each with its reason.
        """
        self._check_content(state)
        missing = [entry for entry in state.entries if self._model(entry) is None]
        results = await asyncio.gather(*(self._load_one(entry) for entry in missing), return_exceptions=True)
        problems = []
        for entry, result in zip(missing, results, strict=True):
            if isinstance(result, ServeError):
                problems.append(f"{entry.shown}: {result.reason()}")
            elif isinstance(result, BaseException):
                raise result
        if problems:
            raise ModelLoadError("; ".join(problems))

    async def _load_one(self, entry: Entry) -> None:
        assert self._running is not None
        path = await self._delivery.brought(entry, self._running.config)
        shown = parse_url(entry.url).base if entry.url else entry.file
        model = await self._registry.register(
            Obtained(path, shown), model_name=entry.name, handler=entry.handler, initial_workers=entry.workers,
            settings=dict(entry.settings),
        )  # fmt: skip
        model.loaded_at_startup = True
        self._loaded[entry.key] = entry
        if (model.name, model.version) != entry.key:
            await self._registry.unregister(model.name, model.version)
            raise ModelLoadError(f"{entry.file} holds {model.name} {model.version} on this node, not {entry.shown}")

    async def _try(self, state: State, sample: JsonObject | None) -> None:
        if sample is not None:
            assert self._running is not None
            await try_sample(self._running.calls, sample)

    async def _serve(self, state: State) -> None:
        """Switches to ``state``, all of which is loaded. What it has not goes in the background."""
        registry = self._registry
        for entry in state.entries:
            model = self._model(entry)
            if model is not None and entry.workers is not None and entry.workers != model.settings.workers_min:
                await model.scale(entry.workers, max(entry.workers, 1) if entry.workers else 0)
        for name, version in state.defaults.items():
            if registry.default_version(name) != version:
                await registry.set_default(name, version)
        self._look_at_names()
        kept = {entry.key for entry in state.entries}
        extra = [model for model in registry.all_models() if (model.name, model.version) not in kept]
        extra.sort(key=lambda model: registry.default_version(model.name) == model.version)  # the default one last
        for model in extra:
            shown = f"{model.name} {model.version}"
            self._background.begin(registry.unregister(model.name, model.version), f"unloading {shown}")
            await asyncio.sleep(0)  # its row is gone
        self._background.begin(self._delivery.remove_others(state), "removing archives")

    def _look_at_names(self) -> None:
        """Called in the very step in which a default changes: after the last, answers are the next generation's."""
        state = self.state
        if state is None or state.generation == self.generation:
            return
        registry = self._registry
        served = {model.name: model.version for model in registry.default_models()}
        if all(served.get(name) == version for name, version in state.defaults.items()):
            self.generation = state.generation
            self.on_generation(self.generation)

    def _model(self, entry: Entry) -> Model | None:
        found = [model for model in self._registry.all_models() if (model.name, model.version) == entry.key]
        return found[0] if found else None


def _urls(models: Sequence[str], store: str | None) -> dict[str, str]:
    """The URLs among ``models`` with their queries, by what answers call them."""
    found = [source.path_or_file for text in models for source in resolve_models(text, store)]
    return {parse_url(url).base: url for url in found if is_url(url)}


def _entry_of(model: Model, urls: dict[str, str]) -> Entry:
    """Of a model that the replica was started with. What was fetched here, others fetch for themselves."""
    if is_url(model.url):
        return Entry(model.name, model.version, model.archive.name, url=urls.get(model.url, model.url))
    return Entry(model.name, model.version, model.url, path=str(model.archive.path))
