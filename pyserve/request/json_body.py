"""JSON that clients send: how deep it may be nested, and that no member of an object may be given twice."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from typing import Any

from pyserve.errors import InputError
from pyserve.request import json_slices, quick_json

DEPTH_MAX = 100
NAME_SHOWN_MAX = 100

# A string without escapes, ended or not, or a bracket. Never fails after a quote, so matching takes linear time.
_TOKEN = re.compile(rb'"[^"]*"?|[\[\]{}]')


class NotJsonError(InputError):
    """The body is not JSON."""


def parse_json(
    body: bytes | bytearray,
    *,
    lenient: bool = False,
    in_slices: bool = False,
    takes_arrays: bool = False,
    array_member: str = "",
) -> Any:
    """``body`` as JSON; in UTF-8, UTF-16 or UTF-32.

    Args:
        lenient: as TorchServe 0.12 was measured: of members of one name in an object the last one counts, else they
            are refused; only UTF-8 without a byte order mark is JSON.
        in_slices: a large body is read in pieces, so that the process's other threads get a turn meanwhile.
        takes_arrays, array_member: which large arrays of numbers in it may be `JsonArray`, see `json_slices.read`.

    Raises:
        NotJsonError: it is not JSON.
        InputError: it is nested too deeply, has an absurd number, or has a member twice.
    """
    if in_slices and len(body) >= json_slices.SIZE_MIN:
        try:
            return _parse_large(body, lenient=lenient, takes_arrays=takes_arrays, array_member=array_member)
        except (json_slices.UncutError, ImportError, AttributeError):
            pass  # as a whole, then
    value = quick_json.read(body, DEPTH_MAX)
    if value is not quick_json.UNREAD:
        return value
    if body.count(b"[") + body.count(b"{") > DEPTH_MAX and json_depth(body) > DEPTH_MAX:
        raise _too_deep()
    try:
        if lenient:
            return json.loads(body.decode())
        return _decoder.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NotJsonError(f"the body is not JSON that can be used: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"the JSON body cannot be used: {error}") from error


def _parse_large(body: bytes | bytearray, *, lenient: bool, **arrays: Any) -> Any:
    """As `parse_json`. Raises UncutError, ImportError or AttributeError where it cannot."""
    import torch  # noqa: F401 - see `json_slices.read`

    from pyserve import _core

    if body.count(b"[") + body.count(b"{") > DEPTH_MAX and _core.json_depth(body) > DEPTH_MAX:
        raise _too_deep()
    try:
        if not lenient:
            text = body.decode(json.detect_encoding(body), "surrogatepass")
            return json_slices.read(text, twice=_twice, **arrays)
        text = body.decode()
        if text.startswith("\ufeff"):
            return json.loads(text)  # which says what is wrong with it
        return json_slices.read(text, twice=None, **arrays)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NotJsonError(f"the body is not JSON that can be used: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"the JSON body cannot be used: {error}") from error


def load(body: bytes | bytearray | memoryview) -> Any:
    """``json.loads(body)``, a large one in pieces; of members of one name the last counts.

    Raises:
        ValueError, RecursionError: as ``json.loads``.
    """
    whole = bytes(body)
    if len(whole) >= json_slices.SIZE_MIN:
        with contextlib.suppress(json_slices.UncutError, ImportError, AttributeError):
            return json_slices.read(whole.decode(json.detect_encoding(whole), "surrogatepass"), twice=None)
    return json.loads(whole)


def _too_deep() -> InputError:
    return InputError(f"the JSON body is nested more than {DEPTH_MAX} levels deep; flatten it")


def _twice(name: str) -> InputError:
    return InputError(f"the JSON body has {name[:NAME_SHOWN_MAX]!r} more than once in one object; give it once")


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise _twice(twice)
    return members


_decoder = json.JSONDecoder(object_pairs_hook=_members)


def json_depth(body: bytes | bytearray) -> int:
    """How deep arrays and objects are nested in each other; of something that is not JSON, some number."""
    depth = deepest = 0
    # Backslashes stand in strings only; without the escaped ones and the escaped quotes strings end at each quote.
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    for match in _TOKEN.finditer(unescaped):
        token = match.group()
        if token in (b"[", b"{"):
            depth += 1
            deepest = max(deepest, depth)
        elif token in (b"]", b"}"):
            depth -= 1
    return deepest
