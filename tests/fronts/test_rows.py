"""What a front end decodes and encodes itself is bit by bit what the endpoints make of it; else it leaves it alone."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import time
from typing import Any

import pytest
import torch

from handlers.tensor_spec import TensorSpec
from pyserve import _front
from pyserve.errors import ServeError
from pyserve.fronts.infer import _HERE
from pyserve.fronts.outputs import AS_TEXT, Output, Row
from pyserve.fronts.rows import Table
from pyserve.request.json_body import NotJsonError, parse_json
from pyserve.request.messages import Request
from tests.support.serving import SEED

KINDS = {
    "float32": "f", "float64": "d", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "uint8": "B", "uint16": "H",
    "uint32": "I",
}  # fmt: skip
NUMBERS = [
    "0", "-0", "-0.0", "1", "-1", "1.5", "1e2", "1E+2", "1e-7", "127", "128", "-128", "-129", "255", "256", "65536",
    "2147483648", "-2147483649", "4294967295", "4294967296", "999999999999999999", "9223372036854775807",
    "9223372036854775808", "-9223372036854775809", "16777217", "0.1", "3.4028235e38", "3.4028236e38", "1e39", "1e308",
    "1e400", "-1e400", "5e-324", "1e-400", "1.", ".5", "01", "+1", "1e", "--1", "NaN", "Infinity", "true", "null",
    '"1"', "0x10", "1_0", "123456789012345678901234567890", "0." + "1" * 60, "1" + "0" * 25 + ".0", "[]", "{}", "",
]  # fmt: skip
ENTRY = {
    "name": "m", "version": "1.0", "is_default": True, "kind": "f", "shape": [2], "size": 8, "takes_json": True,
    "input": "", "datatype": "FP32", "output": "output0",
}  # fmt: skip
ITEM = struct.pack("<2f", 1.0, 2.5)


def wanted(text: bytes, spec: TensorSpec) -> bytes | None:
    """What a handler gets of it; None if it is refused."""
    try:
        value = parse_json(text)
        if not isinstance(value, (list, int, float)):
            return None
        return spec.read_nested(value).contiguous().view(torch.uint8).numpy().tobytes()
    except (ServeError, NotJsonError):
        return None


def spelled(rng: random.Random, shape: list[int]) -> str:
    if not shape:
        return rng.choice(NUMBERS) if rng.random() < 0.1 else str(rng.choice([rng.randint(-9, 9), rng.random()]))
    count = shape[0] + (rng.choice((-1, 1)) if rng.random() < 0.02 else 0)
    blank = rng.choice(("", "", " ", "\n", "\t ", "\r"))
    return f"[{blank}" + f"{blank},{blank}".join(spelled(rng, shape[1:]) for _ in range(count)) + f"{blank}]"


@pytest.mark.parametrize("dtype", KINDS)
def test_numbers_become_what_the_handler_makes_of_them(dtype: str) -> None:
    rng = random.Random(SEED)
    taken = 0
    for shape in ([3], [1], [2, 2], [1, 3, 2]):
        spec = TensorSpec(dtype, tuple(shape))
        for _ in range(250):
            text = spelled(rng, shape).encode()
            text = (
                rng.choice((b"", b"", b" ", b"\xef\xbb\xbf", b"x")) + text + rng.choice((b"", b"", b"\n", b",", b"]"))
            )
            item = _front.read_item(text, KINDS[dtype], shape)
            if item is not None:
                taken += 1
                assert item == wanted(text, spec), text
    assert taken > 20


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("dtype", KINDS)
def test_each_number(dtype: str, number: str) -> None:
    text, spec = f"[{number}]".encode(), TensorSpec(dtype, (1,))
    item = _front.read_item(text, KINDS[dtype], [1])
    assert item is None or item == wanted(text, spec)


def test_plain_items_are_taken() -> None:
    assert _front.read_item(b"[[1, 2], [3, -4.5]]", "f", [2, 2]) == struct.pack("<4f", 1, 2, 3, -4.5)
    assert _front.read_item(b" [255]\n", "B", [1]) == b"\xff"


@pytest.mark.parametrize("shape", [[0], [-1], [2**50], [2**33, 2**33]])
def test_shapes_that_no_item_has_are_refused(shape: list[int]) -> None:
    with pytest.raises(ValueError, match="shape"):
        _front.read_item(b"[]", "f", shape)


def test_cut_texts_are_no_items() -> None:
    text = b"[[1.5, 2], [3e2, -4]]"
    for end in range(len(text)):
        assert _front.read_item(text[:end], "f", [2, 2]) is None


def table(**changes: Any) -> Table:
    return Table(json.dumps({"generation": 7, "entries": [{**ENTRY, **changes}]}).encode(), 1000)


def row_of(path: str, body: bytes, *headers: tuple[str, str], method: str = "POST", **changes: Any) -> Row | None:
    path, _, query = path.partition("?")
    return table(**changes).row_of(Request(method, path, query=query, headers=list(headers), body=bytearray(body)))


RAW = ("Content-Type", "application/octet-stream")
JSON = ("Content-Type", "application/json")


def test_what_crosses_as_a_tensor() -> None:
    for headers, body in (
        ((RAW,), ITEM), ((), ITEM), ((JSON,), b"[1, 2.5]"), ((RAW, ("Accept", "a/b")), ITEM),
        ((JSON,), b'{"data": [1, 2.5]}'), ((JSON,), b' {\n"data"\t:\r[1, 2.5] } '),
    ):  # fmt: skip
        row = row_of("/predictions/m", body, *headers)
        assert row is not None and bytes(row.item) == ITEM
    row = row_of("/predictions/m", b'{"x.1": [1, 2.5]}', JSON, input="x.1")
    assert row is not None and bytes(row.item) == ITEM
    for body in (b'{"instances": [[1, 2.5]]}', b' { "instances" : [ [1, 2.5] ] } '):
        row = row_of("/v1/models/m:predict", body)
        assert row is not None and bytes(row.item) == ITEM


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/predictions/n", ITEM, (RAW,)),
        ("/predictions/m/1.0", ITEM, (RAW,)),
        ("/predictions/m?a=b", ITEM, (RAW,)),
        ("/predictions/m", ITEM[:-1], (RAW,)),
        ("/predictions/m", b"", (RAW,)),
        ("/predictions/m", b"[1,2,34]", (RAW,)),
        ("/predictions/m", b"[1]", (JSON,)),
        ("/predictions/m", b'{"x": [1, 2]}', (JSON,)),
        ("/predictions/m", b'{"data": [1, 2], "data": [1, 2]}', (JSON,)),
        ("/predictions/m", b'{"data": [1, 2]}}', (JSON,)),
        ("/predictions/m", b'{"data": [1, 2]', (JSON,)),
        ("/predictions/m", b'{"data": [1, 2]]}', (JSON,)),
        ("/predictions/m", b'{"data": [1]}', (JSON,)),
        ("/predictions/m", b'{"data": [1, 2]}\x0c', (JSON,)),
        ("/predictions/m", b'\x0c{"data": [1, 2]}', (JSON,)),
        ("/predictions/m", b'\xef\xbb\xbf{"data": [1, 2]}', (JSON,)),
        ("/v1/models/m:predict", b'{"instances": [[1, 2], [1, 2]]}', ()),
        ("/v1/models/m:predict", b'{"instances": [1, 2]}', ()),
        ("/v1/models/m:predict", b'{"instances": [[1, 2]], "id": 1}', ()),
        ("/v1/models/m:predict", b'{"instances": [[1, 2]]}', (("Content-Encoding", "gzip"),)),
        ("/v1/models/m:explain", b'{"instances": [[1, 2]]}', ()),
        ("/predictions/m", ITEM, (("Content-Type", "text/plain"),)),
        ("/predictions/m", ITEM, (("Content-Type", "multipart/form-data"),)),
        ("/predictions/m", ITEM, (RAW, ("Content-Encoding", "gzip"))),
        ("/predictions/m", ITEM, (RAW, ("x-request-timeout-ms", "5"))),
        ("/predictions/m", ITEM, (RAW, ("x-request-timeout-ms", "soon"))),
        ("/predictions/m", ITEM, (RAW, ("x-request-timeout-ms", ""))),
        ("/predictions/m", ITEM, (RAW, ("x-request-timeout-ms", "5"), ("X-Server-Timing", "0"))),
        ("/predictions/m", ITEM, (RAW, ("x-server-timing", "1"))),
        ("/predictions/m", ITEM, (RAW, ("Accept", "text/event-stream"))),
        ("/predictions/m", ITEM, (("Content-Type", "a/b+json"), ("Accept", "application/json"))),
    ],
)
def test_what_goes_as_it_is(path: str, body: bytes, headers: tuple[tuple[str, str], ...]) -> None:
    assert row_of(path, body, *headers) is None


def test_other_methods_and_json_that_is_not_decoded_go_as_they_are() -> None:
    assert row_of("/predictions/m", ITEM, RAW, method="PUT") is None
    assert row_of("/predictions/m", b"[1, 2]", JSON, takes_json=False) is None


def binary(head: Any, body: bytes = ITEM) -> tuple[bytes, tuple[str, str]]:
    text = json.dumps(head).encode()
    return text + body, ("Inference-Header-Content-Length", str(len(text)))


INPUT = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}


def test_binary_requests_of_the_protocol() -> None:
    body, size = binary({"id": "a", "inputs": [INPUT], "outputs": [{"name": "output0", "parameters": {}}]})
    row = row_of("/v2/models/m/infer", body, size)
    assert row is not None and bytes(row.item) == ITEM
    answer = row.encode(table().output(b"f2"), ITEM)
    assert answer is not None and json.loads(answer.body)["outputs"][0]["data"] == [1.0, 2.5]


@pytest.mark.parametrize(
    "head",
    [
        {"inputs": [{**INPUT, "shape": [2, 2]}]},
        {"inputs": [{**INPUT, "shape": [True, 2]}]},
        {"inputs": [{**INPUT, "datatype": "FP64"}]},
        {"inputs": [{**INPUT, "parameters": {"binary_data_size": 8.0}}]},
        {"inputs": [{**INPUT, "more": 1}]},
        {"inputs": [INPUT, INPUT]},
        {"inputs": []},
        {"inputs": [INPUT], "outputs": [{"name": "other"}]},
        {"inputs": [INPUT], "parameters": {"sequence_id": 4}},
        {"inputs": [INPUT], "id": 5},
        [INPUT],
    ],
)
def test_binary_requests_that_go_as_they_are(head: Any) -> None:
    body, size = binary(head)
    assert row_of("/v2/models/m/infer", body, size) is None


def test_a_name_that_the_model_gives_its_input_must_be_said() -> None:
    body, size = binary({"inputs": [INPUT]})
    assert row_of("/v2/models/m/infer", body, size, input="x") is not None
    assert row_of("/v2/models/m/infer", body, size, input="y") is None


def test_answers_in_both_forms() -> None:
    known = table()
    row = known.row_of(Request("POST", "/predictions/m", headers=[JSON], body=bytearray(b"[1, 2.5]")))
    assert row is not None
    answer = row.encode(known.output(b"f1,2"), ITEM)
    assert answer is not None and answer.content_type == "application/json" and json.loads(answer.body) == [[1.0, 2.5]]
    raw = known.row_of(Request("POST", "/predictions/m", headers=[RAW], body=bytearray(ITEM)))
    assert raw is not None
    answer = raw.encode(known.output(b"f2"), ITEM)
    assert answer is not None and dict(answer.headers) == {"x-tensor-dtype": "float32", "x-tensor-shape": "2"}


def test_json_of_odd_numbers_is_made_elsewhere() -> None:
    known = table()
    request = Request("POST", "/predictions/m", headers=[JSON], body=bytearray(b"[1, 2.5]"))
    row = known.row_of(request)
    assert row is not None and row.encode(known.output(b"f1"), struct.pack("<f", float("nan"))) is None
    assert row.form == AS_TEXT  # by which the engine knows


def test_answers_over_the_limit_are_made_elsewhere() -> None:
    known = Table(json.dumps({"generation": 7, "entries": [ENTRY]}).encode(), 10)
    row = known.row_of(Request("POST", "/predictions/m", headers=[JSON], body=bytearray(b"[1, 2.5]")))
    assert row is not None and row.encode(known.output(b"f2"), ITEM) is None


@pytest.mark.parametrize("head", [b"", b"x2", b"f2,", b"f-1", b"fa", "f2é".encode()])
def test_heads_that_no_engine_writes(head: bytes) -> None:
    with pytest.raises(ValueError, match=r"int|unknown|literal|ascii|output"):
        Output.read(head)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_row_of_another_size_than_its_head_says(count: int) -> None:
    with pytest.raises(ValueError, match="size"):
        Output.read(b"f2").values(bytes(4 * count))


def infer(**changes: Any) -> bytes:
    """A request in JSON; @ stands where the numbers are to be, which are put there."""
    entry = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": "@", **changes.pop("entry", {})}
    return json.dumps({"inputs": [entry], **changes}).encode().replace(b'"@"', b"[1, 2.5]")


@pytest.mark.parametrize(
    "body",
    [infer(), infer(id="a"), infer(outputs=[{"name": "output0"}]), infer().replace(b"[1, 2.5]", b"[[1, 2.5]]"),
     b" \n" + infer(), infer(entry={"name": "data"}), infer(id="data")],
)  # fmt: skip
def test_requests_of_the_protocol_in_json(body: bytes) -> None:
    row = row_of("/v2/models/m/infer", body)
    assert row is not None and bytes(row.item) == ITEM
    answer = row.encode(table().output(b"f2"), ITEM)
    assert answer is not None and json.loads(answer.body)["outputs"][0]["data"] == [1.0, 2.5]


@pytest.mark.parametrize(
    "body",
    [
        infer(entry={"shape": [2, 1]}),
        infer(entry={"shape": [2]}),
        infer(entry={"datatype": "FP64"}),
        infer(entry={"parameters": {}}),
        infer(entry={"parameters": {"binary_data_size": 8}}),
        infer(entry={"data": [1, 2, 3]}),
        infer(entry={"data": None}),
        infer(entry={"data": None}, parameters={"data": "@"}),
        infer(entry={"data": None}, data="@"),
        infer(id='"data": [3, 4]'),
        infer(entry={"data": None}, outputs=[{"name": "output0", "parameters": {"data": "@"}}]),
        infer().replace(b'"data"', b'"data": [3, 4], "data"'),
        infer().replace(b"[1, 2.5]", b'[1, 2.5], "data": [3, 4]'),
        infer().replace(b"[1, 2.5]", b"[1, 2.5]]"),
        infer().replace(b"[1, 2.5]", b"[1, 2.5"),
        infer().replace(b"[1, 2.5]", b"[[1], [2.5]]"),
        infer()[:-1],
        infer() + b"}",
        b"\x0b" + infer(),
        b"[" + infer() + b"]",
        infer(model_name="m"),
        infer(id="x" * 2000),
        b" " * 65 + infer(),
    ],
)
def test_requests_in_json_that_go_as_they_are(body: bytes) -> None:
    assert row_of("/v2/models/m/infer", body) is None


def test_nobody_can_send_the_word_that_stands_for_the_numbers() -> None:
    """Not even one who has read it: it makes a body's own list of numbers the data, or none."""
    word = f'"{_HERE}"'.encode()
    assert row_of("/v2/models/m/infer", infer().replace(b"[1, 2.5]", word)) is None
    smuggled = infer(entry={"data": None}, id="@").replace(b"null", word).replace(b'"id": [1', b'"data": [1')
    assert row_of("/v2/models/m/infer", smuggled) is None
    body, size = binary({"inputs": [{**INPUT, "data": _HERE}]})
    assert row_of("/v2/models/m/infer", body, size) is None


KEY = {"digest": hashlib.sha256(b"secret").hexdigest(), "expires_at": None}


@pytest.mark.parametrize(
    ("authorization", "changes", "crosses"),
    [
        ("Bearer secret", {}, True), ("bearer  secret ", {}, True), ("Bearer secre", {}, False), ("secret", {}, False),
        ("", {}, False), ("Bearer secret x", {}, False), ("Bearer s\xe9cret", {}, False),
        ("Bearer secret", {"expires_at": time.time() - 1}, False), ("Bearer secret", {"expires_at": 1e12}, True),
    ],
)  # fmt: skip
def test_requests_that_show_the_key(authorization: str, changes: dict[str, Any], crosses: bool) -> None:
    told = {"generation": 7, "entries": [ENTRY], "key": {**KEY, **changes}}
    request = Request("POST", "/predictions/m", headers=[RAW, ("Authorization", authorization)], body=bytearray(ITEM))
    assert (Table(json.dumps(told).encode(), 1000).row_of(request) is not None) == crosses


def test_times_are_told_once() -> None:
    known = table()
    row = known.row_of(Request("POST", "/predictions/m", headers=[JSON], body=bytearray(b"[1, 2.5]")))
    assert row is not None and row.times is not None and not list(known.take_times())
    row.times.note_decoded(0.5), row.times.note_decoded(0.1), row.times.note_encoded(0.25)
    [(name, version, told)] = known.take_times()
    assert (name, version) == ("m", "1.0") and told.preprocess.histogram()[2] == 0.6
    assert sum(told.preprocess.histogram()[1]) == 2 and sum(told.postprocess.histogram()[1]) == 1
    assert not list(known.take_times())
    raw = known.row_of(Request("POST", "/predictions/m", headers=[RAW], body=bytearray(ITEM)))
    assert raw is not None and raw.times is None


@pytest.mark.parametrize("begin", [0, 1, 5, 8, 9, 2**40])
def test_an_item_within_a_text(begin: int) -> None:
    text = b"x[1, 2.5]y[1, 2.5]"
    wanted = {1: (ITEM, 9)}.get(begin)
    assert _front.read_item_at(text, begin, "f", [2]) == wanted
    assert _front.read_item_at(text, begin, "f", [2**30]) is None  # and no memory is taken for it
