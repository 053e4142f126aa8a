"""What is answered for a model that cannot be served: why, and what helps."""

from __future__ import annotations

from pyserve.causes import fix_for
from pyserve.errors import JsonObject
from pyserve.request.messages import ErrorFormat


def fix_of(error: str, error_format: ErrorFormat) -> str:
    """What helps against a model's ``error``; no more than errors may tell of this machine."""
    known = fix_for(error) if error_format.with_private_detail else ""
    return f"{known}; then register it again" if known else "fix the archive and register it again"


def absence(state: str, error: str, error_format: ErrorFormat) -> JsonObject:
    """``detail`` of an answer that nobody serves the model.

    Args:
        error: why it cannot be served; ``""`` if it merely has no worker.
    """
    detail = {"reason": "no worker", "state": state}
    return {**detail, "text": error, "fix": fix_of(error, error_format)} if error else detail
