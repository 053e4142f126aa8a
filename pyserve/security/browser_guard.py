"""What a web page could make a browser send here, and is refused."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from pyserve.config.address import Address
from pyserve.errors import ForbiddenError, shown
from pyserve.request.messages import Request

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class BrowserGuard:
    """Refuses what a web page could make a browser send to a management listener.

    A page of any site can post to ``http://127.0.0.1:8081``, and by DNS rebinding read from it under a name of its
    own. Such requests show in ``Host``, which is then not a name of this machine's loopback interface, and in
    ``Origin``, which browsers send with everything but GET and HEAD.

    Args:
        address: where the listener listens. ``Host`` is checked only on loopback TCP addresses.
        allowed_origins: those of ``cors_allowed_origin``; they may make changes, but ``*`` names none.
    """

    def __init__(self, address: Address, allowed_origins: Iterable[str] = ()):
        self._checks_host = address.is_loopback and not address.is_unix
        self._host = address.host.lower()
        self._allowed_origins = {each.lower().rstrip("/") for each in allowed_origins}

    def __call__(self, request: Request) -> None:
        """Raises ForbiddenError for a request to refuse."""
        host = request.header("host").lower()
        if self._checks_host and host and not self._is_local(host):
            raise ForbiddenError(
                f"Host {shown(host)} is not a name of this machine's loopback interface, on which this API listens; "
                "ask for localhost, or let the proxy in front send 'Host: localhost'."
            )
        origin = request.header("origin").lower().rstrip("/")
        if origin and request.method not in _SAFE_METHODS and not self._is_own(origin, host):
            raise ForbiddenError(
                f"Origin {shown(origin)} may not make changes here; name it in cors_allowed_origin to allow it."
            )

    def _is_local(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        name = name.rstrip(".")
        if name in ("localhost", self._host) or name.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def _is_own(self, origin: str, host: str) -> bool:
        if origin in self._allowed_origins:
            return True
        scheme, _, authority = origin.partition("://")
        return scheme in ("http", "https") and bool(host) and authority == host
