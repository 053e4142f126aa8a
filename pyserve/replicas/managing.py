"""Management calls to a replica that mean its cluster: what is looked up is the replica's, what is changed is all's."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from pyserve.archive.archive import survey
from pyserve.archive.file_digest import digest_of
from pyserve.archive.manifest import check_model_name
from pyserve.config.archive_url import is_url
from pyserve.errors import (
    InvalidModelError,
    JsonObject,
    MethodNotAllowedError,
    ModelLoadError,
    OverloadedError,
    ServeError,
)
from pyserve.fetch.sources import Obtained
from pyserve.models.model import Model
from pyserve.models.registry import Registry
from pyserve.replicas.link import LinkError
from pyserve.replicas.member import Member
from pyserve.replicas.state import Entry


class ManagedRegistry:
    """What `Management` is given in the place of a `Registry`. Loop thread only."""

    def __init__(self, registry: Registry, member: Member):
        self._registry = registry
        self._member = member

    def __getattr__(self, name: str) -> Any:
        return getattr(self._registry, name)

    def get(self, name: str, version: str | None = None) -> Any:
        """As the registry's; what is changed of it is changed everywhere."""
        return _ManagedModel(self._registry.get(name, version), self)

    async def register(
        self, url: str | Obtained, *, model_name: str | None, handler: str | None, initial_workers: int | None,
        settings: dict[str, int], runtime: str | None = None, waits: bool = True,
    ) -> Model:  # fmt: skip
        """Has every replica load an archive, from the model store of this one or from a URL that each node fetches.

        Raises:
            ServeError: one cannot; nothing has changed.
        """
        if runtime is not None or isinstance(url, Obtained):
            raise MethodNotAllowedError(
                detail={"reason": "in a cluster archives are registered as they are: by url alone"}
            )
        entry, path = await self._entry(url, model_name)
        fields: JsonObject = {**vars(entry), "workers": initial_workers, "settings": settings, "handler": handler}
        if path is not None:
            await self._member.give(entry.sha256, entry.file, path)
        await self.change("add", {"entry": fields})
        return self._registry.get(entry.name, entry.version)

    async def _entry(self, url: str, name: str | None) -> tuple[Entry, Path | None]:
        if is_url(url):
            path = await self._member.fetched(url)
            return await asyncio.to_thread(_looked_at, path, path.name, name, url), None
        found = await self._member.found(url)
        if found.path.is_dir():
            raise InvalidModelError(
                f"{found.url} is a folder, and nodes are sent archives; pack it with `pyserve archive`"
            )
        return await asyncio.to_thread(_looked_at, found.path, found.url, name, ""), found.path

    async def unregister(self, name: str, version: str | None) -> None:
        """Has every replica finish what a version has admitted, and remove it.

        Raises:
            ServeError: there is no such version, or it is the default while there are others.
        """
        await self.change("remove", {"name": name, "version": version})

    async def set_default(self, name: str, version: str) -> None:
        """Has requests without a version go to ``version`` on every replica.

        Raises:
            ServeError: there is no such version.
        """
        await self.change("set_default", {"name": name, "version": version})

    async def change(self, kind: str, arguments: JsonObject) -> None:
        """Has a change made on all replicas or on none.

        Raises:
            ServeError: it was made on none.
        """
        try:
            answer = await self._member.change(kind, arguments)
        except LinkError:
            raise OverloadedError(
                "The control of the cluster is being started again; whether this was done GET /models says.",
                headers={"Retry-After": "5"},
            ) from None
        if answer.get("error"):
            error = ServeError(answer["error"], detail=answer.get("detail"))
            error.status, error.type = answer["status"], answer["type"]
            raise error
        if answer.get("reasons"):
            reasons = "; ".join(f"{node}: {reason}" for node, reason in sorted(answer["reasons"].items()))
            raise ModelLoadError(f"It is done on no replica, since some could not: {reasons}")


class _ManagedModel:
    """One version, as the registry has it, but for what changes it."""

    def __init__(self, model: Model, registry: ManagedRegistry):
        self._model = model
        self._registry = registry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    async def scale(self, workers_min: int, workers_max: int) -> int:
        """Has every replica give it so many workers."""
        if workers_max != workers_min:
            reason = "in a cluster a version has a fixed number of workers in each replica; give min_worker alone"
            raise MethodNotAllowedError(detail={"reason": reason})
        await self._registry.change("scale", {"name": self.name, "version": self.version, "workers": workers_min})
        return workers_min

    def configure(self, settings: dict[str, int]) -> dict[str, tuple[int, int]]:
        raise MethodNotAllowedError(detail={"reason": "in a cluster settings come with a version; deploy another one"})


def _looked_at(path: Path, file: str, name: str | None, url: str) -> Entry:
    with survey(path) as found:
        name = name or found.manifest.model_name
        check_model_name(name)
        version = found.manifest.model_version
    return Entry(name, version, file, sha256=digest_of(path), size=path.stat().st_size, url=url)
