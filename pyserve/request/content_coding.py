"""Compressed bodies: what ``Content-Encoding`` says, undone within a limit."""

from __future__ import annotations

import zlib

from pyserve.errors import InputError, TooLargeError, UnsupportedMediaError

CODINGS_MAX = 3
CODING_SHOWN_MAX = 80
MEMBERS_MAX = 1000
_PIECE_SIZE = 64 << 10
_GZIP = ("gzip", "x-gzip")
# What clients send that say nothing of a compression: no coding at all, or the text's.
_NONE = ("", "identity", "utf-8", "utf8", "us-ascii", "ascii")
_ZLIB, _RAW, _GZIP_BITS = 15, -15, 31


def decode_body(body: bytes | bytearray, content_encoding: str, size_max: int) -> bytearray:
    """``body`` without its codings, gzip and deflate. Any thread.

    Args:
        content_encoding: the header; several codings are separated by commas, in the order they were applied.
        size_max: bytes that the result, and each step to it, may have.

    Raises:
        UnsupportedMediaError: another coding, or more than CODINGS_MAX.
        InputError: the body is not what the header says.
        TooLargeError: it has more than ``size_max`` bytes.
    """
    codings = [coding for each in content_encoding.split(",") if (coding := each.strip().lower()) not in _NONE]
    unknown = [coding for coding in codings if coding not in (*_GZIP, "deflate")]
    if unknown or len(codings) > CODINGS_MAX:
        shown = repr(content_encoding[:CODING_SHOWN_MAX])
        raise UnsupportedMediaError(
            f"Content-Encoding {shown} is not read for this model's handler; send the body in gzip or deflate, or as "
            "it is.",
            headers={"Accept-Encoding": "gzip, deflate"},
        )
    for coding in reversed(codings):
        try:
            body = _inflate(body, coding, size_max)
        except (zlib.error, EOFError) as error:
            raise InputError(f"the body is not what its Content-Encoding {coding!r} says: {error}") from error
    return body if isinstance(body, bytearray) else bytearray(body)


def _inflate(body: bytes | bytearray, coding: str, size_max: int) -> bytearray:
    # "deflate" is zlib's form by the standard, and without its frame by habit.
    bits = _GZIP_BITS if coding in _GZIP else _ZLIB if len(body) > 1 and _has_zlib_header(body) else _RAW
    out = bytearray()
    view, at = memoryview(body), 0
    for _ in range(MEMBERS_MAX):  # gzip files may stand one behind the other
        decoder = zlib.decompressobj(bits)
        while not decoder.eof:
            piece = view[at : at + _PIECE_SIZE]
            if not piece:
                raise EOFError("it ends early")
            out += decoder.decompress(piece, size_max - len(out) + 1)
            if len(out) > size_max:
                raise TooLargeError(
                    f"Request body of at least {len(out)} bytes once its compression is undone is over the limit: "
                    f"max_request_size is {size_max} bytes. Send less, or raise max_request_size in config.properties.",
                    detail={"max_request_size": size_max},
                )
            at += len(piece) - len(decoder.unused_data)
        if at == len(view):
            return out
        if bits != _GZIP_BITS:
            break
    raise EOFError("more follows its end")


def _has_zlib_header(body: bytes | bytearray) -> bool:
    return body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0
