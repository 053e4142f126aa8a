"""Requests at random, right ones and faulty ones of many kinds, to compare what two servers make of them."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

# name -> struct letter of its kind, shape of an item.
MODELS: dict[str, tuple[str, tuple[int, ...]]] = {
    "linear": ("f", (4,)),
    "whole": ("q", (2, 3)),
    "bytes": ("B", (5,)),
    "double": ("d", (2,)),
    "single": ("f", (1,)),
    "scalar": ("f", (3,)),
    "half": ("f", (4,)),
    "pair": ("f", (4,)),
    "odd": ("f", (4,)),
    "bounded": ("f", (4,)),
    "free": ("f", (4,)),
    "named": ("f", (4,)),
    "large": ("f", (3000,)),
    "wide": ("f", (200_000,)),
}
# Of more numbers texts are not made: they take long, and show nothing new.
TEXT_COUNT_MAX = 3000
DATATYPES = {"f": "FP32", "q": "INT64", "B": "UINT8", "d": "FP64"}
NUMBERS = [
    "0", "-0", "-0.0", "1e400", "-1e400", "1e39", "1e-400", "NaN", "Infinity", "-Infinity", "true", "null", '"1"',
    "9223372036854775808", "123456789012345678901234567890", "1.", ".5", "01", "+1", "1e", "256", "-1", "2.0", "[]",
    "{}", "", "16777217", "0.1", "3.4028236e38", "5e-324", "1E2",
]  # fmt: skip
TYPES = [
    "application/json", "application/json; charset=utf-8", "APPLICATION/JSON", "application/octet-stream", None,
    "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b", "application/vnd.a+json",
    "image/jpeg", "application/jsonlines", "", "a", "multipart/form-data",
]  # fmt: skip
ACCEPTS = [
    None, None, None, "*/*", "application/json", "application/octet-stream", "text/event-stream",
    "application/json;q=0.5, application/octet-stream", "application/octet-stream;q=x", "application/json, */*;q=0.1",
]  # fmt: skip


class Odd(NamedTuple):
    """One request."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes


class OddRequests:
    """Args:
        seed: the same requests for the same seed.
    """  # fmt: skip

    def __init__(self, seed: int):
        self._rng = random.Random(seed)

    def take(self, count: int) -> Iterator[Odd]:
        """So many of them."""
        for _ in range(count):
            make = self._rng.choice((
                self._raw, self._json, self._json, self._binary, self._binary, self._infer_json, self._infer_json,
                self._instances,
            ))  # fmt: skip
            request = make()
            if self._rng.random() < 0.08:
                request = self._changed(request)
            yield request

    def _model(self, count_max: int = TEXT_COUNT_MAX) -> tuple[str, str, tuple[int, ...]]:
        name = self._rng.choice([name for name, (_, shape) in MODELS.items() if math.prod(shape) <= count_max])
        return name, *MODELS[name]

    def _target(self, name: str) -> str:
        rng = self._rng
        shown = name
        if rng.random() < 0.1:
            shown = rng.choice(("nobody", "%6c" + name[1:], name.upper(), name + "%20", name + "%2F1.0", "a%00b", ".."))
        version = rng.choice(("", "", "", "", "/1.0", "/2.0", "/9", "/1.0/x", "/", "/default"))
        return f"/predictions/{shown}{version}{rng.choice(('', '', '', '', '?a=b', '?', '?data=1'))}"

    def _numbers(self, kind: str, shape: tuple[int, ...]) -> bytes:
        numbers = torch.Size(shape).numel()
        rng = self._rng
        if numbers > TEXT_COUNT_MAX:
            values: list[Any] = [rng.uniform(-9, 9)] * numbers
        elif kind in "fd":
            values = [rng.choice((rng.uniform(-9, 9), 0.5, -1.0, 1e30)) for _ in range(numbers)]
        else:
            values = [rng.randint(0, 200) for _ in range(numbers)]
        body = struct.pack(f"<{numbers}{kind}", *values)
        if rng.random() < 0.1:
            body = rng.choice(
                (
                    body[:-1],
                    body + b"\0",
                    body * 2,
                    b"",
                    b"[" + body[1:-1] + b"]",
                    b"\xef\xbb\xbf" + body[3:],
                    b"\x89PNG\r\n\x1a\n" + body[8:],
                )
            )
        return body

    def _nested(self, kind: str, shape: tuple[int, ...], odds: float) -> str:
        rng = self._rng
        if not shape:
            if rng.random() < odds:
                return rng.choice(NUMBERS)
            return str(rng.randint(0, 99)) if kind in "qB" or rng.random() < 0.5 else repr(rng.uniform(-9, 9))
        size = shape[0] + (rng.choice((-1, 1)) if rng.random() < odds / 3 else 0)
        comma = rng.choice((",", ", ", " ,\n"))
        return "[" + comma.join(self._nested(kind, shape[1:], odds) for _ in range(size)) + "]"

    def _headers(self, content_type: str | None) -> list[tuple[str, str]]:
        rng = self._rng
        headers = [] if content_type is None else [(rng.choice(("Content-Type", "content-type")), content_type)]
        accept = rng.choice(ACCEPTS)
        if accept is not None:
            headers.append(("Accept", accept))
        if rng.random() < 0.06:
            told = rng.choice(("60000", "86400000", "86400001", "0", "1e3", "", " 50000 ", "50000"))
            headers.append((rng.choice(("x-request-timeout-ms", "X-Request-Timeout-Ms")), told))
        if rng.random() < 0.05:
            headers.append(rng.choice([
                ("x-request-timeout-ms", "60000"), ("x-request-timeout-ms", "soon"), ("Content-Encoding", "gzip"),
                ("Content-Encoding", "identity"), ("Authorization", "Bearer x"), ("x-server-timing", "0"),
                ("Cookie", "a=" + "b" * 200), ("Connection", "keep-alive"),
            ]))  # fmt: skip
        return headers

    def _raw(self) -> Odd:
        name, kind, shape = self._model(10**6)
        content_type = self._rng.choice(TYPES) if self._rng.random() < 0.3 else "application/octet-stream"
        return Odd("POST", self._target(name), self._headers(content_type), self._numbers(kind, shape))

    def _json(self) -> Odd:
        rng = self._rng
        name, kind, shape = self._model()
        odds = rng.choice((0, 0, 0, 0.3 / max(1, torch.Size(shape).numel())))
        text = self._nested(kind, shape, odds)
        if rng.random() < 0.4:
            text = rng.choice((
                *[f'{{"data": {text}}}'] * 6, f' {{\n"data"\t:{text} }}\r\n', f'{{"x": {text}}}', f'{{"body": {text}}}',
                f'{{"data": {text}, "y": 1}}', f'{{"data": {text}}}}}', f'{{"data": {text}]', f'{{"data": {text}',
                f'{{"d\\u0061ta": {text}}}', f'{{"data": {{"data": {text}}}}}', '{"data": [[]]}', '{"data": null}',
                f'\x0b{{"data": {text}}}', f'{{"data": {text}}}\x0c',
                f'{{"data": {text}, "data": {text}}}', f'{{"instances": [{text}]}}', f"[{text}]",
                "[" * 300 + "]" * 300, text + "x", text[:-1], "\ufeff" + text, f" {text}\n", '{"a": 1}', "", "null",
                f'{{"inputs": {text}}}',
            ))  # fmt: skip
        content_type = rng.choice(TYPES) if rng.random() < 0.15 else "application/json"
        body = text.encode("utf-16" if rng.random() < 0.02 else "utf-8")
        return Odd("POST", self._target(name), self._headers(content_type), body)

    def _instances(self) -> Odd:
        rng = self._rng
        name, kind, shape = self._model()
        text = self._nested(kind, shape, rng.choice((0, 0, 0.05)))
        body = f'{{"instances": [{text}]}}'
        if rng.random() < 0.4:
            body = rng.choice((
                f'{{"instances": [{text}, {text}]}}', f'{{"instances": {text}}}', '{"instances": []}', "{}", text,
                f'{{"instances": [{text}], "signature_name": "a"}}', f'{{"instances": [{text}], "b": 1}}',
                f' {{ "instances"\n: [ {text} ] }} ', f'{{"instances": [{{"data": {text}}}]}}',
                f'{{"instances": [{{"x": {text}}}]}}', f'{{"instances": [{text}],}}', f'{{"instances": [{text}]}}x',
                f'{{"instances": [{text}], "instances": [{text}]}}', f'\ufeff{{"instances": [{text}]}}',
            ))  # fmt: skip
        path = rng.choice((f"/v1/models/{name}:predict",) * 8 + (f"/v1/models/{name}:explain", f"/v1/models/{name}"))
        return Odd("POST", path, self._headers(rng.choice(("application/json", None, *TYPES))), body.encode())

    def _infer(self, count_max: int = TEXT_COUNT_MAX) -> tuple[str, dict[str, Any], str, tuple[int, ...]]:
        rng = self._rng
        name, kind, shape = self._model(count_max)
        path = f"/v2/models/{name}{rng.choice(('', '', '', '/versions/1.0', '/versions/2.0', '/versions/x'))}/infer"
        rows = rng.choice((1, 1, 1, 2, 0))
        called = rng.choice(("x", "x", "x", "input0", "y", "", "data"))
        entry: dict[str, Any] = {"name": called, "datatype": DATATYPES[kind], "shape": [rows, *shape]}
        head: dict[str, Any] = {"inputs": [entry]}
        if rng.random() < 0.3:
            head["id"] = rng.choice(("abc", "", 5, None, "ä", 'a"data": [1, 2]', "data"))
        if rng.random() < 0.3:
            wanted = rng.choice(({}, {"parameters": {"binary_data": True}}, {"parameters": {"binary_data": 1}}))
            head["outputs"] = [{"name": rng.choice(("output0", "output0", "scores", "none")), **wanted}]
        if rng.random() < 0.3:
            head["parameters"] = rng.choice(({"binary_data_output": True}, {"binary_data_output": "yes"}, {}, None, 3))
        if rng.random() < 0.15:
            entry.update(rng.choice(({"datatype": "FP16"}, {"shape": [1]}, {"shape": [-1]}, {"shape": "x"}, {"z": 1},
                                     {"shape": [True, *shape]}, {"shape": [10**30]})))  # fmt: skip
        return path, head, kind, (rows, *shape)

    def _binary(self) -> Odd:
        rng = self._rng
        path, head, kind, shape = self._infer(10**6)
        body = self._numbers(kind, shape)
        size: Any = rng.choice((len(body),) * 9 + (float(len(body)), str(len(body)), len(body) + 1, -1, True))
        head["inputs"][0]["parameters"] = {"binary_data_size": size}
        text = json.dumps(head).encode()
        told = rng.choice((str(len(text)),) * 12 + (str(len(text) + 1), "0", "x", "-1", f" {len(text)}"))
        headers = [*self._headers(None), ("Inference-Header-Content-Length", told)]
        return Odd("POST", path, headers, text + body)

    def _infer_json(self) -> Odd:
        rng = self._rng
        path, head, kind, shape = self._infer()
        [entry] = head["inputs"]
        told = [(math.prod(shape),), shape, shape, shape[1:]][rng.choice((0, 0, 1, 2, 2, 3))]
        text = self._nested(kind, told, rng.choice((0, 0, 0.01)))
        entry["data"] = "@"
        if rng.random() < 0.1:
            entry.update(rng.choice((
                {"parameters": {}}, {"parameters": {"binary_data_size": 16}}, {"data": [1, 2, 3, 4]},
                {"parameters": {"data": "@"}}, {"data": None},
            )))  # fmt: skip
        if rng.random() < 0.3:
            head["inputs"] = [dict(rng.sample(list(entry.items()), len(entry)))]
        if rng.random() < 0.3:
            head = dict(rng.sample(list(head.items()), len(head)))
        if rng.random() < 0.05:
            head["model_name"] = "linear"
        separators = rng.choice(((",", ":"), (", ", ": "), (" , ", "\n:\t")))
        body = json.dumps(head, separators=separators, ensure_ascii=rng.random() < 0.5)
        if rng.random() < 0.05:
            body = body.replace('"data"', rng.choice(('"d\\u0061ta"', '"data":[1],"data"', '"Data"')), 1)
        body = body.replace('"@"', text)
        if rng.random() < 0.05:
            body = rng.choice((body + " ", body[:-1], body + "}", "\ufeff" + body, " \n" + body, "\x0b" + body))
        return Odd("POST", path, self._headers(rng.choice(("application/json", None, *TYPES))), body.encode())

    def _changed(self, request: Odd) -> Odd:
        rng = self._rng
        if rng.random() < 0.5:
            return request._replace(method=rng.choice(("GET", "PUT", "OPTIONS", "HEAD", "DELETE", "PATCH", "ODD")))
        return request._replace(headers=[*request.headers, *request.headers[:1]])
