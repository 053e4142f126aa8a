"""Compressed bodies: undone within a limit, refused by name, never unpacked without end."""

from __future__ import annotations

import functools
import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyserve.errors import InputError, TooLargeError, UnsupportedMediaError
from pyserve.request import zstandard
from pyserve.request.content_coding import READ_CODINGS, Decoding, decode_body

compressed = functools.partial(gzip.compress, mtime=0)  # of which the names of tests are made

BODY = b'{"a": [1, 2, 3]}' * 10


def raw_deflate(body: bytes) -> bytes:
    return zlib.compress(body, wbits=-15)


@pytest.mark.parametrize(
    ("sent", "coding"),
    [
        (BODY, ""), (BODY, "identity"), (BODY, " Identity , UTF-8"), (BODY, "utf8"),
        (compressed(BODY), "gzip"), (compressed(BODY), "GZIP, identity"), (compressed(BODY), "x-gzip"),
        (compressed(BODY[:7]) + compressed(BODY[7:]), "gzip"), (compressed(b"") + compressed(BODY), "gzip"),
        (zlib.compress(BODY), "deflate"), (raw_deflate(BODY), "Deflate"),
        (compressed(zlib.compress(BODY)), "deflate, gzip"),
    ],
)  # fmt: skip
def test_a_body_is_what_it_was_before_it_was_packed(sent: bytes, coding: str) -> None:
    assert decode_body(bytearray(sent), coding, len(BODY) + 100) == bytearray(BODY)


def test_nothing_may_be_packed() -> None:
    assert decode_body(compressed(b""), "gzip", 1) == bytearray()


@pytest.mark.parametrize("coding", ["br", "zst", "compress", "gzip, br", "x" * 500, "gzip, gzip, gzip, gzip", "utf-16"])
def test_other_codings_are_refused_with_what_is_taken(coding: str) -> None:
    with pytest.raises(UnsupportedMediaError, match=f"{READ_CODINGS[-2]} or {READ_CODINGS[-1]}") as caught:
        decode_body(BODY, coding, 1000)
    assert caught.value.headers == {"Accept-Encoding": ", ".join(READ_CODINGS)}
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "sent", [b"", b"x", BODY, compressed(BODY)[:-1], compressed(BODY)[:5], compressed(BODY) + b"junk"]
)
@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_body_that_is_not_what_the_header_says_is_the_clients_error(sent: bytes, coding: str) -> None:
    with pytest.raises(InputError, match=f"Content-Encoding '{coding}'"):
        decode_body(sent, coding, 1000)


def test_more_than_the_limit_is_never_unpacked() -> None:
    bomb = compressed(bytes(50_000_000))
    for sent, coding in ((bomb, "gzip"), (compressed(bomb), "gzip, gzip"), (compressed(b"x") + bomb, "gzip")):
        with pytest.raises(TooLargeError) as caught:
            decode_body(sent, coding, 60_000)
        assert caught.value.detail == {"max_request_size": 60_000}
        assert "at least 60001 bytes" in caught.value.message
    assert decode_body(compressed(BODY), "gzip", len(BODY)) == bytearray(BODY)


def test_very_many_files_in_a_row_are_refused() -> None:
    empty = compressed(b"")
    assert decode_body(empty * 999 + compressed(b"x"), "gzip", 10) == bytearray(b"x")
    with pytest.raises(InputError, match="more follows"):
        decode_body(empty * 300_000, "gzip", 10)


def test_what_a_body_grows_to_is_known_while_it_grows() -> None:
    body = bytes(1_000_000)
    decoding = Decoding(compressed(compressed(body)), "gzip, gzip", 2_000_000)
    held = []
    while not decoding.run(100_000):
        held.append(decoding.held)
    assert decoding.body == body and decoding.held == len(body)
    # Each step is a little more than what was allowed, as much as one piece is.
    steps = [after - before for before, after in zip([0, *held], held, strict=False)]
    assert len(held) >= 6 and all(100_000 <= step < 170_000 for step in steps)


@pytest.mark.skipif(zstandard.zstd is None, reason="this Python has no zstd")
def test_zstd_is_read_where_python_has_it() -> None:
    zstd = zstandard.zstd
    for sent in (zstd.compress(BODY), zstd.compress(BODY[:7]) + zstd.compress(BODY[7:])):
        assert decode_body(sent, "zstd", 1000) == BODY
    assert decode_body(zstd.compress(compressed(BODY)), "gzip, zstd", 1000) == BODY
    for sent in (b"", b"x", zstd.compress(BODY)[:-1], zstd.compress(BODY) + b"junk"):
        with pytest.raises(InputError, match="Content-Encoding 'zstd'"):
            decode_body(sent, "zstd", 1000)
    with pytest.raises(TooLargeError, match="at least 60001 bytes"):
        decode_body(zstd.compress(bytes(50_000_000)), "zstd", 60_000)
    wide = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    with pytest.raises(InputError, match="memory"):
        decode_body(wide.compress(BODY) + wide.flush(), "zstd", 1000)


@given(st.binary(max_size=100))
def test_any_bytes_give_a_body_or_a_client_error(junk: bytes) -> None:
    for coding in READ_CODINGS:
        for sent in (junk, compressed(BODY)[:10] + junk, b"\x78\x9c" + junk):
            try:
                assert isinstance(decode_body(sent, coding, 10_000), bytearray)
            except (InputError, TooLargeError):
                pass
