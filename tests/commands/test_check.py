"""`pyserve check`: handlers that would fail once they are served."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.support.dry_runs import environment, run
from tests.support.handler_archives import TUTORIAL, Doubler, write_handler

TWO = ("--json-body", "[1, 2]", "--json-body", "[3, 4]")


def handler(body: str, head: str = "", initialize: str = "self.kept = []") -> str:
    lines = "\n".join("        " + line for line in body.splitlines())
    return f"{head}\n\nclass H:\n    def initialize(self, context):\n        {initialize}\n\n" \
           f"    def handle(self, data, context):\n{lines}\n"  # fmt: skip


def checked(tmp_path: Path, source: str, *arguments: str, code: int = 1, **packed: Any) -> Any:
    """The report about an archive with this handler."""
    archive = write_handler(tmp_path, "m", source, **packed)
    done = run(tmp_path, "check", archive, "--json", *(arguments or TWO))
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_right_handler_passes_with_all_batch_sizes(tmp_path: Path) -> None:
    report = checked(tmp_path, TUTORIAL, code=0, network=Doubler(), config={"batchSize": 4})
    assert report["findings"] == []
    assert [call["batch"] for call in report["calls"]] == [1, 1, 1, 2, 4, 1]
    assert report["was_called"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "kind", "what"),
    [
        ("return [data[0]['body']]", "shape", "a batch of 2: returned 1 for 2"),
        ("return [{'boxes': [object()]} for row in data]", "element", "holds a <class 'object'> at [\"boxes\"][0]"),
        ("return [row['body'] for row in reversed(data)]", "order", "request 0 got the answer to request 1"),
        ("return [sum(map(sum, (row['body'] for row in data)))] * len(data)", "batch", "not the one it gets alone"),
        ("self.kept.append(data)\nreturn [len(self.kept) > 3 for row in data]", "state", "kept from call to call"),
        ("if len(data) > 1: raise ValueError('boom')\nreturn [1]", "call", "a batch of 2: ValueError: boom"),
        ("import ctypes\nif len(data) > 1: ctypes.string_at(0)\nreturn [1]", "crash", "was killed by SIGSEGV"),
        ("breakpoint()\nreturn [1] * len(data)", "breakpoint", "a worker process has no terminal"),
        ("open('out.txt', 'w').close()\nreturn [1] * len(data)", "file", "writes 'out.txt' into the unpacked archive"),
    ],
)
def test_each_mistake_is_one_finding(tmp_path: Path, body: str, kind: str, what: str) -> None:
    (finding,) = checked(tmp_path, handler(body))["findings"]
    assert finding["kind"] == kind
    assert what in finding["what"]
    assert finding["fix"]
    assert re.match(r"handler\.py:\d+ in handle\Z", finding["where"])


@pytest.mark.slow
def test_endless_call_is_a_finding_with_its_place_and_leaves_no_process(tmp_path: Path) -> None:
    source = handler("import subprocess\nsubprocess.Popen(['sleep', '987'])\nwhile True:\n    pass")
    (finding,) = checked(tmp_path, source, *TWO, "--timeout", "3")["findings"]
    assert finding["kind"] == "timeout"
    assert re.match(r"handler\.py:1[0-9] in handle", finding["where"])
    assert not [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", "987"]]


@pytest.mark.slow
def test_endless_load_is_a_finding(tmp_path: Path) -> None:
    (finding,) = checked(tmp_path, handler("pass", initialize="import time; time.sleep(999)"), *TWO,
                         "--timeout", "3")["findings"]  # fmt: skip
    assert finding["what"] == "loading the model: not through after 3 s"


@pytest.mark.slow
def test_all_missing_imports_are_told_at_once(tmp_path: Path) -> None:
    source = handler("import nothing_c\nreturn data", "import nothing_a\nimport words")
    findings = checked(tmp_path, source, files={"words.py": "import nothing_b\n"})["findings"]
    assert [(each["what"].split(",")[0], each["where"]) for each in findings] == [
        ("no module named 'nothing_a'", "handler.py:1"),
        ("no module named 'nothing_c'", "handler.py:9"),
        ("no module named 'nothing_b'", "words.py:1"),
    ]
    assert "pip install nothing_a" in findings[0]["fix"]


@pytest.mark.slow
def test_file_that_is_not_packed_is_told_even_when_the_handler_goes_on_without(tmp_path: Path) -> None:
    body = "try:\n    open('words.txt')\nexcept OSError:\n    pass\nreturn [1] * len(data)"
    (finding,) = checked(tmp_path, handler(body))["findings"]
    assert finding["what"] == "opens 'words.txt', which is not in the archive"
    assert "model_dir" in finding["fix"]


@pytest.mark.slow
def test_error_while_loading_has_place_and_mend(tmp_path: Path) -> None:
    (finding,) = checked(tmp_path, handler("pass", initialize="open(context.nothing)"))["findings"]
    assert finding["kind"] == "load" and "AttributeError" in finding["what"]
    assert finding["where"] == "handler.py:5 in initialize"


@pytest.mark.slow
def test_answers_that_vary_are_a_note_and_no_finding(tmp_path: Path) -> None:
    # No numbers: one draw in a hundred would be another's by rounding.
    report = checked(tmp_path, handler("import uuid\nreturn [str(uuid.uuid4()) for row in data]"), code=0)
    assert any("two different answers" in note for note in report["notes"])


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
def test_a_device_that_is_not_there_is_reported(tmp_path: Path) -> None:
    archive = write_handler(tmp_path, "m", handler("return data"), config={"deviceType": "gpu"})
    done = run(tmp_path, "check", archive, *TWO)
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.endswith(": deviceType is gpu but torch sees none; serving on the CPU")


@pytest.mark.slow
def test_without_an_input_the_handler_is_loaded_and_it_is_said_that_it_was_not_called(tmp_path: Path) -> None:
    done = run(tmp_path, "check", write_handler(tmp_path, "m", handler("return data")))
    assert done.returncode == 2
    assert "not called" in done.stdout and "-i" in done.stdout


@pytest.mark.slow
def test_text_tells_what_where_and_how_to_mend_it(tmp_path: Path) -> None:
    done = run(tmp_path, "check", write_handler(tmp_path, "m", handler("return [data[0]['body']]")), *TWO)
    assert done.returncode == 1
    assert done.stdout.splitlines()[:3] == [
        "FAIL  a batch of 2: returned 1 for 2",
        "      where: handler.py:7 in handle",
        "      fix:   return a list with one element per element of data, in order. Your handler reads data[0] only?",
    ]


def test_damaged_archive_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "bad.mar").write_bytes(b"no archive")
    done = run(tmp_path, "check", "bad.mar", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["findings"][0]["kind"] == "archive"


@pytest.mark.slow
def test_interrupted_check_leaves_no_handler_behind(tmp_path: Path) -> None:
    archive = write_handler(tmp_path, "m", handler("print(1)", initialize="import time; time.sleep(999)"))
    with subprocess.Popen(
        [sys.executable, "-m", "pyserve", "check", str(archive), *TWO], cwd=tmp_path, env=environment(tmp_path),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as popen:  # fmt: skip
        process = psutil.Process(popen.pid)
        while not (children := process.children()):
            assert popen.poll() is None
            os.sched_yield()
        popen.kill()
        popen.wait()
        psutil.wait_procs(children, timeout=60)
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
