"""Triton's model repository extension over the model store: what there is, and loading and unloading it by name.

A model ``m`` of the repository is the archive or folder of the model store that is called so: ``m.mar``, ``m.tar.gz``,
``m``. Loading is registering it with its own settings; unloading is unregistering every version of that name.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any

from pyserve.archive.archive import open_archive
from pyserve.config.archive_url import is_url
from pyserve.config.config import Config
from pyserve.config.model_source import ARCHIVE_SUFFIXES, list_store
from pyserve.errors import (
    BadRequestError,
    CleanupTimeoutError,
    ConflictError,
    JsonObject,
    MethodNotAllowedError,
    ModelNotFoundError,
    ServeError,
    TokenError,
    shown,
)
from pyserve.models.model import Model
from pyserve.models.registry import Registry
from pyserve.security.tokens import Tokens

log = logging.getLogger(__name__)

_STATES = {"LOADING": "LOADING", "DRAINING": "UNLOADING"}
NOT_LOADED = "in the model store, not loaded"
# What a call may say beside the name of the model.
UNLOAD_DEPENDENTS = "unload_dependents"
_NAMES_SHOWN_MAX = 10


class ModelRepository:
    """Loads and unloads by name. Loop thread only.

    Args:
        tells_errors: whether the index may say why a model failed, in the words of an exception.
        tokens: the keys, if there are any.
    """

    def __init__(self, registry: Registry, config: Config, *, tells_errors: bool, tokens: Tokens | None):
        self.registry = registry
        self._tokens = tokens
        self._config = config
        self._tells_errors = tells_errors
        self._last: dict[str, asyncio.Task[None]] = {}  # call about a name that is not over
        self._sources: dict[str, str] = {}  # of models that were unloaded: what they had been loaded from

    # --- reading --------------------------------------------------------------------------------------------------

    def registered(self, *, only_ready: bool) -> list[JsonObject]:
        """Name, version, state and reason of the models that are registered, or of those that can answer."""
        return [
            {
                "name": model.name,
                "version": model.version,
                "state": "READY" if model.has_ready_worker else _STATES.get(model.state, "UNAVAILABLE"),
                "reason": model.error if self._tells_errors else "",
            }
            for model in self.registry.all_models()
            if model.has_ready_worker or not only_ready
        ]

    async def index(self, *, only_ready: bool, authorization: str) -> list[JsonObject]:
        """The same, and what else could be loaded.

        Args:
            authorization: header of the caller. Where loading takes a key, names of the model store are for its holder.
        """
        rows = self.registered(only_ready=only_ready)
        if only_ready or not self._may_load(authorization):
            return rows
        names = set(_by_name(await self._store_files())) | set(self._sources)
        names -= {row["name"] for row in rows}
        absent = {"version": "", "state": "UNAVAILABLE", "reason": NOT_LOADED}
        return rows + [{"name": name, **absent} for name in sorted(names)]

    def _may_load(self, authorization: str) -> bool:
        if self._tokens is None:
            return True
        try:
            self._tokens.check("management", authorization)
        except TokenError:
            return False
        return True

    async def _store_files(self) -> list[str]:
        return await asyncio.to_thread(list_store, self._config.model_store)

    # --- changing -------------------------------------------------------------------------------------------------

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Returns when the model can answer. One that is loaded stays as it is, unless the model store has another
        version of it, which then becomes the default version beside it.

        Args:
            parameters: of the call; there are none that could be obeyed.

        Raises:
            ServeError: it cannot be loaded, or the call asks for what is not here; the model is as it was.
        """
        self._check_allowed()
        for each in parameters:
            what = "files" if each.startswith("file:") else "a configuration" if each == "config" else "this parameter"
            raise BadRequestError(
                f"The parameter {shown(each)} of loading model {shown(name)} is not taken: {what} cannot be sent with "
                "the call. Put an archive with its model-config.yaml into the model store, and load it by its name.",
                detail={"extension": "model_repository", "parameter": each[:80]},
            )
        await self._alone(name, self._load(name))

    async def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Returns when every version of the model has finished the requests that it had, and is gone.

        Args:
            parameters: of the call; ``unload_dependents`` has nothing to do here.

        Raises:
            ServeError: there is no such model, or it takes longer than ``unregister_model_timeout``.
        """
        self._check_allowed()
        for each, value in parameters.items():
            if each != UNLOAD_DEPENDENTS or not isinstance(value, bool):
                raise BadRequestError(
                    f"The parameter {shown(each)} of unloading model {shown(name)} is not taken; there may be "
                    f"{UNLOAD_DEPENDENTS!r}, true or false.",
                    detail={"extension": "model_repository", "parameter": each[:80]},
                )
        await self._alone(name, self._unload(name), timeout_s=self._config.unregister_model_timeout)

    def _check_allowed(self) -> None:
        if not self._config.allows_model_api:
            detail = {"reason": "loading and unloading are off here; start with --enable-model-api"}
            raise MethodNotAllowedError(detail=detail)

    async def _alone(self, name: str, work: Coroutine[Any, Any, None], timeout_s: float | None = None) -> None:
        """Does ``work``, one call of a name after the other; to its end, also if nobody waits for it any more."""
        before = self._last.get(name)

        async def run() -> None:
            if before is not None:
                await asyncio.wait({before})
            await work

        def forget(done: asyncio.Task[None]) -> None:
            if self._last.get(name) is done:
                del self._last[name]
            error = None if done.cancelled() else done.exception()
            if error is not None and not isinstance(error, ServeError):
                log.error("loading or unloading %s failed", shown(name), exc_info=error)

        task = self._last[name] = asyncio.get_running_loop().create_task(run())
        task.add_done_callback(forget)
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
        if not done:
            raise CleanupTimeoutError(f"Timed out while cleaning resources: {name}")
        task.result()

    async def _load(self, name: str) -> None:
        with self.registry.changes.one():
            await self._load_now(name)

    async def _load_now(self, name: str) -> None:
        there = self._versions(name)
        file = await self._source(name, is_there=bool(there))
        if file:
            version = await self._wanted_version(name, file, there)
            if version is None:
                model = await self.registry.register(
                    file, model_name=name, handler=None, initial_workers=None, settings={}
                )
                version = model.version
                self._sources.pop(name, None)
            if self.registry.default_version(name) != version:
                await self.registry.set_default(name, version)
        model = self.registry.get(name)
        await model.loaded()
        if model.state == "FAILED":
            raise model.starting_error(model.error)
        if model.state == "READY" and not model.wanted_workers:
            await model.scale(1, max(1, model.workers_max))
            await self.registry.changed()

    async def _wanted_version(self, name: str, file: str, there: list[Model]) -> str | None:
        """The registered version that ``file`` holds; None if it has to be registered.

        Raises:
            ConflictError: it holds other content under the number of a version that is registered.
        """
        if not there:
            return None
        opened = await asyncio.to_thread(open_archive, Path(self._config.model_store or "", file))
        try:
            version, content = opened.manifest.model_version, opened.sha256
        finally:
            await asyncio.to_thread(opened.close)
        same = next((model for model in there if model.version == version), None)
        if same is None or same.state == "FAILED":
            return None
        await same.loaded()
        if same.archive.sha256 != content:
            raise ConflictError(
                f"{file} has changed since version {version} of model {name} was loaded from "
                f"{same.url}; give the archive another version, or unload the model first",
                detail={"version": version, "fix": "torch-model-archiver --version ..., then load again"},
            )
        return version

    async def _source(self, name: str, *, is_there: bool) -> str:
        """What to load for ``name``: a file of the model store, or what it was loaded from before; ``""`` for nothing
        but what is registered.

        Raises:
            ModelNotFoundError: nothing.
            BadRequestError: several.
        """
        files = _by_name(await self._store_files())
        found = files.get(name, [])
        if len(found) > 1:
            raise BadRequestError(
                f"The model store has {' and '.join(map(shown, found))} for model {shown(name)}; keep one of them, or "
                f"register one with POST /models?url={found[0]}&model_name={name}."
            )
        if found:
            return found[0]
        if is_there:
            return ""
        if name in self._sources:
            return self._sources[name]
        known = sorted(files)
        names = ", ".join(known[:_NAMES_SHOWN_MAX]) + (", ..." if len(known) > _NAMES_SHOWN_MAX else "") or "none"
        raise ModelNotFoundError(
            f"Model not found: {name}: the model store has no archive or folder of that name",
            detail={"models": names, "fix": f"put {name}.mar into the model store, or register an archive of another "
                                             "name with POST /models?url=FILE&model_name=NAME"},
        )  # fmt: skip

    async def _unload(self, name: str) -> None:
        there = self._versions(name)
        if not there:
            await self.registry.unregister(name, None)  # an archive that could not be opened is forgotten
            return
        default = self.registry.get(name)
        if is_url(default.url) or Path(self._config.model_store or "", default.url) == default.archive.path:
            self._sources[name] = default.url  # else the command line named a path that no call may register
        for model in sorted(there, key=lambda model: model is default):
            if model in self._versions(name):
                await self.registry.unregister(name, model.version)

    def _versions(self, name: str) -> list[Model]:
        return [model for model in self.registry.all_models() if model.name == name]


def _by_name(files: Iterable[str]) -> dict[str, list[str]]:
    """Entries of the model store by the model's name."""
    found: dict[str, list[str]] = {}
    for file in files:
        suffix = next((each for each in ARCHIVE_SUFFIXES if file.endswith(each) and file != each), "")
        found.setdefault(file.removesuffix(suffix), []).append(file)
    return found


def parameters_of(told: Any, call: str) -> dict[str, Any]:
    """The parameters of a call's JSON body.

    Raises:
        BadRequestError: it has other members, or is of another form.
    """
    parameters = told.get("parameters", {}) if isinstance(told, dict) and not told.keys() - {"parameters"} else None
    if not isinstance(parameters, dict):
        form = json.dumps({"parameters": {}})
        raise BadRequestError(f"The body of {call} is empty or {form} with what it asks for.")
    return parameters
