"""Compressed bodies: what ``Content-Encoding`` says, undone within a limit."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

from pyserve.errors import InputError, TooLargeError, UnsupportedMediaError
from pyserve.request import zstandard

CODINGS_MAX = 3
CODING_SHOWN_MAX = 80
MEMBERS_MAX = 1000
_PIECE_SIZE = 64 << 10
_GZIP = ("gzip", "x-gzip")
_ZSTD = ("zstd",) if zstandard.zstd is not None else ()
# In the order in which they are named to clients.
READ_CODINGS = ("gzip", "deflate", *_ZSTD)
# What clients send that say nothing of a compression: no coding at all, or the text's.
_NONE = ("", "identity", "utf-8", "utf8", "us-ascii", "ascii")
_ZLIB_BITS, _RAW_BITS, _GZIP_BITS = 15, -15, 31
_ERRORS: tuple[type[Exception], ...] = (zlib.error, EOFError)
if zstandard.zstd is not None:
    _ERRORS = (*_ERRORS, zstandard.zstd.ZstdError)


class Decoding:
    """A body whose codings (gzip, deflate, and zstd where Python has it) are being undone, piece by piece.

    Args:
        content_encoding: the header; several codings are separated by commas, in the order they were applied.
        size_max: bytes that the result, and each step to it, may have.

    Attributes:
        body: the result, once `run` has said that it is there.
        held: bytes that were made so far and are in memory.

    Raises:
        UnsupportedMediaError: another coding, or more than CODINGS_MAX.
    """

    def __init__(self, body: bytes | bytearray, content_encoding: str, size_max: int):
        codings = [coding for each in content_encoding.split(",") if (coding := each.strip().lower()) not in _NONE]
        unknown = [coding for coding in codings if coding not in (*_GZIP, *READ_CODINGS)]
        if unknown or len(codings) > CODINGS_MAX:
            shown = repr(content_encoding[:CODING_SHOWN_MAX])
            raise UnsupportedMediaError(
                f"Content-Encoding {shown} is not read for this model's handler; send the body in "
                f"{', '.join(READ_CODINGS[:-1])} or {READ_CODINGS[-1]}, or as it is.",
                headers={"Accept-Encoding": ", ".join(READ_CODINGS)},
            )
        self.body: bytes | bytearray = body
        self.held = 0
        self._size_max = size_max
        self._granted = 0
        self._pieces = self._undo(codings)

    def run(self, size: int) -> bool:
        """Continues until the body is there (True), or ``held`` has grown by about ``size`` bytes. Any thread, one at a
        time.

        Raises:
            InputError: the body is not what the header says.
            TooLargeError: it has more than ``size_max`` bytes.
        """
        self._granted = self.held + size
        return next(self._pieces, None) is None

    def _undo(self, codings: list[str]) -> Iterator[int]:
        for coding in reversed(codings):
            try:
                yield from self._undo_one(coding)
            except _ERRORS as error:
                raise InputError(f"the body is not what its Content-Encoding {coding!r} says: {error}") from error

    def _undo_one(self, coding: str) -> Iterator[int]:
        body = self.body
        before = self.held
        out = bytearray()
        view, at = memoryview(body), 0
        for _ in range(MEMBERS_MAX):  # gzip files may stand one behind the other
            decoder = _decoder(coding, body)
            piece: bytes | memoryview = b""
            while not decoder.eof:
                if not piece:
                    piece = view[at : at + _PIECE_SIZE]
                    at += len(piece)
                made = decoder.decompress(piece, min(_PIECE_SIZE, self._size_max - len(out) + 1))
                if not (made or piece or decoder.eof):
                    raise EOFError("it ends early")
                piece = getattr(decoder, "unconsumed_tail", b"")
                out += made
                self.held = before + len(out)
                if len(out) > self._size_max:
                    raise _too_large(len(out), self._size_max)
                if self.held >= self._granted:
                    yield self.held
            at -= len(decoder.unused_data)
            if at == len(view):
                self.body, self.held = out, len(out)
                return
            if coding == "deflate":
                break
        raise EOFError("more follows its end")


def decode_body(body: bytes | bytearray, content_encoding: str, size_max: int) -> bytearray:
    """``body`` without its codings, at once; see `Decoding`, also for what is raised. Any thread."""
    decoding = Decoding(body, content_encoding, size_max)
    while not decoding.run(CODINGS_MAX * size_max):
        pass
    return decoding.body if isinstance(decoding.body, bytearray) else bytearray(decoding.body)


def _decoder(coding: str, body: bytes | bytearray) -> Any:
    if coding in _ZSTD:
        return zstandard.decompressor()
    if coding in _GZIP:
        return zlib.decompressobj(_GZIP_BITS)
    # "deflate" is zlib's form by the standard, and without its frame by habit.
    return zlib.decompressobj(_ZLIB_BITS if len(body) > 1 and _has_zlib_header(body) else _RAW_BITS)


def _has_zlib_header(body: bytes | bytearray) -> bool:
    return body[0] & 0x0F == 8 and (body[0] << 8 | body[1]) % 31 == 0


def _too_large(size: int, size_max: int) -> TooLargeError:
    return TooLargeError(
        f"Request body of at least {size} bytes once its compression is undone is over the limit: max_request_size is "
        f"{size_max} bytes. Send less, or raise max_request_size in config.properties.",
        detail={"max_request_size": size_max},
    )
