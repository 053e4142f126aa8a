"""`pyserve debug`, as a user runs it in a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pyserve.commands import trial as dry_run
from pyserve.commands.cli import main
from pyserve.commands.debug import shown
from tests.support.dry_runs import LIMIT_S, environment, run
from tests.support.handler_archives import TUTORIAL, Doubler, write_handler

BOOM = TUTORIAL.replace("        rows = []\n", '        raise ValueError("boom")\n')
STOPS = TUTORIAL.replace("        rows = []\n", "        rows = []\n        breakpoint()\n")
FIRST_ONLY = "def handle(data, context):\n    return None if data is None else [data[0].get('body')]\n"
STREAMER = """
def handle(data, context):
    if data is not None:
        context.set_response_content_type(0, "text/plain")
        return ([f"part {number}"] for number in range(3))
"""
HEADERS = """
class Headers:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        context.set_response_status(201, "made", 0)
        context.set_response_header(0, "x-mine", "1")
        return [{"row": {k: repr(v) for k, v in data[0].items()}, "explain": context.get_request_header(0, "explain"),
                 "mine": context.get_request_header(0, "X-Mine")}]
"""
REQUEST = b"POST /explanations/m HTTP/1.1\r\nX-Mine: yes\r\nContent-Type: text/plain\r\n\r\nhello"


def line_of(source: str, text: str) -> int:
    return next(number for number, line in enumerate(source.splitlines(), 1) if text in line)


@pytest.mark.slow
@pytest.mark.parametrize("quits", [False, True])
def test_breakpoint_stops_in_the_handler_and_the_debugger_works(tmp_path: Path, quits: bool) -> None:
    archive = write_handler(tmp_path, "m", STOPS, network=Doubler())
    terminal, inside = pty.openpty()
    debugged = subprocess.Popen(
        [sys.executable, "-m", "pyserve", "debug", str(archive), "--json-body", "[1, 2]"], cwd=tmp_path,
        env=environment(tmp_path), stdin=inside, stdout=inside, stderr=inside, start_new_session=True,
    )  # fmt: skip
    os.close(inside)
    # Twelve steps lead out of preprocess and into the line after it.
    through = ["p type(data)", "p len(data)", *["n"] * 9, "p 'out', model_input.tolist()", "c"]
    orders = ["p type(data)", "q"] if quits else through
    text = converse(terminal, orders)
    code = debugged.wait(LIMIT_S)
    os.close(terminal)
    assert f"handler.py({line_of(STOPS, 'breakpoint()') + 1})preprocess()" in text
    assert "<class 'list'>" in text
    assert "pyserve/" not in text, "stepped into the server's own code"
    if quits:
        assert code == 1
        assert "Traceback" not in text and "answer 1" not in text
    else:
        assert code == 0, text
        assert "(Pdb) p len(data)\r\n1\r\n" in text
        assert "('out', [[1.0, 2.0]])" in text
        assert "HTTP/1.1 200" in text


def converse(terminal: int, orders: list[str]) -> str:
    """Gives one order at each prompt; returns all that was shown, at the end of the program."""
    text, answered = "", 0
    deadline = time.monotonic() + LIMIT_S
    while True:
        assert select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0], f"no more came:\n{text}"
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # the other side is closed
            chunk = b""
        if not chunk:
            return text
        text += chunk.decode()
        while text.count("(Pdb) ") > answered and answered < len(orders):
            os.write(terminal, orders[answered].encode() + b"\n")
            answered += 1


@pytest.mark.slow
def test_exception_shows_the_handlers_own_frames_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    archive = write_handler(tmp_path, "m", BOOM, network=Doubler())
    debugged = run(tmp_path, "debug", archive, "--json-body", "[1]", "-n", 2)
    assert debugged.returncode == 1
    assert f"handler.py:{line_of(BOOM, 'boom')} in preprocess" in debugged.stderr
    assert 'raise ValueError("boom")' in debugged.stderr and "ValueError: boom" in debugged.stderr
    assert str(tmp_path) not in debugged.stderr and "Traceback" not in debugged.stderr
    assert "pyserve" not in debugged.stderr, "frames that are not the handler's"
    assert "answers 1 to 2:" in debugged.stdout
    assert '"where": "handler.py:' in debugged.stdout and "HTTP/1.1 503" in debugged.stdout
    assert "again with each request alone" in debugged.stdout


@pytest.mark.slow
def test_stages_say_what_they_got_and_gave(tmp_path: Path) -> None:
    archive = write_handler(tmp_path, "m", TUTORIAL, network=Doubler())
    (tmp_path / "one.json").write_text("[1, 2]")
    (tmp_path / "two.json").write_text("[3, 4]")
    debugged = run(tmp_path, "debug", archive, "-i", "one.json", "-i", "two.json", "-n", 3)
    assert debugged.returncode == 0, debugged.stderr
    lines = [" ".join(line.split()) for line in debugged.stdout.splitlines()]
    assert "request 3: one.json, 6 bytes, content-type: application/json" in lines
    assert "preprocess received list of 3: [{'body': [1, 2]}, {'body': [3, 4]}, {'body': [1, 2]}]" in lines
    assert any(line.startswith("preprocess returned Tensor float32 [3, 2] on cpu") for line in lines)
    assert any(line.startswith("initialize ") and line.endswith("ms") for line in lines)
    assert lines.index("answer 2:") < lines.index("6.0,") < lines.index("answer 3:")


@pytest.mark.slow
def test_batch_that_is_not_answered_in_full_is_explained(tmp_path: Path) -> None:
    archive = write_handler(tmp_path, "m", FIRST_ONLY)
    debugged = run(tmp_path, "debug", archive, "--json-body", "1", "-n", 2)
    assert debugged.returncode == 1
    assert debugged.stderr.splitlines()[1:3] == [
        "  handler.py:1 in handle", "ValueError: the handler returned 1 for 2",
    ]  # fmt: skip
    assert "one element per element of data" in debugged.stderr


@pytest.mark.slow
def test_parts_of_a_streamed_answer_are_shown(tmp_path: Path) -> None:
    debugged = run(tmp_path, "debug", write_handler(tmp_path, "m", STREAMER), "--json-body", "1")
    assert debugged.returncode == 0, debugged.stderr
    assert "answer 1, a part: bytes of 6: 'part 0'" in debugged.stdout
    assert "content-type: text/plain" in debugged.stdout
    assert debugged.stdout.endswith("  part 2\n")


@pytest.mark.slow
def test_saved_request_and_headers_reach_the_handler(tmp_path: Path) -> None:
    archive = write_handler(tmp_path, "m", HEADERS)
    (tmp_path / "saved.http").write_bytes(REQUEST)
    debugged = run(tmp_path, "debug", archive, "--request", "saved.http")
    assert debugged.returncode == 0, debugged.stderr
    assert "HTTP/1.1 201 made" in debugged.stdout and "x-mine: 1" in debugged.stdout
    for text in ('"body": "\'hello\'"', '"explain": "True"', '"mine": "yes"'):
        assert text in debugged.stdout


@pytest.mark.slow
def test_folder_without_a_manifest_works_too(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/handler.py").write_text(FIRST_ONLY)
    debugged = run(tmp_path, "debug", "mine", "--json-body", "[7]")
    assert debugged.returncode == 0, debugged.stderr
    assert debugged.stdout.startswith("no MAR-INF/MANIFEST.json in mine; taken: name mine, handler handler.py\n")
    assert set(os.listdir(tmp_path / "mine")) - {"__pycache__"} == {"handler.py"}


@pytest.mark.slow
def test_built_in_handler_gets_a_sample(tmp_path: Path) -> None:
    archive = write_handler(tmp_path, "m", None, handler="base_handler", network=Doubler(),
                            config={"input": {"dtype": "float32", "shape": [3]}})  # fmt: skip
    debugged = run(tmp_path, "debug", archive)
    assert debugged.returncode == 0, debugged.stderr
    assert "request 1: a made-up tensor" in debugged.stdout


@pytest.mark.slow
def test_without_an_input_it_is_said_what_to_give(tmp_path: Path) -> None:
    debugged = run(tmp_path, "debug", write_handler(tmp_path, "m", FIRST_ONLY))
    assert debugged.returncode == 2
    assert "give a file with -i" in debugged.stderr


@pytest.mark.slow
def test_handler_that_cannot_be_loaded_is_shown_with_the_mend(tmp_path: Path) -> None:
    debugged = run(tmp_path, "debug", write_handler(tmp_path, "m", "import no_such_thing\n" + FIRST_ONLY), "-n", 1)
    assert debugged.returncode == 1
    assert "handler.py:1" in debugged.stderr and "pip install no_such_thing" in debugged.stderr
    assert str(tmp_path) not in debugged.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--header", "no colon"], "--header 'no colon' is no header"),
        (["--json-body", "{"], "--json-body '{' is not JSON"),
        (["--request", "x.txt"], "x.txt is no HTTP request"),
        (["-i", "kitten.jpg"], "the input kitten.jpg cannot be read: No such file or directory"),
    ],
)
def test_wrong_input_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    Path("x.txt").write_text("hello\n")
    assert main(["debug", str(write_handler(tmp_path, "m", FIRST_ONLY)), *arguments]) == 2
    assert text in capsys.readouterr().err


def test_python_file_is_told_from_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "handler.py").write_text(FIRST_ONLY)
    assert main(["debug", str(tmp_path / "handler.py"), "--json-body", "1"]) == 1
    assert "handler.py is a Python file; give the folder that it is in" in capsys.readouterr().err


def test_query_becomes_input_only_where_torchserve_makes_it_so(tmp_path: Path) -> None:
    def parsed(target: str) -> dry_run.Input:
        path = tmp_path / "request"
        path.write_text(f"POST {target} HTTP/1.1\nA: b\n\nbody")
        return dry_run._whole_request(path, [])

    assert parsed("/predictions/m?a=1").query == ""
    assert parsed("/invocations?a=1").query == "a=1"
    assert parsed("/m/predict?a=1").query == "a=1"
    assert dict(parsed("/predictions/m/1.0/more/path").headers) == {"A": "b", "url_path": "more/path"}
    assert parsed("/predictions/m").body == b"body"


def test_values_are_shown_in_a_line() -> None:
    class Own:
        def __repr__(self) -> str:
            raise RuntimeError

    endless: list[object] = []
    endless.append(endless)
    assert shown(bytearray(b"\xff\xd8" * 50)) == "bytearray of 100: ff d8 ff d8 ff d8 ff d8..."
    assert shown([1, 2, 3, 4]) == "list of 4: [1, 2, 3, ...]"
    assert shown({"a": [1.5, None], "b": "x" * 100}) == f"{{'a': [1.5, None], 'b': str of 100: {'x' * 60!r}...}}"
    assert shown((torch.zeros(2, 3, dtype=torch.int64),)) == "tuple of 1: [Tensor int64 [2, 3] on cpu]"
    assert shown(Own()).endswith("Own>")
    assert len(shown(endless)) < 200
