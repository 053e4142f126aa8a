"""Cross-origin resource sharing: the headers by which a browser lets pages of other sites read our answers.

``cors_allowed_origin`` is one origin or ``*``, sent as it stands, or several separated by commas: a browser then gets
its own back if it is one of them. Cookies and a browser's other credentials are never allowed, as in TorchServe: keys
come in ``Authorization``, which ``cors_allowed_headers`` has to name.
"""

from __future__ import annotations

from collections.abc import Mapping

from pyserve.config.config import Config
from pyserve.request.messages import Request, Response

ORIGIN = "access-control-allow-origin"


def allowed_origins(config: Config) -> list[str]:
    """``cors_allowed_origin``, cut at its commas."""
    return [each for each in map(str.strip, config.cors_allowed_origin.split(",")) if each]


class Cors:
    """What the configuration allows; false if that is nothing.

    Attributes:
        headers: of every answer.
    """

    def __init__(self, config: Config):
        origins = allowed_origins(config)
        self._origins = {_normal(each): each for each in origins} if len(origins) > 1 else {}
        headers = {
            ORIGIN: "" if self._origins else "".join(origins),
            "access-control-allow-methods": config.cors_allowed_methods.strip(),
            "access-control-allow-headers": config.cors_allowed_headers.strip(),
        }
        self.headers: Mapping[str, str] = {name: value for name, value in headers.items() if value}

    def __bool__(self) -> bool:
        return bool(self.headers or self._origins)

    @property
    def looks_at_requests(self) -> bool:
        """Whether answers have other headers for other requests."""
        return bool(self._origins)

    def add(self, request: Request, response: Response) -> None:
        """Gives ``response`` the headers that it has not got already."""
        own = {name.lower() for name in response.headers}
        wanted = dict(self.headers)
        if self._origins and ORIGIN not in own:
            wanted |= {ORIGIN: origin} if (origin := self._allowed(request)) else {}
            varies = next((value for name, value in response.headers.items() if name.lower() == "vary"), "")
            if varies != "*" and "origin" not in varies.lower():  # caches must keep one answer for each origin
                response.headers = {name: value for name, value in response.headers.items() if name.lower() != "vary"}
                own.discard("vary")
                wanted["vary"] = f"{varies}, Origin" if varies else "Origin"
        missing = {name: value for name, value in wanted.items() if name not in own}
        response.headers = {**response.headers, **missing}

    def _allowed(self, request: Request) -> str:
        """The request's own origin, if it may read the answer."""
        origin = request.header("origin")
        if origin and "*" in self._origins:
            return origin
        return self._origins.get(_normal(origin), "") if origin else ""


def _normal(origin: str) -> str:
    return origin.lower().rstrip("/")


def is_preflight(request: Request) -> bool:
    """Whether a browser asks before a cross-origin call. Such a request never carries keys."""
    return request.method == "OPTIONS" and bool(request.header("access-control-request-method"))
