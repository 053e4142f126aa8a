"""What bytes are that came without a content type, as they show it themselves: JSON, text, or a file of some kind.

Where a model takes numbers as they lie in memory, such bytes would be taken for numbers. Needs no torch.
"""

from __future__ import annotations

import codecs
import json
import zlib

Body = bytes | bytearray | memoryview

NPY_MAGIC = b"\x93NUMPY"

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_JSON_BEGINS = ("{", "[", '"')
_BLANKS = " \t\r\n"
_BEGIN_SIZE = 64
_PLAIN = bytes(range(32, 127)) + b"\t\r\n"
# Bytes from which on text that is not ASCII is told from numbers: fewer may be printable by chance.
_TEXT_SIZE_MIN = 32

# First bytes -> what a file is that is sent where something else is expected.
_FILES = (
    (NPY_MAGIC, "a NumPy file (.npy)"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG\r\n", "a PNG picture"),
    (b"GIF87a", "a GIF picture"),
    (b"GIF89a", "a GIF picture"),
    (b"%PDF-", "a PDF document"),
    (b"PK\x03\x04", "a zip file, such as torch.save and numpy.savez write"),
    (b"\x1f\x8b\x08", "gzipped data; send Content-Encoding: gzip with it"),
    (b"\x28\xb5\x2f\xfd", "data compressed by zstd; send Content-Encoding: zstd with it"),
    (b"BZh", "data compressed by bzip2"),
    (b"\xfd7zXZ\x00", "data compressed by xz"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"OggS", "an Ogg file"),
    (b"fLaC", "a FLAC file"),
    (b"ID3", "an MP3 file"),
    (b"\xef\xbb\xbf", "text in UTF-8 with a byte order mark"),
    (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"),
)
# Inside containers whose first bytes tell a size.
_RIFF_FILES = {b"WEBP": "a WebP picture", b"WAVE": "a WAV file", b"AVI ": "an AVI file"}
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_FTYP_FILES = {b"avif": "an AVIF picture", **dict.fromkeys(_HEIC_BRANDS, "a HEIC picture, as phones take them")}
_VIDEO = "an MP4 file"

# Of `may_have_kind`: first bytes of JSON, marks and files.
_BEGINNINGS = frozenset(b'\x1f\x89\xff\xfe\xef\xfd\x28\x93[{" \t\r\nGPRBOfI%')
# Behind zeros: JSON and a mark, the high byte first.
_HIGH_FIRST = tuple(bytes((each,)) for each in b'[{" \t\r\n\xfe')


def is_heic(start: bytes) -> bool:
    """Whether a file that begins with these 12 bytes or more is a picture in HEIF's container."""
    return start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS


def kind_of_file(start: bytes) -> str:
    """What begins with these bytes, 12 or more of them, in a few words; ``""`` for what is not known."""
    if start[4:8] == b"ftyp" and start[8:12].isascii():
        return _FTYP_FILES.get(start[8:12], _VIDEO)
    if start[:4] == b"RIFF" and start[8:12] in _RIFF_FILES:
        return _RIFF_FILES[start[8:12]]
    return next((kind for magic, kind in _FILES if start.startswith(magic)), "")


def is_plain_text(value: Body) -> bool:
    """Whether all of it is printable ASCII and white space, which numbers in memory hardly ever are."""
    whole = bytes(value)
    return whole.isascii() and not whole.translate(None, _PLAIN)


def is_file(body: Body) -> bool:
    """Whether it is a file of a known kind. Numbers that begin with the same bytes are hardly ever taken for one."""
    start = bytes(body[:32])
    if start.startswith(b"\xff\xd8\xff"):  # and the marker of a segment, which no ordinary number has there
        return len(start) > 3 and start[3] >= 0xC0
    if start.startswith(b"\x1f\x8b\x08"):
        return _is_gzip(body)
    if start.startswith(b"PK\x03\x04"):
        return len(start) > 9 and start[5] == 0 and 10 <= start[4] < 100 and start[9] == 0
    if start.startswith(b"BZh"):
        return start[4:10] == b"1AY&SY"
    if start.startswith(b"ID3"):
        return start[3:5] in (b"\x02\0", b"\x03\0", b"\x04\0") and len(start) > 9 and not start[5] & 0x0F
    if start.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return False  # text, if it is
    return not start.startswith(NPY_MAGIC) and bool(kind_of_file(start))


def _is_gzip(body: Body) -> bool:
    try:
        zlib.decompressobj(31).decompress(bytes(body[: 1 << 12]), 64)
    except zlib.error:
        return False
    return True


def text_of(body: Body) -> str | None:
    """The text that ``body`` is, in the encoding that its byte order mark says, or that JSON which begins so has; None
    if it is none."""  # fmt: skip
    whole = bytes(body)
    encoding, size = _encoding_of(whole)
    try:
        return whole[size:].decode(encoding)
    except UnicodeDecodeError:
        return None


def _encoding_of(start: bytes) -> tuple[str, int]:
    """And how many bytes its mark has."""
    marked = next(((name, len(mark)) for mark, name in _MARKS if start.startswith(mark)), None)
    return marked or (json.detect_encoding(start), 0)


def begins_as_object(body: Body) -> bool:
    """Whether ``body`` begins as a JSON object does, in any encoding that JSON may have."""
    start = bytes(body[:_BEGIN_SIZE])
    return start.lstrip()[:1] == b"{" or _begins(start, "{")


def begins_as_json(body: Body) -> bool:
    """Whether ``body`` begins as a JSON array, object or text does, in any encoding that JSON may have."""
    return _begins(bytes(body[:_BEGIN_SIZE]), *_JSON_BEGINS)


def _begins(start: bytes, *wanted: str) -> bool:
    encoding, size = _encoding_of(start)
    return start[size:].decode(encoding, "replace").lstrip(_BLANKS).startswith(wanted)


def kind_of(body: Body) -> str:
    """``JSON``, ``text`` or ``file`` for bytes that are hardly meant as numbers in memory; ``""`` for others."""
    if is_file(body):
        return "file"
    text = text_of(body)
    if not text:
        return ""
    if text.lstrip(_BLANKS).startswith(_JSON_BEGINS) and _is_json(text):
        return "JSON"
    if is_plain_text(body):
        return "text"
    encoding, mark_size = _encoding_of(bytes(body[:4]))
    # Without a mark whole numbers of 16 bits may well be letters, too.
    is_text = mark_size or (encoding == "utf-8" and len(body) >= _TEXT_SIZE_MIN)
    return "text" if is_text and all(char.isprintable() or char in _BLANKS for char in text) else ""


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def may_have_kind(body: bytes | bytearray) -> bool:
    """False for bytes of which `kind_of` says nothing, as far as that is known at a glance.

    REQUIRES: it is not empty.
    """
    if body[0] in _BEGINNINGS or body.isascii() or body[4:8] == b"ftyp":
        return True
    if body[0] == 0 and body[:4].lstrip(b"\0")[:1] in _HIGH_FIRST:
        return True
    if len(body) < _TEXT_SIZE_MIN:
        return False
    # Of numbers the first few bytes show it, in an eighth of the time of an exception. The last character may be cut.
    start = body[:_BEGIN_SIZE]
    if "\ufffd" in start.decode("utf-8", "replace")[:-1] and b"\xef\xbf\xbd" not in start:
        return False
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True
