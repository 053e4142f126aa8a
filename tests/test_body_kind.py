"""What bytes are taken for that came without a content type; above all that numbers stay numbers."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from pyserve import _front, body_kind
from pyserve.body_kind import begins_as_object, is_file, kind_of, may_have_kind, text_of
from pyserve.tensor_types import may_be_read
from tests.support.serving import SEED

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
TEXTS = ["[1, 2, 3]", ' {"a": "\u00e4\u4e2d"}', '"a"', "[\r\n\t[1], [2]]"]


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), "teal").save(file, kind)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        members.writestr("a", b"b")
    return file.getvalue()


FILES = {
    **{kind: picture(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP")},
    "zip": zipped(), "gzip": gzip.compress(b"x" * 100), "gzip of nothing": gzip.compress(b""),
    "PDF": b"%PDF-1.7\n%\xe2\xe3", "WAV": b"RIFF\x24\0\0\0WAVEfmt ", "MP3": b"ID3\x04\0\0\0\0\0\0",
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0", "MP4": b"\0\0\0\x18ftypisom\0\0\0\0",
    "zstd": b"\x28\xb5\x2f\xfd\x04\x58\x09", "bzip2": b"BZh91AY&SY\0\0", "xz": b"\xfd7zXZ\0\0\4",
}  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("text", TEXTS)
def test_json_is_seen_in_every_encoding_that_is_read(text: str, encoding: str) -> None:
    body = text.encode(encoding)
    if encoding.startswith("utf-32-") and text.startswith(" "):
        return  # what the standard library takes for another encoding
    assert kind_of(body) == kind_of(bytearray(body)) == kind_of(memoryview(body)) == "JSON"
    assert may_have_kind(body)
    assert json.loads(text_of(body) or "") == json.loads(text)
    assert begins_as_object(body) == text.lstrip().startswith("{")


def test_text_is_seen_where_it_has_a_mark_or_is_long() -> None:
    for body in (b"1.5,2", "\ufeff1".encode(), "\ufeff\u00e4".encode(), "1;2\r\n".encode("utf-16"),
                 "gr\u00f6\u00dfer als nichts; und l\u00e4nger".encode()):  # fmt: skip
        assert kind_of(body) == "text" and may_have_kind(body), body
    for body in ("gr\u00fc".encode(), b"\x01\x02", b"[1, 2", "12".encode("utf-16-le")):
        assert kind_of(body) in ("", "text") and (kind_of(body) == "" or body.isascii()), body


@pytest.mark.parametrize("kind", FILES)
def test_files_are_seen(kind: str) -> None:
    assert is_file(FILES[kind]) and kind_of(bytearray(FILES[kind])) == "file"
    assert may_have_kind(FILES[kind])


@pytest.mark.parametrize("body", [
    b"\x1f\x8b\x08\0" + bytes(12), b"PK\x03\x04\0\0\x80\x3f\0\0\x80\x3f", b"BZh\0" + bytes(8),
    b"ID3\x42\0\0\x80\x3f", b"\xff\xd8\xff\x3f",
])  # fmt: skip
def test_numbers_that_begin_as_files_do_are_none(body: bytes) -> None:
    assert kind_of(body) == ""


def test_numbers_are_numbers() -> None:
    print(f"PYSERVE_TEST_SEED={SEED}")
    chance = np.random.default_rng(SEED)
    for _ in range(3000):
        size = int(chance.integers(8, 200))
        for numbers in (
            chance.standard_normal(size).astype("<f4"), chance.random(size).astype("<f8"), np.zeros(size, "<f4"),
            chance.integers(0, 50_000, size).astype("<i8"), chance.integers(0, 127, size).astype("<i4"),
            chance.integers(-3000, 3000, size).astype("<i2"), chance.standard_normal(size).astype("<f2"),
        ):  # fmt: skip
            assert kind_of(numbers.tobytes()) == "", numbers


def test_what_is_passed_over_at_a_glance_has_no_kind() -> None:
    print(f"PYSERVE_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    whole = [*FILES.values(), *(text.encode(encoding) for text in TEXTS for encoding in ENCODINGS),
             "\u4e2d\u6587 ".encode() * 9, b"[" + struct.pack("<3f", 1, 2, 3) + b"]"]  # fmt: skip
    seen = 0
    for _ in range(20_000):
        body = bytearray(chance.choice(whole))
        for _ in range(chance.randrange(3)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        del body[chance.randrange(1, len(body) + 1) :]
        if kind_of(body):
            seen += 1
            assert may_have_kind(body), bytes(body)
    assert seen > 5000


_ODD = (
    b"\xed\xa0\x80", b"\xc0\x80", b"\xe0\x80\x80", b"\xf4\x90\x80\x80", b"\xf0\x80\x80\x80", b"\xef\xbf\xbd",
    b"\xf0\x9f\x98", b"\xe4\xb8", b"\xc3", b"\0\0\0[", b"\0{", b"\0\0\0\0[",
)  # fmt: skip


def utf_8_and_others(chance: random.Random) -> bytes:
    """Bytes that are UTF-8, or nearly so, or numbers."""
    kind = chance.random()
    if kind < 0.3:
        return struct.pack(f"<{(count := chance.randrange(1, 40))}f", *(chance.gauss(0, 1) for _ in range(count)))
    characters = [chance.choice(("a", "\0", "é", "中", "\ufffd", "\U0001f600", " ", "\n", "\uffff")) for _ in range(60)]
    body = bytearray("".join(characters)[: chance.randrange(1, 60)].encode())
    for _ in range(chance.choice((0, 0, 0, 1, 2))):
        body[chance.randrange(len(body))] = chance.choice(
            (0, 0x80, 0xBF, 0xC0, 0xC1, 0xC2, 0xE0, 0xED, 0xF0, 0xF4, 0xF5, 0xFF)
        )
    if chance.random() < 0.2:
        odd = chance.choice(_ODD)
        at = chance.randrange(len(body) + 1)
        body[at:at] = odd
    return bytes(body)


def may_have_kind_by_definition(body: bytes) -> bool:
    """Without what saves time."""
    first = body_kind._BEGINNINGS
    if body[0] in first or body.isascii() or body[4:8] == b"ftyp":
        return True
    if body[0] == 0 and body[:4].lstrip(b"\0")[:1] in body_kind._HIGH_FIRST:
        return True
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return len(body) >= 32


def test_native_code_sees_the_same() -> None:
    print(f"PYSERVE_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    whole = [*FILES.values(), *(text.encode(encoding) for text in TEXTS for encoding in ENCODINGS)]
    seen = [0, 0]
    for number in range(60_000):
        body = utf_8_and_others(chance)
        if number % 4 == 0:
            body = chance.choice(whole)[: chance.randrange(1, 80)]
        wanted = may_have_kind_by_definition(body)
        assert may_have_kind(body) == may_have_kind(bytearray(body)) == wanted, body
        for content_type in ("", "image/png", "application/octet-stream"):
            assert _front.may_be_read(content_type, body) == may_be_read(content_type, body), (content_type, body)
        seen[wanted] += 1
    assert min(seen) > 5000 and _front.may_be_read("", b"")
