"""What a client takes: the weights that ``Accept`` and ``Accept-Encoding`` give to names (RFC 9110, 12.4)."""

from __future__ import annotations

import functools
import re

from pyserve.request.messages import Request

# Of a header; what follows is not read.
READ_SIZE_MAX = 1000
_WEIGHT = re.compile(r"(?:0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)\Z")


def accepted(request: Request, header: str) -> dict[str, float]:
    """Names in lower case, without their parameters, to weights from 0 (not taken) to 1.

    A weight that cannot be read counts as 0. Of a name that stands there twice the larger one counts.

    Args:
        header: in lower case; all headers of that name are read as one.
    """
    text = ",".join(value for name, value in request.headers if name.lower() == header)
    return _weights(text[:READ_SIZE_MAX])


@functools.lru_cache(256)
def _weights(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in text.split(","):
        name, *parameters = (part.strip().lower() for part in entry.split(";"))
        if not name:
            continue
        weight = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip() == "q":
                weight = float(value) if _WEIGHT.match(value := value.strip()) else 0.0
        found[name] = max(weight, found.get(name, 0.0))
    return found
