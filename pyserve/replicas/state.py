"""What a cluster is to serve: a numbered state of all models, and the changes that make the next one of it. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pyserve.errors import BadRequestError, ConflictError, DefaultVersionError, JsonObject, ModelNotFoundError
from pyserve.models.served_names import no_such_version


@dataclass(frozen=True)
class Entry:
    """One version of a model.

    Attributes:
        name, version: that it is served as.
        file: the name of its archive, as answers show it.
        sha256: of the archive, which goes from node to node; ``""`` of one that each node has or fetches itself.
        size: of it, in bytes.
        path: of an archive that each node has.
        url: that each node fetches it from.
        workers: in each replica; None for the default.
        settings: as of ``POST /models``: batch_size and so on.
        handler: in place of the archive's own.
    """

    name: str
    version: str
    file: str
    sha256: str = ""
    size: int = 0
    path: str = ""
    url: str = ""
    workers: int | None = None
    settings: Mapping[str, int] = field(default_factory=dict)
    handler: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.version

    @property
    def content(self) -> tuple[Any, ...]:
        """What it was loaded from and as: of equal name, version and content, answers are the same."""
        return self.sha256, self.path, self.url, self.handler, sorted(self.settings.items())

    @property
    def archive_key(self) -> str:
        """Of what a node keeps of it: the SHA-256 of its archive, or of the URL that it comes from; else ``""``."""
        return hashlib.sha256(self.url.encode()).hexdigest() if self.url else self.sha256

    @property
    def shown(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class State:
    """All that is served.

    Attributes:
        generation: its number; each change makes the next.
        base: what the first one came from: other arguments of the application make another base, and begin anew.
        entries: every version.
        defaults: the version that requests get which name none, by model.
    """

    generation: int
    base: str
    entries: tuple[Entry, ...]
    defaults: Mapping[str, str]

    @classmethod
    def first(cls, base: str, entries: tuple[Entry, ...], generation: int = 1) -> State:
        """Of several versions of a model the first is the default."""
        defaults: dict[str, str] = {}
        for entry in entries:
            defaults.setdefault(entry.name, entry.version)
        return cls(generation, base, entries, defaults)

    def to_json(self) -> JsonObject:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> State:
        """Raises KeyError or TypeError for anything that `to_json` did not make."""
        entries = tuple(Entry(**each) for each in found["entries"])
        return cls(int(found["generation"]), str(found["base"]), entries, dict(found["defaults"]))

    def text(self) -> str:
        return json.dumps(self.to_json())

    # --- looking up -----------------------------------------------------------------------------------------------

    def versions(self, name: str) -> dict[str, Entry]:
        """Of a model, by version.

        Raises:
            ModelNotFoundError: there is no such model.
        """
        found = {entry.version: entry for entry in self.entries if entry.name == name}
        if not found:
            raise ModelNotFoundError(f"Model not found: {name}")
        return found

    def entry(self, name: str, version: str | None) -> Entry:
        """The one that is meant; without ``version`` the default.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none.
        """
        versions = self.versions(name)
        wanted = self.defaults[name] if version is None else version
        if wanted not in versions:
            raise no_such_version(f"Model version: {wanted} does not exist for model: {name}", versions)
        return versions[wanted]

    # --- the next one ---------------------------------------------------------------------------------------------

    def _next(self, entries: tuple[Entry, ...], defaults: Mapping[str, str]) -> State:
        return replace(self, generation=self.generation + 1, entries=entries, defaults=dict(defaults))

    def added(self, entry: Entry) -> State:
        """With one more version, which is the default if it is the model's first.

        Raises:
            ConflictError: it is served already.
        """
        if any(entry.key == each.key for each in self.entries):
            raise ConflictError(
                f"Model version {entry.version} is already registered for model {entry.name}",
                detail={"fix": "pack the new one with another --version"},
            )
        return self._next((*self.entries, entry), {entry.name: entry.version, **self.defaults})

    def deployed(self, entry: Entry, *, keeps_old: bool = False) -> State:
        """With ``entry`` in the place of the model's default version.

        Raises:
            ConflictError: it is served already.
        """
        old = self.defaults.get(entry.name)
        added = self.added(entry)
        entries = tuple(each for each in added.entries if keeps_old or each.key != (entry.name, old))
        return self._next(entries, {**self.defaults, entry.name: entry.version})

    def with_default(self, name: str, version: str) -> State:
        """With another default version of a model.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none such.
        """
        self.entry(name, version)
        return self._next(self.entries, {**self.defaults, name: version})

    def without(self, name: str, version: str | None) -> State:
        """Without a version; of a model with one alone, without the model.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none such.
            DefaultVersionError: it is the default while there are others.
        """
        gone = self.entry(name, version)
        if gone.version == self.defaults[name] and len(self.versions(name)) > 1:
            raise DefaultVersionError(f"Cannot remove default version for model {name}")
        defaults = {each: value for each, value in self.defaults.items() if (each, value) != gone.key}
        return self._next(tuple(each for each in self.entries if each.key != gone.key), defaults)

    def scaled(self, name: str, version: str | None, workers: int) -> State:
        """With another number of workers of a version in each replica.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is none such.
            BadRequestError: the number is none.
        """
        if workers < 0:
            raise BadRequestError(f"workers is {workers}; it must be 0 or more")
        meant = self.entry(name, version)
        entries = tuple(replace(each, workers=workers) if each.key == meant.key else each for each in self.entries)
        return self._next(entries, self.defaults)
