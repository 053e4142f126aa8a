"""What errors say of themselves."""

from __future__ import annotations

from typing import Any

import pytest

from pyserve.errors import HandlerError


@pytest.mark.parametrize(
    ("detail", "reason"),
    [
        ({}, "failed"),
        ({"text": "no such file"}, "no such file"),
        ({"text": ""}, "failed"),
        ({"exception": "ValueError", "text": "bad"}, "ValueError: bad"),
        ({"exception": "ValueError", "text": "bad", "where": "h.py:3"}, "ValueError: bad (h.py:3)"),
        # `assert x` has no text; the message, which may have the exception's name, does not stand in for it.
        ({"exception": "AssertionError", "text": "", "where": "h.py:3"}, "AssertionError (h.py:3)"),
        ({"exception": "AssertionError", "text": "", "fix": "Use another."}, "AssertionError. Use another."),
        ({"exception": "OutOfMemoryError"}, "OutOfMemoryError: failed"),
        ({"text": "bad", "fix": "Use another."}, "bad"),
    ],
)
def test_the_reason_says_each_thing_once(detail: dict[str, Any], reason: str) -> None:
    assert HandlerError("failed", detail=detail).reason() == reason
