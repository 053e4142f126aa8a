"""How TorchServe reads the parameters of the management API, as was measured; for ``compat=strict``.

In a query what is unknown or malformed counts as not given, and of a repeated parameter the first value decides, also
when it is malformed. A JSON body is stricter: a member of another type is an error. A number that TorchServe takes and
that cannot be meant, such as a batch of 2147483647, becomes the nearest that pyserve can do, with a warning.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable
from typing import Any

from pyserve.api import parameters
from pyserve.api.parameters import TEXT_SIZE_MAX, Pairs, Parameter
from pyserve.errors import BadRequestError, ModelNotFoundError, ServerError, shown

log = logging.getLogger(__name__)

_INT_MIN, _INT_MAX = -(2**31), 2**31 - 1
_INTEGER = re.compile(r"[+-]?\d{1,300}")  # digits of any script, as Java's
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NULL_CHARACTER = (
    "Null character present in file/path name. There are no known legitimate use cases for such data, but several "
    "injection attacks may use it"
)
# Of these -1 is as good as nothing.
_UNSET_BY_MINUS_ONE = frozenset({"batch_size", "response_timeout", "startup_timeout", "initial_workers"})
# "" is as good as nothing.
_UNSET_BY_EMPTY = frozenset({"model_name", "handler"})
# As many workers as are asked for are started, so that the nearest number would not do.
_COUNTS_OF_WORKERS = frozenset({"initial_workers", "min_worker"})
# Read when they are used: a handler that does not exist is no error before a worker is to call it.
_UNCHECKED = frozenset({"handler"})


class JavaError(ServerError):
    """An error of TorchServe's that is one of Java's own, by the name of its class."""

    def __init__(self, type: str, message: str, *, status: int = 500):
        super().__init__(message)
        self.type, self.status = type, status


class JsonSyntaxError(JavaError):
    """A JSON body that does not fit; TorchServe's text also says where."""

    def __init__(self, cause: str):
        super().__init__("JsonSyntaxException", cause)


def read_values(
    pairs: Iterable[tuple[str, str]], known: Iterable[Parameter], *, zeros: Collection[str] = ()
) -> dict[str, Any]:
    """As `parameters.read_values`, by TorchServe's rules.

    Args:
        zeros: names of numbers that may be 0 here, though their table begins with 1.

    Raises:
        JavaError, ModelNotFoundError: a url that names no file.
        BadRequestError: a runtime that there is not, text that names nothing, or more workers than can be.
    """
    table = {parameter.name: parameter for parameter in known}
    first: dict[str, str] = {}
    for name, value in pairs:
        if name in table:
            first.setdefault(name, value)
    values = {name: _value(table[name], text, name in zeros) for name, text in first.items()}
    return {name: value for name, value in values.items() if value is not None}


def _value(parameter: Parameter, text: str, may_be_zero: bool) -> Any:
    kind = parameter.schema["type"]
    if kind == "boolean":
        return text.lower() == "true"
    if kind == "integer":
        number = java_int(text)
        return None if number is None else _number(parameter, number, may_be_zero)
    if not text and parameter.name in _UNSET_BY_EMPTY:
        return None
    if parameter.name in _UNCHECKED:
        return text
    if parameter.name == "url" and _CONTROL.search(text):
        if "\0" in text:
            raise JavaError("IllegalArgumentException", _NULL_CHARACTER, status=403)
        raise ModelNotFoundError(f"Model not found at: {text[:TEXT_SIZE_MAX]}")
    return parameters.parsed(parameter, text)


def java_int(text: str) -> int | None:
    """What ``Integer.parseInt`` makes of it; None if that fails."""
    number = int(text) if _INTEGER.fullmatch(text) else None
    return number if number is not None and _INT_MIN <= number <= _INT_MAX else None


def _number(parameter: Parameter, number: int, may_be_zero: bool) -> int | None:
    name = parameter.name
    if number == -1 and name in _UNSET_BY_MINUS_ONE:
        return None
    if name in ("min_worker", "max_worker") and number < 0:
        return number  # an error, and which one depends on the other
    least, most = parameter.schema["minimum"], parameter.schema["maximum"]
    if may_be_zero:
        least = 0
    if number > most and name in _COUNTS_OF_WORKERS:
        raise BadRequestError(f"Parameter {name} cannot be {number}; allowed: {parameter.allowed}.")
    nearest = min(max(number, least), most)
    if nearest != number and name not in ("number_gpu", "timeout"):
        log.warning("%s=%d cannot be had: %d is taken", name, number, nearest)
    return nearest


class _Number(str):
    """A number of a JSON text, as it is written."""


def json_pairs(body: bytes | bytearray, known: Iterable[Parameter]) -> Pairs:
    """The members of a JSON object as a query would give them; unknown ones and those that are null are left out.

    Raises:
        JavaError: what TorchServe answers to a body that is not JSON, or not of these members.
    """
    try:
        members = json.loads(body.strip() or b"null", parse_int=_Number, parse_float=_Number, parse_constant=_Number)
    except (ValueError, RecursionError) as error:
        raise JsonSyntaxError(f"com.google.gson.stream.MalformedJsonException: {error}") from None
    if members is None:
        call = '"org.pytorch.serve.http.messages.RegisterModelRequest.getModelUrl()"'
        raise JavaError("NullPointerException", f'Cannot invoke {call} because "registerModelRequest" is null')
    if not isinstance(members, dict):
        raise JsonSyntaxError(f"java.lang.IllegalStateException: Expected BEGIN_OBJECT but was {_token(members)}")
    kinds = {parameter.name: parameter.schema["type"] for parameter in known}
    return [
        (name, _json_text(value, str(kinds[name])))
        for name, value in members.items()
        if value is not None and name in kinds
    ]


def _json_text(value: Any, kind: str) -> str:
    wanted = {"integer": "an int", "boolean": "a boolean", "string": "a string"}[kind]
    is_fit = isinstance(value, str) and not (kind == "boolean" and isinstance(value, _Number))
    if not is_fit and not (isinstance(value, bool) and kind != "integer"):
        raise JsonSyntaxError(f"java.lang.IllegalStateException: Expected {wanted} but was {_token(value)}")
    text = json.dumps(value) if isinstance(value, bool) else str(value)
    if kind != "integer":
        return text
    return str(_json_int(text))


def _json_int(text: str) -> int:
    """Also of ``2.0``, ``1e3`` and ``" 2"``; of text that is no number at all the error has other words."""
    number = java_int(text.strip())
    if number is not None:
        return number
    try:
        whole = float(text)
    except ValueError:
        reason = f"For input string: {shown(text)}" if text.strip() else "empty String"
        raise JsonSyntaxError(f"java.lang.NumberFormatException: {reason}") from None
    if not whole.is_integer() or not _INT_MIN <= whole <= _INT_MAX:
        raise JsonSyntaxError(f"java.lang.NumberFormatException: Expected an int but was {text[:40]}")
    return int(whole)


def _token(value: Any) -> str:
    if isinstance(value, bool):
        return "BOOLEAN"
    if isinstance(value, str):
        return "NUMBER" if isinstance(value, _Number) else "STRING"
    return "BEGIN_ARRAY" if isinstance(value, list) else "BEGIN_OBJECT"
