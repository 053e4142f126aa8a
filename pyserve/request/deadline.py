"""A client's own limit: how long it is going to wait for its answer, from the ``x-request-timeout-ms`` header.

Counted from the arrival of the request's last byte. It holds beside the model's limits; the shorter one counts. A
request that is still queued then never runs, and one that runs is answered while its batch goes on.
"""

from __future__ import annotations

from pyserve.errors import BadRequestError, shown
from pyserve.request.messages import TIMEOUT_HEADER, Request

TIMEOUT_MAX_MS = 86_400_000  # a day, as for every timeout of the configuration


def client_deadline(request: Request) -> int:
    """When the client stops waiting, in ns of ``time.monotonic_ns()``; 0 if it did not say.

    Raises:
        BadRequestError: the header's value is no whole number of milliseconds in the allowed range.
    """
    text = request.header(TIMEOUT_HEADER)
    if not text:
        if any(name.lower() == TIMEOUT_HEADER for name, _ in request.headers):
            raise _refusal(text)
        return request.deadline
    if not (text.isascii() and text.isdigit()) or len(text) > 20 or not 1 <= int(text) <= TIMEOUT_MAX_MS:
        raise _refusal(text)
    limit = request.arrived_at + int(text) * 1_000_000
    return min(limit, request.deadline) if request.deadline else limit


def _refusal(text: str) -> BadRequestError:
    return BadRequestError(
        f"Header {TIMEOUT_HEADER} must be a whole number of milliseconds from 1 to {TIMEOUT_MAX_MS}, not "
        f"{shown(text) if text else 'empty'}."
    )
