"""Compressed bodies: the value of Content-Encoding, a line feed, and the body."""

from __future__ import annotations

import gzip
import zlib

from pyserve.errors import InputError, TooLargeError, UnsupportedMediaError
from pyserve.request.content_coding import decode_body

SIZE_MAX = 64 << 10


def check(data: bytes) -> None:
    told, _, body = data.partition(b"\n")
    try:
        decoded = decode_body(bytearray(body), told.decode("latin-1"), SIZE_MAX)
    except (InputError, TooLargeError, UnsupportedMediaError) as error:
        assert len(error.message) < 1000
        decoded = None
    assert decoded is None or len(decoded) <= SIZE_MAX or decoded == body
    if told == b"gzip":
        try:
            expected = gzip.decompress(body)
        except (OSError, EOFError, zlib.error):
            return  # stricter than this, or a broken one
        assert decoded is None or decoded == expected, "other bytes than gzip finds"
