"""The changes of a cluster's state, by name, as they come from commands and from management calls."""

from __future__ import annotations

from typing import Any

from pyserve.errors import BadRequestError, JsonObject
from pyserve.replicas.state import Entry, State


def changed(state: State, kind: str, arguments: JsonObject) -> State:
    """The next state.

    Args:
        kind: ``deploy`` (entry, keeps_old), ``add`` (entry), ``set_default`` (name, version), ``remove`` (name,
            version), ``scale`` (name, version, workers).

    Raises:
        ServeError: it cannot be made of this one.
    """
    given: Any = arguments
    match kind:
        case "deploy":
            return state.deployed(Entry(**given["entry"]), keeps_old=bool(given.get("keeps_old")))
        case "add":
            return state.added(Entry(**given["entry"]))
        case "set_default":
            return state.with_default(given["name"], given["version"])
        case "remove":
            return state.without(given["name"], given.get("version"))
        case "scale":
            return state.scaled(given["name"], given.get("version"), given["workers"])
        case _:
            raise BadRequestError(f"no change of a cluster is called {kind!r}")
