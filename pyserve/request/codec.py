"""Bodies: from the wire to what a handler receives, and from what it returns to the wire.

The rules are TorchServe's: a plain body is ``{"body": value}``, a form is one key per field; JSON is parsed,
text becomes ``str``, anything else stays a ``bytearray``; what cannot be decoded stays a ``bytearray`` too. Of a form's
parts only those with a file name are decoded.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.parse import quote_plus, unquote_plus

import torch

from pyserve.errors import BadRequestError, HandlerError, TooLargeError, is_memory_error
from pyserve.request import json_encoding
from pyserve.request.forms import PARTS_MAX, Field, boundary_of, read_multipart, read_query, read_urlencoded
from pyserve.request.json_body import NAME_SHOWN_MAX, NotJsonError, parse_json
from pyserve.request.json_pieces import dump_in_slices

log = logging.getLogger(__name__)

NAN_WARNING = (
    "a result holds NaN or an infinity, which JSON cannot express; it is answered as null. Reported once; "
    "compat=strict answers NaN as TorchServe does"
)
# Flag of a request whose body is fields' values and whose query their sizes, see `split_fields`.
FIELDS = 2
FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
_WITHOUT_BLANKS = dict.fromkeys(map(ord, "\r\n\t"))
FIELD_NAMES_SIZE_MAX = 64 << 10  # of all together, see `join_fields`


class RequestParts(Protocol):
    """What decoding looks at of a request; `messages.Request` has it."""

    @property
    def body(self) -> bytearray: ...

    @property
    def content_type(self) -> str: ...

    def header(self, name: str, default: str = "") -> str: ...


def decode_request(
    request: RequestParts,
    *,
    decode: bool = True,
    types: dict[str, str] | None = None,
    lenient: bool = False,
    is_built_in: bool = False,
    in_slices: bool = False,
    takes_arrays: bool = False,
) -> dict[str, Any]:
    """The row a handler receives for one request.

    Args:
        decode: whether JSON and text are decoded (``decode_input_request``).
        types: filled with the content type of each field, ``""`` for none: as TorchServe's handlers find it, without
            parameters; for built-in handlers as it was sent.
        lenient: as TorchServe 0.12 was measured: of fields, and of a JSON object's members, of one name the last one
            counts, else they are refused; media types count as they are spelled.
        is_built_in: for a handler of pyserve's own: a part without a file name is decoded too.
        in_slices, takes_arrays: see `parse_json`.

    Raises:
        BadRequestError: a broken form, JSON nested too deeply or with an absurd number, or input that would be lost.
        TooLargeError: a form with too many parts.
    """
    media_type = _media_type_as_sent(request) if lenient else request.content_type
    if media_type == "application/x-www-form-urlencoded":
        try:
            fields = read_urlencoded(request.body, lenient=lenient)
        except (BadRequestError, TooLargeError) as error:
            raise _no_form(request.body) or error from None
    elif media_type == "multipart/form-data" and boundary_of(request.header("content-type")) is not None:
        fields = read_multipart(request.body, request.header("content-type"), lenient=lenient)
    else:
        if types is not None:
            content_type = request.header("content-type")
            types["body"] = content_type if is_built_in else content_type.partition(";")[0]
        if not decode:
            return {"body": request.body}
        return {"body": decode_value(request.body, media_type, lenient=lenient, in_slices=in_slices,
                                     takes_arrays=takes_arrays)}  # fmt: skip
    row: dict[str, Any] = {}
    for field in fields:
        if field.name in row and not lenient:
            raise (media_type == FORM_TYPES[1] and _no_form(request.body)) or _repeated(field.name)
        content_type = field.content_type or "" if is_built_in else _part_type(field)
        part_type = content_type if lenient else _media_type(content_type).lower()
        row[field.name] = field.value
        if decode:
            row[field.name] = decode_value(field.value, part_type, lenient=lenient, in_slices=in_slices,
                                           takes_arrays=takes_arrays)  # fmt: skip
        if types is not None:
            types[field.name] = content_type
    return row


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip()


def _media_type_as_sent(request: RequestParts) -> str:
    """As TorchServe compares it: in any case only for url-encoded forms."""
    if request.content_type == "application/x-www-form-urlencoded":
        return request.content_type
    return request.header("content-type").partition(";")[0]


def _part_type(field: Field) -> str:
    """What TorchServe takes a part's type to be: only those with a file name have one."""
    if not field.is_file:
        return ""
    return "application/octet-stream" if field.content_type is None else _media_type(field.content_type)


def add_query(row: dict[str, Any], query: str, *, types: dict[str, str] | None = None, lenient: bool = False) -> None:
    """Puts the parameters of a raw query string before the fields of ``row``: ``bytearray``, without a content type.

    Raises:
        BadRequestError: two of them, or one and a field, have the same name. ``lenient`` keeps the field, or the last.
    """
    sent = dict(row)
    row.clear()  # TorchServe's rows have the query's fields first, which handlers see that take the first one
    for name, value, *_ in read_query(query.replace(";", "&").encode("latin-1", "replace"), lenient=lenient):
        if not lenient and (name in row or name in sent):
            raise _repeated(name)
        row[name] = value
        if types is not None:
            types.setdefault(name, "")
    row.update(sent)


def _no_form(body: bytearray) -> BadRequestError | None:
    """Of a body that cannot be read as the form that it was sent as: that it is a file, if it is."""
    start = bytes(body[:64]).decode("utf-8", "replace").rstrip("\ufffd")
    if "\ufffd" not in start and start.translate(_WITHOUT_BLANKS).isprintable():
        return None
    return BadRequestError(
        f"the body is {len(body)} bytes of binary, but was sent as a form, as curl -d does; send a file as it is: curl "
        "-T FILE, or -H 'Content-Type: application/octet-stream' --data-binary @FILE"
    )


def _repeated(name: str) -> BadRequestError:
    return BadRequestError(
        f"the request has more than one field {name[:NAME_SHOWN_MAX]!r}, and a handler is given one of each name; send "
        "a request for each, or use different names",
        detail={"field": name[:NAME_SHOWN_MAX]},
    )


def split_fields(body: bytearray, sizes: str) -> dict[str, Any]:
    """The row of a request whose body is its fields' values one after the other, as they came: ``bytearray``.

    Args:
        sizes: names and sizes, ``data=4096&id=16``, as `join_fields` gives them.
    """
    if not sizes:
        return {}
    pairs = [(unquote_plus(name), int(size)) for name, _, size in (part.partition("=") for part in sizes.split("&"))]
    if len(pairs) == 1:
        return {pairs[0][0]: body}
    row: dict[str, Any] = {}
    start = 0
    for name, size in pairs:
        row[name] = body[start : start + size]
        start += size
    return row


def join_fields(fields: Mapping[str, bytes]) -> tuple[bytearray, str]:
    """The inverse of `split_fields`: body and sizes.

    Raises:
        TooLargeError: too many fields, or names that are too long.
    """
    if len(fields) > PARTS_MAX:
        raise TooLargeError(f"the request has {len(fields)} inputs; at most {PARTS_MAX} are allowed")
    sizes = "&".join([f"{quote_plus(name)}={len(value)}" for name, value in fields.items()])
    if len(sizes) > FIELD_NAMES_SIZE_MAX:
        raise TooLargeError(f"the names of the inputs have more than {FIELD_NAMES_SIZE_MAX} bytes; use shorter ones")
    return bytearray().join(fields.values()), sizes


def decode_value(
    body: bytearray, content_type: str, *, lenient: bool = False, in_slices: bool = False, takes_arrays: bool = False
) -> Any:
    """``body`` as its content type says; the bytes themselves when they turn out not to be that.

    Args:
        lenient, in_slices, takes_arrays: see `parse_json`.

    Raises:
        InputError: JSON that is nested too deeply, has an absurd number, or, unless ``lenient``, a member twice.
    """
    if content_type == "application/json":
        try:
            return parse_json(body, lenient=lenient, in_slices=in_slices, takes_arrays=takes_arrays)
        except NotJsonError as error:
            log.warning("a body sent as application/json: %s; the handler receives its bytes", error)
            return body
    if content_type.startswith("text"):
        try:
            return body.decode("utf-8")
        except UnicodeDecodeError:
            return body
    return body


def encode_result(
    value: Any, on_nan: Callable[[], None] | None = None, *, in_slices: bool = False
) -> bytes | bytearray | memoryview:
    """What a handler returned for one request, as the bytes of the answer (contract: section 1.6).

    Args:
        on_nan: see `json_encoding.dump`.
        in_slices: JSON is written in pieces, so that the process's other threads get a turn meanwhile.

    Raises:
        HandlerError: the value is neither bytes, text, a tensor nor JSON; the text says where in it and how to fix it.
    """
    if isinstance(value, memoryview):
        # Its length counts bytes then, whatever it held.
        return value.cast("B") if value.c_contiguous and value.nbytes else value.tobytes()
    if isinstance(value, (bytes, bytearray)):
        return value
    if isinstance(value, torch.Tensor):
        # All of the memory that a tensor is a part of is written, and so the answers of others in its batch.
        if value.layout is torch.strided and value.untyped_storage().nbytes() > value.numel() * value.element_size():
            value = value.clone()
        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()
    try:
        if isinstance(value, str):
            return value.encode()
        if in_slices:
            return dump_in_slices(value, lambda piece: json_encoding.dump(piece, on_nan), indent=2)
        return json_encoding.dump(value, on_nan)
    except Exception as error:  # of any kind: a `tolist` or a property of the handler's classes may run
        if is_memory_error(error):
            raise
        raise HandlerError(
            "Unsupported model output data type.",
            detail={"exception": type(error).__name__, "text": _why_not(value, error)},
        ) from error


def _why_not(value: Any, error: Exception) -> str:
    if isinstance(value, str):
        return f"a str cannot become UTF-8: {error}"
    found = json_encoding.find_not_json(value)
    if found is None:
        return f"a {type(value).__name__} cannot become JSON: {error}"
    return f"{found.type}{found.place} cannot become JSON; {found.fix}"
