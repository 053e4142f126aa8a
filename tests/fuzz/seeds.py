"""Writes the first inputs of every corpus: ``python -m tests.fuzz.seeds``. What fuzzing found beside them stays.

They are the vectors of other tests, cut down: small inputs mutate better than large ones.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator

from tests.fuzz.targets import CORPUS
from tests.http1.test_http1_vectors import REFUSED, SERVED
from tests.support.archive_files import HANDLER, Member, deflate, manifest, tar_bytes, zip_bytes

_WEIGHTS = bytes(range(64))


def main() -> None:
    makers = {
        "zip": _zips,
        "tar": _tars,
        "http1": _http1,
        "heads": _heads,
        "tensors": _tensors,
        "json": _json,
        "forms": _forms,
        "coding": _coding,
        "model_config": _configs,
        "frames": _frames,
        "fronts": _fronts,
        "answers": _answers,
    }
    for name, make in makers.items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for title, data in make():
            (folder / re.sub(r"\W+", "_", title).strip("_")).write_bytes(data)


def _files(config: bytes = b"", **model: str | None) -> dict[str, bytes]:
    files = {
        "MAR-INF/MANIFEST.json": manifest(**({"configFile": "c.yaml"} if config else {}), **model),
        "handler.py": HANDLER,
        "w.bin": _WEIGHTS,
    }
    return files | ({"c.yaml": config} if config else {})


def _zips() -> Iterator[tuple[str, bytes]]:
    def members(prefix: str = "", **model: str | None) -> list[Member]:
        return [
            Member((prefix + name).encode(), content, method=8 if name.endswith("y") else 0)
            for name, content in _files(**model).items()
        ]

    one = Member(b"a", b"text")
    yield "good", zip_bytes(*members())
    yield (
        "good with a config",
        zip_bytes(*[Member(name.encode(), content) for name, content in _files(b"batchSize: 2\n").items()]),
    )
    yield "below a folder", zip_bytes(*members("m/"))
    yield "no manifest", zip_bytes(one, Member(b"d/", mode=0o40755), Member(b"d/b", b"x" * 40, method=8))
    yield (
        "names",
        zip_bytes(
            Member(b"a\\b", b"1"),
            Member(b"./c", b"2"),
            Member("\u00e9".encode(), b"3", flags=2048),
            Member(b"\x82", b"4"),
        ),
    )
    yield "link", zip_bytes(one, Member(b"l", b"a", mode=0o120777), Member(b"d/l", b"../a", mode=0o120777))
    yield "link to a folder", zip_bytes(Member(b"d/a", b"1"), Member(b"e", b"d", mode=0o120777))
    yield "twice", zip_bytes(Member(b"a", b"1"), Member(b"a", b"2"))
    yield "descriptor", zip_bytes(Member(b"a", b"text", flags=8))
    yield "overlapping", zip_bytes(one, Member(b"b", b"text", offset=0))
    yield "comment", zip_bytes(one)[:-2] + b"\5\0hello"
    yield "cut", zip_bytes(*members())[:-30]
    yield (
        "bomb",
        zip_bytes(
            Member(b"a", b"", method=8, packed=deflate(bytes(100_000)), size=100_000, crc=zlib.crc32(bytes(100_000)))
        ),
    )
    yield "zip64", _zip64()


def _zip64() -> bytes:
    """Sizes, offset and the end record all in their wide forms."""
    name, content = b"a", b"text"
    wide = struct.pack("<2H2Q", 1, 16, len(content), len(content))
    local = (
        struct.pack("<4s5HL2L2H", b"PK\3\4", 45, 0, 0, 0, 33, zlib.crc32(content), 2**32 - 1, 2**32 - 1, 1, len(wide))
        + name
        + wide
        + content
    )
    extra = struct.pack("<2H3Q", 1, 24, len(content), len(content), 0)
    central = (
        struct.pack(
            "<4s4B4HL2L5H2L",
            b"PK\1\2",
            45,
            3,
            45,
            0,
            0,
            0,
            0,
            33,
            zlib.crc32(content),
            2**32 - 1,
            2**32 - 1,
            1,
            len(extra),
            0,
            0,
            0,
            0o100644 << 16,
            2**32 - 1,
        )
        + name
        + extra
    )
    at = len(local) + len(central)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, len(central), len(local))
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
    return (
        local
        + central
        + end64
        + locator
        + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    )


def _tars() -> Iterator[tuple[str, bytes]]:
    def header(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
        made = tarfile.TarInfo(name)
        made.type, made.linkname = kind, link
        return made

    def short(data: bytes) -> bytes:
        """Without the padding to a whole record."""
        return data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512 + 1024)

    one = {"a": b"text"}
    yield "good", short(tar_bytes(_files()))
    yield "config", short(tar_bytes(_files(b"minWorkers: 1\n"), prefix=""))
    yield "gnu", short(tar_bytes(one, header("n" * 150), tar_format=tarfile.GNU_FORMAT))
    yield "pax name", short(tar_bytes(one, header("\u00e9" * 120)))
    yield "ustar prefix", short(tar_bytes(one, header("d/" * 30 + "x" * 90), tar_format=tarfile.USTAR_FORMAT))
    yield "links", short(tar_bytes(one, header("m/h", tarfile.LNKTYPE, "m/a"), header("m/s", tarfile.SYMTYPE, "a")))
    yield "folder", short(tar_bytes(one, header("m/d", tarfile.DIRTYPE)))
    yield "device", short(tar_bytes(one, header("m/d", tarfile.CHRTYPE)))
    yield "long link", short(tar_bytes(one, header("m/l", tarfile.SYMTYPE, "d/" * 80), tar_format=tarfile.GNU_FORMAT))
    yield "cut", tar_bytes(_files())[:1500]
    yield "bytes after the end", short(tar_bytes(one)) + b"more"


def _http1() -> Iterator[tuple[str, bytes]]:
    for title, (sent, *_) in {**SERVED, **REFUSED}.items():
        if len(sent) <= 400:
            yield title, b"\0\0" + sent
    get, post = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
    chunked = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
    for how in (b"\0\1", b"\1\2", b"\2\3", b"\3\4"):
        yield f"pipeline {how.hex()}", how + get + post + chunked + get.replace(b"GET", b"HEAD") + post + get
        yield f"expect {how.hex()}", how + post.replace(b"Host: a", b"Host: a\r\nExpect: 100-continue") + get
        yield f"over the limits {how.hex()}", how + post.replace(b"3\r\n", b"30\r\n") + bytes(27) + get
        yield f"many {how.hex()}", how + get * 12


def _heads() -> Iterator[tuple[str, bytes]]:
    for title, (vector, _) in SERVED.items():
        yield title, b"\2" + vector.partition(b"\r\n\r\n")[0]
    many = b"Accept: */*\r\nX-Request-Id: a-1\r\nConnection: keep-alive\r\nX-Server-Timing: 1\r\nContent-Type: a/b"
    yield "many", b"\2POST /a?b HTTP/1.1\r\nHost: a:80\r\n" + many
    yield "HTTP/1.0", b"\2GET /a HTTP/1.0\r\nHost: a\r\nConnection: close"


def _tensors() -> Iterator[tuple[str, bytes]]:
    def with_binary(inputs: list[dict[str, object]], raw: bytes, **members: object) -> bytes:
        head = json.dumps({"inputs": inputs, **members}, separators=(",", ":")).encode()
        return b"%d\n" % len(head) + head + raw

    def entry(datatype: str, shape: list[int], size: int | None = None, **members: object) -> dict[str, object]:
        made: dict[str, object] = {"name": "x", "shape": shape, "datatype": datatype}
        return made | ({} if size is None else {"parameters": {"binary_data_size": size}}) | members

    for datatype, width in {
        "BOOL": 1,
        "UINT8": 1,
        "INT16": 2,
        "UINT32": 4,
        "INT64": 8,
        "FP16": 2,
        "BF16": 2,
        "FP32": 4,
        "FP64": 8,
    }.items():
        yield f"binary {datatype}", with_binary([entry(datatype, [1, 2], 2 * width)], bytes([1, 0]) * width)
        yield f"json {datatype}", b"\n" + json.dumps({"inputs": [entry(datatype, [2], data=[1, 0])]}).encode()
    yield "binary BYTES", with_binary([entry("BYTES", [2], 13)], b"\3\0\0\0abc\2\0\0\0\xff\0")
    yield "json BYTES", b"\n" + json.dumps({"inputs": [entry("BYTES", [2], data=["a", "\u00e9"])]}).encode()
    yield (
        "nested",
        b"\n" + json.dumps({"inputs": [entry("FP32", [2, 2], data=[[1, 2.5], [-3, 1e9]])], "id": "7"}).encode(),
    )
    yield (
        "two",
        with_binary(
            [entry("FP32", [1], 4), entry("UINT8", [3], 3) | {"name": "y"}],
            bytes(7),
            id="a",
            outputs=[{"name": "y", "parameters": {"binary_data": True}}],
        ),
    )
    yield (
        "binary output",
        with_binary([entry("FP32", [1], 4)], b"\0\0\x80\x7f", parameters={"binary_data_output": True}),
    )
    yield "empty", with_binary([entry("INT32", [0, 5], 0)], b"")
    yield "scalar shape", with_binary([entry("INT32", [], 4)], bytes(4))
    yield "huge shape", with_binary([entry("INT8", [2**40, 2**40, 0], 0)], b"")
    yield "raw", b"0\nabcd"


def _json() -> Iterator[tuple[str, bytes]]:
    for index, text in enumerate(
        (
            '{"a": [1, 2.5, -3e-7], "b": {"c": null, "d": true}}',
            "[1e400, NaN, -Infinity]",
            '{"a": 1, "a": 2}',
            '"\\ud800"',
            "[12345678901234567890123]",
            '{"\\u0061": 1, "a:b": "{[\\"]}"}',
            "[" * 99 + "]" * 99,
            "[" * 101 + "]" * 101,
            '"\u00e9\\n\\\\"',
            "",
            " ",
            "0",
            "-0",
            "01",
            "[1,]",
            "{",
            '{"a":{"a":{"a":[]}}}',
            "1e16",
            "0.00001",
            "null",
            "tru",
        )
    ):
        yield f"text {index:02}", text.encode()
    yield "utf 16", '{"a": 1}'.encode("utf-16")
    yield "utf 32", '{"a": 1}'.encode("utf-32-le")
    yield "bom", b'\xef\xbb\xbf{"a": 1}'
    yield "latin", b'"\xe9"'


def _forms() -> Iterator[tuple[str, bytes]]:
    multipart, form = b"multipart/form-data; boundary=b\n", b"application/x-www-form-urlencoded\n"
    part = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\ntext\r\n'
    file = (
        b'--b\r\nContent-Disposition: form-data; name="f"; filename="x.json"\r\n'
        b'Content-Type: application/json\r\n\r\n{"a": 1}\r\n'
    )
    mixed = (
        b'--b\r\nContent-Disposition: form-data; name="m"\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n'
        b"--c\r\n\r\n1\r\n--c\r\n\r\n2\r\n--c--\r\n"
    )
    yield "multipart", multipart + part + file + b"--b--\r\n"
    yield "lf only", multipart + (part + file + b"--b--\r\n").replace(b"\r\n", b"\n")
    yield "mixed", multipart + mixed + b"--b--"
    yield "twice", multipart + part + part + b"--b--\r\n"
    yield "no end", multipart + part
    yield "after the end", multipart + part + b"--b--\r\n" + part
    yield "preamble", multipart + b"text\r\n" + part + b"--b--\r\nepilogue"
    yield "encoded file name", multipart + file.replace(b'filename="x.json"', b"filename*=utf-8''x%20y") + b"--b--"
    yield (
        "transfer encoding",
        multipart + file.replace(b"\r\n\r\n", b"\r\nContent-Transfer-Encoding: base64\r\n\r\n", 1) + b"--b--",
    )
    yield "quoted boundary", multipart.replace(b"=b", b'="b"') + part + b"--b--"
    yield "no boundary", b"multipart/form-data\n" + part
    yield "urlencoded", form + b"a=1&b=%41+%c3%a9&c&=d&%zz=%4"
    yield "urlencoded lines", form + b"a=1\r\nb=2&c=3"
    yield "json", b'application/json\n{"a": [1, 2]}'
    yield "text", b"text/plain; charset=latin-1\n\xe9"
    yield "bytes", b"\n\x00\x01"


def _coding() -> Iterator[tuple[str, bytes]]:
    text = b"text" * 20
    packed = gzip.compress(text, mtime=0)
    yield "gzip", b"gzip\n" + packed
    yield "two members", b"x-gzip\n" + packed * 2
    yield "zlib", b"deflate\n" + zlib.compress(text)
    yield "raw deflate", b"deflate\n" + deflate(text)
    yield "both", b"deflate, gzip\n" + gzip.compress(zlib.compress(text), mtime=0)
    yield "bomb", b"gzip\n" + gzip.compress(bytes(200_000), mtime=0)
    yield "bomb in a bomb", b"gzip, gzip\n" + gzip.compress(gzip.compress(bytes(500_000), mtime=0), mtime=0)
    yield "cut", b"gzip\n" + packed[:-4]
    yield "more", b"gzip\n" + packed + b"more"
    yield "other", b"br\nabc"
    yield "none", b"identity\nabc"


def _configs() -> Iterator[tuple[str, bytes]]:
    yield (
        "plain",
        b"minWorkers: 1\nmaxWorkers: 2\nbatchSize: 4\nmaxBatchDelay: 50\nresponseTimeout: 120\ndeviceType: cpu\n",
    )
    yield "own keys", b"precision: bf16\nminBatch: 2\naudit: 1%\ninput:\n  - {name: x, shape: [3, 4], dtype: float32}\n"
    yield "handler", b"handler:\n  words: [a, b]\n  deep: {er: {still: 1}}\ntorchrun:\n  nproc-per-node: 2\n"
    yield "aliases", b"a: &a [1, 2]\nb: *a\nc: {<<: {d: 1}, e: *a}\n"
    yield "bomb", b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c]\n" % (c, c, c - 1, c - 1) for c in range(98, 122))
    yield "circle", b"a: &a [*a]\n"
    yield "tag", b"a: !!python/object/apply:os.system ['true']\n"
    yield (
        "types",
        b"batchSize: '4'\nminWorkers: 1.5\nmaxWorkers: -1\ndate: 2001-01-01\nhex: 0x10\nnan: .nan\nb: !!binary aGk=\n",
    )
    yield "documents", b"a: 1\n---\nb: 2\n"
    yield "utf 16", "batchSize: 2\n".encode("utf-16")
    yield "manifest", manifest()
    yield (
        "manifest with odd values",
        b'{"runtime": 3, "model": {"modelName": ["a"], "modelVersion": 1.10, "handler": null, "extraFiles": "a,b"}}',
    )
    yield "deep manifest", b'{"model":' * 40 + b"1" + b"}" * 40


def _frames() -> Iterator[tuple[str, bytes]]:
    """See tests/native/frame_input.h and csrc/frame.h."""

    def frame(kind: int, batch: int, heads: list[bytes], rest: bytes = b"", **other: int) -> bytes:
        size = other.get("size", sum(map(len, heads)) + len(rest))
        head = struct.pack(
            "<IHHQIIQ",
            other.get("magic", 0x57565350),
            other.get("version", 1),
            kind,
            batch,
            other.get("count", len(heads)),
            other.get("flags", 0),
            size,
        )
        return head + b"".join(heads) + rest

    def item(ticket: int, head: int, body: int, offset: int = 2**64 - 1) -> bytes:
        return struct.pack("<QIIQQ", ticket, 0, head, body, offset)

    def answer(ticket: int, kind: int, head: int, body: int, offset: int = 2**64 - 1) -> bytes:
        return struct.pack("<QHHIQQ", ticket, kind, 200, head, body, offset)

    batch, answers = 1, 16
    two = frame(batch, 1, [item(1, 1, 2), item(2, 1, 9, offset=4096)], b"hbbH")
    for reader in range(3):
        name, begin = ("buffer", "channel", "lane")[reader], bytes([reader, 40])
        yield f"{name} nothing", begin
        yield f"{name} batch", begin + two + two
        yield f"{name} no frame", begin + bytes(40)
        yield f"{name} cut", begin + two[:-3]
        yield f"{name} too large", begin + frame(answers, 1, [], size=2**31)
        yield f"{name} too many", begin + frame(answers, 1, [], count=2**17)
        yield f"{name} large and late", begin + frame(batch, 1, [item(1, 0, 5000)], bytes(5000)) + two
    yield "channel control", b"\1\7" + two + frame(2, 0, [], struct.pack("<Q", 2)) + frame(4, 0, []) + frame(3, 0, [])
    yield "channel beyond the memory", b"\1\xff" + frame(batch, 1, [item(1, 0, 4096, offset=8000)])
    for number in (0, 1):
        both = frame(answers, number, [answer(0, 0, 1, 2), answer(1, 1, 1, 1)], b"hbbHb")
        yield f"lane answers {number}", b"\2\xff" + both
        yield f"lane answers twice {number}", b"\2\xff" + both + both
        yield (
            f"lane one by one {number}",
            b"\2\5" + frame(answers, number, [answer(1, 0, 0, 0)]) + frame(answers, number, [answer(0, 0, 0, 0)]),
        )
        stream = frame(answers, number, [answer(0, 2, 0, 3)], b"abc") + frame(
            answers, number, [answer(0, 3, 0, 1)], b"d"
        )
        yield f"lane stream {number}", b"\2\x20" + stream
        yield (
            f"lane memory {number}",
            b"\2\xff" + frame(answers, number, [answer(0, 0, 0, 100, offset=4096), answer(1, 0, 0, 50, offset=8190)]),
        )
        yield f"lane another's ticket {number}", b"\2\xff" + frame(answers, number, [answer(2, 0, 0, 0)])


def _ring_frame(kind: int, ticket: int, head: bytes = b"", body: bytes = b"", **other: int) -> bytes:
    """See csrc/front_ring.h."""
    parts = struct.pack(
        "<IHHQIIQ", other.get("magic", 0x46565350), kind, other.get("flags", 0), ticket,
        other.get("head_size", len(head)), other.get("body_size", len(body)), other.get("total", len(body)),
    ) + head + body  # fmt: skip
    return parts + bytes(-len(parts) % 8)


def _fronts() -> Iterator[tuple[str, bytes]]:
    """See tests/fuzz/fronts_target.py and csrc/front_ring.h."""
    frame = _ring_frame

    plain = struct.pack("<QQBB", 1, 60, 0, 1) + b"id\n127.0.0.1:1\n"
    came = plain + b"POST /predictions/m HTTP/1.1\r\nHost: a\r\n\r\n"
    known = plain + b"POST\n/predictions/m\n\nHost\na"
    numbers = struct.pack("<4f", 1, 2, 3, 4)

    def row(ticket: int, generation: int = 3, route: int = 0, item: bytes = numbers, head: bytes = came) -> bytes:
        return frame(7, ticket, struct.pack("<QQ", generation, route) + head, item)

    yield "nothing", b"\0"
    yield "request", b"\0" + frame(1, 1, known, b"body")
    yield "request as it came", b"\0" + frame(1, 1, came, b"body")
    yield "two of a number", b"\2" + frame(1, 1, known) + frame(1, 1, known)
    yield "row", b"\4" + row(1)
    yield "rows", b"\4" + b"".join(map(row, range(1, 9)))
    yield "too many rows", b"\0" + b"".join(map(row, range(1, 12)))
    yield "row of another table", b"\4" + row(1, generation=2) + row(2, route=9)
    yield "row of another size", b"\0" + row(1, item=numbers[:-1])
    yield "row with no head", b"\0" + frame(7, 1, b"", numbers)
    yield "row with half a head", b"\0" + frame(7, 1, bytes(20), numbers)
    yield "row in pieces", b"\0" + frame(7, 1, struct.pack("<QQ", 3, 0) + came, numbers[:8], total=16)
    yield "row cancelled", b"\0" + row(1) + frame(2, 1) + row(1) + frame(2, 2)
    yield "row and request of a number", b"\2" + row(1) + frame(1, 1, known)
    yield "body in pieces", b"\0" + frame(1, 1, known, b"1234", total=8) + frame(0, 1, b"", b"5678")
    yield "piece of nothing", b"\0" + frame(0, 1, b"", b"5678")
    yield "counts", b"\0" + frame(3, 5, flags=400) + frame(4, 7) + frame(5, 0) + frame(6, 0)
    counts = [0] * 20
    yield "times", b"\0" + frame(8, 0, b"", json.dumps(["m", "1.0", [counts, 0.5], [counts, 0]]).encode())
    yield "beyond the end", b"\1" + struct.pack("<Q", 2**63) + row(1)
    yield "unknown kind", b"\0" + frame(60, 1)
    yield "sizes", b"\0" + frame(1, 1, known, head_size=2**32 - 1, body_size=2**32 - 1, total=2**64 - 1)


def _answers() -> Iterator[tuple[str, bytes]]:
    """See tests/fuzz/answers_target.py."""
    frame, first = _ring_frame, 1 << 62
    one = struct.pack("<f", 1)

    def row(number: int, head: bytes = b"f1", body: bytes = one, **other: int) -> bytes:
        return frame(26, first + number, head, body, flags=200, **other)

    yield "nothing", b"\0"
    yield "row", b"\0" + row(0)
    yield "rows", b"\0" + b"".join(map(row, range(4)))
    yield "row of the last", b"\0" + row(3) + row(3)
    yield "row of nobody", b"\0" + row(4) + row(-1) + frame(26, 1, b"f1", one)
    yield "row of one that has gone", b"\2" + row(0) + row(1)
    yield "row of another size", b"\0" + row(0, b"f2") + row(1, b"q") + row(2, b"f0", b"")
    yield "row of no kind", b"\0" + row(0, b"") + row(1, b"x1") + row(2, b"f1,") + row(3, b"f-1")
    yield "row that has no words", b"\0" + row(0, body=struct.pack("<f", math.nan)) + row(1, body=b"\0\0\x80\x7f")
    yield "row in pieces", b"\0" + row(0, b"f2", one, total=8) + frame(0, first, b"", one)
    yield "row with a long head", b"\0" + row(0, b"f" + b"1" * 100)
    yield "row of many numbers", b"\0" + row(0, b"f500", one * 500) + row(1, b"d250", one * 500)
    yield "again", b"\0" + frame(27, first) + frame(27, first + 1, flags=1) + row(0)
    yield "answer", b"\0" + frame(17, first, b"{}", b"x", flags=503) + frame(20, first + 1) + frame(25, 0)
    yield "rubbish behind a row", b"\0" + row(0) + row(1) + frame(26, 1, magic=1)
    yield "beyond the end", b"\1" + struct.pack("<Q", 2**63) + row(0)
    yield "sizes", b"\0" + row(0, head_size=2**32 - 1, body_size=2**32 - 1, total=2**64 - 1)


if __name__ == "__main__":
    main()
