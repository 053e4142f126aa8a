"""The table of targets written in Python; the one in C++ is tests/fuzz/frame_fuzz.cpp."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    """One target.

    Attributes:
        name: of its folder in ``corpus/``, and of its module ``NAME_target``, whose ``check(data)`` raises what is
            wrong.
        size_max: of an input, in bytes.
        mutation_count: of the inputs that `make test` makes of the corpus; such that they take a second or two.
        words: what inputs are made of, beside the corpus.
    """

    name: str
    size_max: int
    mutation_count: int
    words: tuple[bytes, ...] = ()

    @property
    def corpus(self) -> list[Path]:
        """The inputs that are checked in, in order of their names."""
        return sorted(path for path in (CORPUS / self.name).iterdir() if path.is_file())

    def load(self) -> Callable[[bytes], None]:
        """Imports the target, and all that it tries."""
        check: Callable[[bytes], None] = importlib.import_module(f"tests.fuzz.{self.name}_target").check
        return check


_HTTP_WORDS = (
    b"GET / HTTP/1.1\r\n", b"POST /x HTTP/1.1\r\n", b"HEAD / HTTP/1.0\r\n", b"OPTIONS * HTTP/1.1\r\n", b"\r\n\r\n",
    b"\r\n", b"\n", b"Host: a\r\n", b"Content-Length: 5\r\n", b"Content-Length: 0\r\n",
    b"content-length:18446744073709551615", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n",
    b"Connection: keep-alive\r\n", b"0\r\n\r\n", b"5\r\nhello\r\n", b"ffffffffffffffff\r\n", b";a=\"b\"",
    b"http://h:1/", b"%2e%2e%2f", b"%00", b"X-Request-Id: 1\r\n", b"\t", b" ", b":", b"\x80", b"\x00",
)  # fmt: skip
_ZIP_WORDS = (
    b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\7\x08", b"\x01\x00\x10\x00", b"\xff\xff\xff\xff",
    b"\xff\xff", b"MAR-INF/MANIFEST.json", b"../", b"a/", b"\x08\x00", b"\x00\x08", b"\x00\x00\xed\xa1",
)  # fmt: skip
_TAR_WORDS = (
    b"ustar\x0000", b"ustar  \0", b"././@LongLink", b"20 path=a\n", b"30 size=12\n", b"linkpath=", b"GNU.sparse.",
    b"0000644\0", b"MAR-INF/MANIFEST.json", b"../", b"x", b"g", b"L", b"K", b"5", b"2", b"1",
)  # fmt: skip
_TENSOR_WORDS = (
    b'{"inputs":[', b'{"name":"x","shape":[1],"datatype":"FP32","data":[1]}', b'"binary_data_size":',
    b'"parameters":{', b'"BYTES"', b'"BOOL"', b'"UINT8"', b'"INT64"', b'"FP16"', b'"BF16"', b'"FP64"',
    b'"outputs":[', b'"binary_data":true', b'"binary_data_output":true', b'"id":', b"null", b"-1", b"1e999",
    b"9223372036854775807", b"[[", b"]]", b"NaN", b"\n",
)  # fmt: skip
_JSON_WORDS = (
    b"{", b"}", b"[", b"]", b'"', b"\\u", b"\\ud800", b"\\", b":", b",", b"null", b"true", b"NaN", b"Infinity",
    b"-0", b"1e5", b"1E400", b"18446744073709551616", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"0.00001",
    b"\xed\xa0\x80", b'{"a":1,"a":2}',
)  # fmt: skip
_FORM_WORDS = (
    b"multipart/form-data; boundary=b\n", b"application/x-www-form-urlencoded\n", b"--b\r\n", b"\r\n--b--\r\n",
    b"--b", b"--", b'Content-Disposition: form-data; name="a"\r\n', b'; filename="f"', b"; filename*=utf-8''f",
    b"Content-Type: ", b"multipart/mixed; boundary=c", b"--c", b"Content-Transfer-Encoding: base64\r\n", b"\r\n\r\n",
    b"\n", b"a=b&", b"%41", b"%", b"+", b"=", b"&", b";", b'"', b"\\",
)  # fmt: skip
_CONFIG_WORDS = (
    b"batchSize: 4\n", b"minWorkers: 1\n", b"handler:\n", b"torchScript: true\n", b"- ", b": ", b"&a ", b"*a",
    b"<<: ", b"!!python/", b"? ", b"|\n", b"{", b"}", b"[", b"]", b"'", b'"', b"#", b"\t", b"---\n", b"1e9", b"0x",
    b"~", b"null", b"2001-01-01",
)  # fmt: skip

_FRONT_WORDS = (
    b"PSVF", b"PSVF\7\0", b"PSVF\1\0", b"PSVF\2\0", b"PSVF\0\0", b"PSVF\x08\0", b"\3\0\0\0\0\0\0\0",
    b"\x10\0\0\0\0\0\0\0", b"\x10\0\0\0", b"id\nunix\n", b"POST / HTTP/1.1\r\n\r\n", b"x-request-timeout-ms: 1\r\n",
    b"POST\n/\n\n", b'["m","1.0",[[],0],[[],0]]', b"\n", b"\r\n\r\n",
)  # fmt: skip
_ANSWER_WORDS = (
    b"PSVF", b"PSVF\x1a\0", b"PSVF\x1b\0", b"PSVF\x11\0", b"PSVF\0\0", b"\0\0\0\0\0\0\0\x40", b"\1\0\0\0\0\0\0\x40",
    b"\2\0\0\0\4\0\0\0\4\0\0\0\0\0\0\0", b"f1", b"d1", b"i1,1", b"h2", b"?", b",", b"\0\0\x80\x3f",
)  # fmt: skip

TARGETS = {
    target.name: target
    for target in (
        Target("zip", 8192, 1200, _ZIP_WORDS),
        Target("tar", 16384, 400, _TAR_WORDS),
        Target("http1", 4096, 2000, _HTTP_WORDS),
        Target("heads", 2048, 20000, _HTTP_WORDS),
        Target("tensors", 4096, 4000, _TENSOR_WORDS),
        Target("json", 2048, 6000, _JSON_WORDS),
        Target("forms", 2048, 6000, _FORM_WORDS),
        Target("coding", 2048, 4000),
        Target("model_config", 2048, 1500, _CONFIG_WORDS),
        Target("fronts", 4096, 1000, _FRONT_WORDS),
        Target("answers", 4096, 3000, _ANSWER_WORDS),
    )
}
