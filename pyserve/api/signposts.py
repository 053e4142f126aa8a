"""What an answer adds when there is nothing at a path: where what was meant is. It goes into ``detail``.

Model names are shown only to clients who may list them, addresses only where errors may show what is of this machine.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence

from pyserve.config.config import Config
from pyserve.errors import JsonObject
from pyserve.models.served_names import near_name, shown_names
from pyserve.request.messages import Request

PATH_SHOWN_MAX = 100
_NEAR = 0.7

# First segment -> the listener that answers it.
_OWNERS = {
    "predictions": "inference", "explanations": "inference", "invocations": "inference", "ping": "inference",
    "ready": "inference", "live": "inference", "models": "management", "metrics": "metrics",
}  # fmt: skip
_PREDICT = frozenset({"predict", "infer", "inference", "invoke", "run", "score", "generate"})
_HEALTH = frozenset({"health", "healthz", "healthcheck", "status", "alive", "livez", "readyz", "readiness", "liveness"})
_DESCRIPTION = frozenset(
    {"docs", "swagger", "redoc", "openapi", "openapi.json", "swagger.json", "api", "api-docs", "help"}
)
_OPENAI = frozenset({"chat", "completions", "embeddings", "responses"})


class Signposts:
    """Of one listener. Loop thread only.

    Args:
        config: its addresses are read.
        names: of what the listener answers for: ``inference``, ``management``, ``metrics``.
        models: the names that anybody who reaches this listener may list; None if there are no such.
        tells_addresses: whether the other listeners' addresses may be told.
    """

    def __init__(
        self, config: Config, names: Sequence[str], *, models: Callable[[], Iterable[str]] | None = None,
        tells_addresses: bool = True,
    ):  # fmt: skip
        self._addresses = config.addresses()
        self._names = frozenset(names)
        self._models = models
        self._tells_addresses = tells_addresses

    def __call__(self, request: Request, firsts: Iterable[str]) -> JsonObject:
        """``detail`` for a path without a route.

        Args:
            firsts: the first segments that the listener's routes have.
        """
        segments = [segment for segment in request.segments if segment]
        if not segments:
            return {}
        fix = self._known(request, segments) or self._near(segments, list(firsts))
        return {"fix": fix} if fix else {}

    def _known(self, request: Request, segments: list[str]) -> str:
        first = segments[0]
        owner = _OWNERS.get(first)
        if owner is not None and owner not in self._names:
            return self._elsewhere(owner, request.path)
        if first in _DESCRIPTION:
            return "the API is described at /docs, and as an OpenAPI document at /openapi.json"
        if first in _HEALTH:
            return self._of_inference(
                "GET /ping says whether the server is healthy, /ready whether all models can answer"
            )
        if first in _PREDICT or segments in (["predictions"], ["explanations"]):
            path = first if first in _OWNERS else "predictions"
            return self._of_inference(f"name the model: POST /{path}/MODEL{self._those_here()}")
        if first == "v1" and len(segments) > 1 and segments[1] in _OPENAI:
            rest = _shown("/".join(segments))
            return self._of_inference(
                f"such paths are a handler's: POST /predictions/MODEL/VERSION/{rest}{self._those_here()}"
            )
        if first in ("v1", "v2") and len(segments) > 2:
            return self._of_inference(
                "KServe's protocols have /v1/models/MODEL:predict, /v2/models/MODEL/infer, /v2/models/MODEL and "
                "/v2/models/MODEL/versions/VERSION/infer"
            )
        return ""

    def _near(self, segments: list[str], firsts: list[str]) -> str:
        first = segments[0]
        if self._models is not None and len(segments) == 1:
            name = near_name(first, sorted(self._models()))
            if name:
                return f"did you mean POST /predictions/{name}?"
        near = difflib.get_close_matches(first.lower()[:PATH_SHOWN_MAX], [*firsts, *_OWNERS], n=1, cutoff=_NEAR)
        if not near or near[0] == first:
            return ""
        path = "/" + "/".join([near[0], *segments[1:]])
        owner = _OWNERS.get(near[0])
        if owner is not None and owner not in self._names:
            return self._elsewhere(owner, path)
        return f"did you mean {_shown(path)}?"

    def _of_inference(self, text: str) -> str:
        if "inference" in self._names:
            return text
        if self._tells_addresses and "inference" in self._addresses:
            return f"{text} (on the inference API: {self._addresses['inference'].client_url})"
        return f"{text} (on the inference API's port)"

    def _elsewhere(self, owner: str, path: str) -> str:
        address = self._addresses.get(owner)
        if address is None:
            return f"that is the {owner} API, which is off here (enable_{owner}_api)"
        if not self._tells_addresses:
            return f"that is the {owner} API, which listens at another port"
        if address.is_unix:
            return f"that is the {owner} API: {address}"
        return f"that is the {owner} API: {address.client_url}{_shown(path)}"

    def _those_here(self) -> str:
        return "" if self._models is None else f"; {shown_names(sorted(self._models()))}"


def _shown(path: str) -> str:
    """A client's own path, short and of printable ASCII."""
    text = path.encode("ascii", "backslashreplace").decode()
    text = "".join(each if each.isprintable() else "?" for each in text)
    return text if len(text) <= PATH_SHOWN_MAX else text[: PATH_SHOWN_MAX - 3] + "..."
