"""JSON bodies: the standard library's value, or refused for a reason that holds."""

from __future__ import annotations

import json
from typing import Any

from pyserve.errors import InputError
from pyserve.request.json_body import DEPTH_MAX, NotJsonError, json_depth, parse_json


def check(data: bytes) -> None:
    for lenient in (False, True):
        expected = _expected(data, lenient=lenient)
        try:
            value = parse_json(bytearray(data), lenient=lenient)
        except NotJsonError:
            assert expected is _NOTHING, "JSON that is said to be none"
            continue
        except InputError as error:
            assert len(error.message) < 1000
            assert expected is _NOTHING or _may_be_refused(data), f"refused: {error.message}"
            continue
        assert expected is not _NOTHING, "read, though it is no JSON"
        # Text, so that NaN equals itself, 1 is not 1.0, and the order of members counts.
        assert repr(value) == repr(expected), "another value"


_NOTHING = object()


def _expected(data: bytes, *, lenient: bool) -> Any:
    try:
        return json.loads(data.decode()) if lenient else json.loads(data)
    except (ValueError, RecursionError):
        return _NOTHING


def _may_be_refused(data: bytes) -> bool:
    """Whether it is nested too deeply, or an object has a member twice."""
    twice = False

    def members(pairs: list[tuple[str, Any]]) -> None:
        nonlocal twice
        twice = twice or len(dict(pairs)) < len(pairs)

    json.loads(data, object_pairs_hook=members)
    return twice or json_depth(data) > DEPTH_MAX
