"""What commands print of archives, answers and errors cannot control the terminal; their own colours can."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import pytest

from pyserve.commands import cli
from pyserve.commands.escaping import escaped_output, unescaped_output
from pyserve.commands.invocation import guarded
from pyserve.commands.model_table import print_ready
from pyserve.errors import ServeError
from pyserve.visible import visible
from tests.support.control_characters import HOSTILE, SHOWN


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


def hostile_archive(folder: Path) -> Path:
    """Names and texts in it have control characters."""
    path = folder / "m.mar"
    manifest = {"model": {"modelName": "m", "handler": "h.py", "modelVersion": "1.0", "description": HOSTILE}}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        handler = f"class H:\n    def handle(self, data, context):\n        raise ValueError({HOSTILE!r})\n"
        archive.writestr("h.py", handler)
        archive.writestr("a\u202eb\x9b31m.txt", "")
    return path


@pytest.mark.parametrize("command", [["inspect"], ["check", "--json"], ["check"], ["debug", "-i", "body.txt"]])
def test_commands_on_an_archive_print_no_control_character(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("body.txt").write_text(HOSTILE)
    before = sys.stdout, sys.stderr
    cli.main([command[0], str(hostile_archive(tmp_path)), *command[1:]])
    assert (sys.stdout, sys.stderr) == before
    printed = "".join(capsys.readouterr())
    assert printed and visible(printed) == printed


def test_errors_and_usage_print_none(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ServeError(HOSTILE)

    assert guarded(fail, "pyserve") == 1
    with pytest.raises(SystemExit):
        cli.main(["status", HOSTILE])
    for line in "".join(capsys.readouterr()).splitlines():
        assert visible(line) == line


def test_the_table_keeps_its_own_colours_and_shows_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"model": f"m{HOSTILE}", "version": "1", "state": "FAILED", "error": f"first {HOSTILE}\nsecond {HOSTILE}"}]
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with escaped_output():
        print_ready({"models": rows, "sample": f"curl {HOSTILE}", "not_loaded": [HOSTILE]})
        print(HOSTILE)
        print("a\r\nb")
    printed = stream.getvalue()
    assert "\x1b[31mFAILED\x1b[0m" in printed
    rest = printed.replace("\x1b[31m", "").replace("\x1b[0m", "")
    assert visible(rest) == rest
    assert f"    first {SHOWN}\n    second {SHOWN}\n" in rest and f"curl {SHOWN}\n" in rest
    assert rest.endswith(f"{SHOWN}\na\nb\n")


def test_a_handler_in_the_terminal_of_its_author_prints_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with escaped_output():
        assert sys.stderr.isatty()
        with unescaped_output():
            print("\r50 %", end="", file=sys.stderr)
        sys.stderr.writelines(["\r100 %"])
    assert stream.getvalue() == "\r50 %\\x0d100 %"
