"""The way from a replica, or a command, to the control of its cluster, whatever carries it."""

from __future__ import annotations

from typing import Any, Protocol

RETRY_S = 1.0
PREPARE_TIMEOUT_DEFAULT_S = 600.0
# A management call waits for those before it, as it does at a server; one of them may have a large archive to load.
TURN_S = 300.0


class LinkError(Exception):
    """The control cannot be reached just now."""


class Link(Protocol):
    """Made for each replica."""

    async def call(self, method: str, *arguments: Any) -> Any:
        """What `Control`'s method returns.

        Raises:
            LinkError: it cannot be reached, or went away meanwhile.
            ServeError: what the method raises.
        """

    async def taken(self, shared: Any) -> bytes:
        """The bytes that `Stock` shared.

        Raises:
            LinkError: they are gone.
        """
