"""In what form a tensor comes and goes over HTTP: by content type and ``Accept``. Needs no torch.

Bodies are JSON, forms, or the numbers as they lie in memory; answers come in kind unless ``Accept`` asks otherwise.
"""

from __future__ import annotations

import functools

from pyserve.body_kind import NPY_MAGIC, may_have_kind

RAW = "application/octet-stream"
JSON = "application/json"
# What a form field holds is not described here; people who send forms read text.
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
_OPENING, _CLOSING = b"[]"


def media_type(content_type: str) -> str:
    """In lower case, without parameters."""
    return content_type.partition(";")[0].strip().lower()


def takes_raw(content_type: str, accept: str) -> bool:
    """Whether a request with these headers sends an item's bytes and is answered with bytes."""
    # JSON, text and forms are decoded; what is in them may be none the less as long as an item.
    return not is_decoded(media_type(content_type)) and wants_raw(content_type, accept)


def is_decoded(media: str) -> bool:
    """Whether a body of this media type is decoded before it is taken for numbers."""
    return media in (JSON, *FORMS) or media.startswith("text")


def may_be_read(content_type: str, body: bytes | bytearray) -> bool:
    """Whether a body that is as long as an item may be something to be read: JSON, a file, or text. Sent as
    `RAW`, only a list and a file of numpy's are.

    REQUIRES: it is not empty.
    """
    if (body[0] == _OPENING and body[-1] == _CLOSING) or body.startswith(NPY_MAGIC):
        return True
    return content_type != RAW and may_have_kind(body)


def wants_raw(content_type: str, accept: str) -> bool:
    """Whether the answer is bytes; else JSON."""
    wanted = accepted_kind(accept) if accept else None
    if wanted is None:
        return media_type(content_type) not in (JSON, *FORMS)
    return wanted == RAW


@functools.lru_cache(maxsize=256)
def accepted_kind(accept: str) -> str | None:
    """`RAW` or `JSON`, whichever of the two ``Accept`` names with the higher weight (RFC 9110, section 12.5.1).

    None when it names neither, or both alike: the answer then comes in kind.
    """
    weights = {RAW: 0.0, JSON: 0.0}
    for part in accept.split(","):
        media, *parameters = [text.strip().lower() for text in part.split(";")]
        if media in weights:
            weights[media] = max(weights[media], _quality(parameters))
    if weights[RAW] == weights[JSON]:
        return None
    return RAW if weights[RAW] > weights[JSON] else JSON


def _quality(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return float(parameter[2:])
            except ValueError:
                return 0.0
    return 1.0
