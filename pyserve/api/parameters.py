"""Parameters of the management API: which there are, what each may be, and how text becomes a value.

One table for each call serves the reader of requests and the API description alike. Nothing is guessed: an unknown
name or a malformed value is an error that names the nearest known parameter or the allowed values, raised before
anything is changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any, NamedTuple

from pyserve.archive.manifest import NAME_SIZE_MAX, RUNTIMES, SERVED_NAME_PATTERN, check_served_name, split_handler
from pyserve.config.bounds import BOUNDS
from pyserve.errors import BadRequestError, InvalidModelError, JsonObject, shown

COUNT_MAX = 2**31 - 1  # what TorchServe reads into a Java int
TEXT_SIZE_MAX = 4096
_NAME_SIZE_MAX = 64

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}", re.ASCII)
Pairs = list[tuple[str, str]]
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Parameter(NamedTuple):
    """One parameter.

    Attributes:
        name: as in the query or the JSON body.
        parse: text to value; raises ValueError or InvalidModelError.
        allowed: ends the sentence "allowed: ...".
        about: one sentence for the API description.
        schema: JSON schema of the value, for the API description.
    """

    name: str
    parse: Callable[[str], Any]
    allowed: str
    about: str
    schema: JsonObject


def integer(name: str, about: str, least: int, most: int, unit: str = "") -> Parameter:
    """A whole number from ``least`` to ``most``, both allowed."""

    def parse(text: str) -> int:
        if not _INTEGER.fullmatch(text) or not least <= int(text) <= most:
            raise ValueError
        return int(text)

    allowed = f"a whole number from {least} to {most}" + (f" {unit}" if unit else "")
    return Parameter(name, parse, allowed, about, {"type": "integer", "minimum": least, "maximum": most})


def setting(name: str, about: str, bounds_name: str) -> Parameter:
    """A whole number within ``settings.BOUNDS[bounds_name]``."""
    bounds = BOUNDS[bounds_name]
    return integer(name, about, bounds.least, bounds.most, bounds.unit)


def boolean(name: str, about: str, default: bool = False) -> Parameter:
    """``true`` or ``false`` in any case; ``default`` is only described here."""

    def parse(text: str) -> bool:
        value = {"true": True, "false": False}.get(text.lower())
        if value is None:
            raise ValueError
        return value

    return Parameter(name, parse, "true or false", about, {"type": "boolean", "default": default})


def plain_text(
    name: str, about: str, check: Callable[[str], object] | None = None, schema: JsonObject | None = None
) -> Parameter:
    """Text without control characters; ``check`` raises InvalidModelError for one that cannot be used.

    Args:
        schema: what ``check`` wants, for the API description.
    """

    def parse(value: str) -> str:
        if len(value) > TEXT_SIZE_MAX or _CONTROL.search(value):
            raise ValueError
        if check is not None:
            check(value)
        return value

    allowed = f"text of at most {TEXT_SIZE_MAX} characters without control characters"
    known: JsonObject = {"type": "string", "maxLength": TEXT_SIZE_MAX, "pattern": "^[^\\x00-\\x1f\\x7f]*$"}
    return Parameter(name, parse, allowed, about, {**known, **(schema or {})})


def _check_runtime(value: str) -> None:
    if value not in RUNTIMES:
        raise InvalidModelError(f"Invalid RuntimeType value: {value}")


_SYNCHRONOUS = "Whether the answer waits until the workers are ready."
_UNUSED = "Accepted for TorchServe's clients; has no effect."

SETTINGS = (
    setting("batch_size", "Most requests run together.", "batch_size"),
    setting("max_batch_delay", "Longest wait for a batch to fill while all workers are busy, in ms.",
            "max_batch_delay_ms"),
    setting("response_timeout", "Longest run of a request, in s.", "response_timeout_s"),
    setting("startup_timeout", "Longest start of a worker, in s.", "startup_timeout_s"),
)  # fmt: skip
LIVE_SETTINGS = (
    *SETTINGS,
    setting("min_batch", "Requests to wait for, at most max_batch_delay, even while a worker is idle.", "min_batch"),
    setting("job_queue_size", "Requests that may wait; one more is refused with 503.", "queue_size"),
    setting("client_timeout", "Longest wait of a request before it runs, in ms; 0 means response_timeout.",
            "client_timeout_ms"),
)  # fmt: skip
LIST = (
    integer("limit", "Models on a page; more than 100 means 100.", -COUNT_MAX - 1, COUNT_MAX),
    integer("next_page_token", "The nextPageToken of the page before.", -COUNT_MAX - 1, COUNT_MAX),
)
INVOKE = (
    plain_text("model_name", "The model; may be left out when one was loaded at the start. A form may name it too."),
)
DESCRIBE = (boolean("customized", "Whether to add what the handler says of itself."),)
REGISTER = (
    plain_text("url", "Name of an archive in the model store, a path in it, or a URL that allowed_urls allows."),
    plain_text("model_name", "Name to serve it under; by default the one in its manifest.", check_served_name,
               {"pattern": SERVED_NAME_PATTERN, "maxLength": NAME_SIZE_MAX}),
    plain_text("runtime", "By default the one in its manifest.", _check_runtime, {"enum": list(RUNTIMES[:2])}),
    plain_text("handler", "By default the one in its manifest.", split_handler,
               {"pattern": "^[^\\x00-\\x1f\\x7f]*[^\\x00-\\x1f\\x7f/:]", "minLength": 1}),
    *SETTINGS,
    integer("initial_workers", "Workers to start; 0 registers the model without any.", 0, BOUNDS["workers_min"].most,
            "workers"),
    boolean("synchronous", _SYNCHRONOUS, default=True),
    boolean("s3_sse_kms", "Accepted for TorchServe's clients; s3:// URLs are always read with signed requests."),
)  # fmt: skip
SCALE = (
    setting("min_worker", "Least number of workers; 1 by default if no setting is given.", "workers_min"),
    setting("max_worker", "Largest number of workers; by default min_worker.", "workers_max"),
    plain_text("model_version", "The version, if it is not in the path."),
    boolean("synchronous", _SYNCHRONOUS),
    integer("number_gpu", _UNUSED, 0, BOUNDS["device_id"].most + 1),
    integer("timeout", _UNUSED, 0, BOUNDS["response_timeout_s"].most, "s"),
    *LIVE_SETTINGS,
)
UNREGISTER = (
    boolean("synchronous", _UNUSED),
    integer("timeout", _UNUSED, 0, BOUNDS["response_timeout_s"].most, "s"),
)
NONE: tuple[Parameter, ...] = ()


def read_values(pairs: Iterable[tuple[str, str]], known: Iterable[Parameter]) -> dict[str, Any]:
    """The values of ``pairs``, by name. Of a repeated parameter the first value counts.

    Raises:
        BadRequestError: an unknown name or a malformed value.
    """
    parameters = {parameter.name: parameter for parameter in known}
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            continue
        parameter = parameters.get(name)
        if parameter is None:
            raise _unknown(name, parameters)
        values[name] = parsed(parameter, value)
    return values


def parsed(parameter: Parameter, value: str) -> Any:
    """The value that ``value`` is the text of.

    Raises:
        BadRequestError: it is none.
    """
    detail = {"parameter": parameter.name}
    try:
        return parameter.parse(value)
    except InvalidModelError as error:
        raise BadRequestError(error.message, detail=detail) from None
    except ValueError:
        raise BadRequestError(
            f"Parameter {parameter.name} cannot be {shown(value)}; allowed: {parameter.allowed}.", detail=detail
        ) from None


# It is read on the event loop.
_JSON_SIZE_MAX = 64 << 10


def json_pairs(body: bytes | bytearray) -> Pairs:
    """The members of a JSON object as a query would give them; those that are ``null`` are left out.

    Raises:
        BadRequestError: not a JSON object, a member that is neither text, number nor boolean, or very large.
    """
    if len(body) > _JSON_SIZE_MAX:
        raise BadRequestError(f"The JSON body has {len(body)} bytes; the parameters of a call have at most "
                              f"{_JSON_SIZE_MAX}.")  # fmt: skip
    try:
        members = json.loads(body)
    except (ValueError, RecursionError) as error:
        known = isinstance(error, json.JSONDecodeError)
        reason = str(error) if known else "it is nested too deeply, not UTF-8, or has a number that is too long"
        raise BadRequestError(f"The body is not JSON: {reason}.") from None
    if not isinstance(members, dict):
        raise BadRequestError('The JSON body must be an object such as {"url": "model.mar"}.')
    pairs = []
    for name, value in members.items():
        if value is None:
            continue
        if not isinstance(value, str | int | float):
            raise BadRequestError(
                f"Parameter {shown(name)} must be text, a number or a boolean, not {_json_type(value)}.",
                detail={"parameter": name[:_NAME_SIZE_MAX]},
            )
        pairs.append((name, value if isinstance(value, str) else json.dumps(value)))
    return pairs


def _json_type(value: object) -> str:
    return "a list" if isinstance(value, list) else "an object"


def _unknown(name: str, parameters: dict[str, Parameter]) -> BadRequestError:
    # Compared without case and underscores, so that batchSize and batch-size find batch_size.
    plain = {known.replace("_", ""): known for known in parameters}
    asked = name[:_NAME_SIZE_MAX].lower().replace("_", "").replace("-", "")
    near = get_close_matches(asked, plain, n=1, cutoff=0.6)
    if near:
        fix = f"did you mean {plain[near[0]]}?"
    elif parameters:
        fix = f"known are {', '.join(parameters)}."
    else:
        fix = "this call has none."
    return BadRequestError(
        f"Unknown parameter {shown(name)}; {fix}",
        detail={"parameter": name[:_NAME_SIZE_MAX], "known": list(parameters)},
    )
