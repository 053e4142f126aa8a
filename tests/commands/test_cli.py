"""The command line: usage errors, exit codes, and what it must not import."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.commands import cli, model_table, start, status
from pyserve.commands import terminal as console
from pyserve.config.address import Address
from pyserve.config.config import Config
from pyserve.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "store").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TS_CONFIG_FILE", raising=False)
    yield tmp_path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Configurations that ``pyserve start`` would have started."""
    configs: list[Config] = []

    def start_server(config: Config, *, pid_path: Path, foreground: bool, like_torchserve: bool = False) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr(start, "start_server", start_server)
    return configs


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("pyserve: error: ")
    assert error.count("\n") == 1
    return error


def test_help_imports_nothing_slow() -> None:
    code = (
        "import sys, json\n"
        "from pyserve.commands.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(json.loads(run.stdout.splitlines()[-1]))
    assert loaded.isdisjoint({"torch", "numpy", "rich", "asyncio", "logging", "subprocess", "PIL"})
    for command in cli.COMMANDS:
        assert f"    {command} " in run.stdout


def test_start_machinery_imports_no_torch() -> None:
    code = (
        "import sys\nfrom pyserve.commands import cli, start, stop, status\nfrom pyserve.server import supervisor\n"
        "assert not {'torch', 'numpy', 'asyncio', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["strat"], "unknown command 'strat'; did you mean 'start'?"),
        (["xyzzy"], "unknown command 'xyzzy' (see `pyserve --help`)"),
        (["start", "--modle-store", "x"], "unknown argument '--modle-store'; did you mean '--model-store'?"),
        (["start", "--modle-store=x"], "unknown argument '--modle-store=x'; did you mean '--model-store'?"),
        (["stop", "--timeout", "soon"], "argument --timeout: invalid float value: 'soon'"),
        (["status", "extra"], "unknown argument 'extra'"),
        (["--bogus"], "unknown argument '--bogus'"),
        (["--print-completion", "bash"], "unknown argument '--print-completion'; did you mean 'completion'?"),
    ],
)
def test_usage_error_is_one_line_with_the_nearest_name(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in usage_error(capsys, *arguments)


def test_version_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pyserve ")


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: pyserve" in capsys.readouterr().out


def test_flags_reach_the_configuration_with_their_origin(started: list[Config]) -> None:
    arguments = [
        "start",
        "--model-store",
        "store",
        "--models",
        "a.mar",
        "n=b.mar,c.mar",
        "--strict",
        "--disable-token-auth",
        "--enable-model-api",
        "--metrics-address",
        "http://h:1",
    ]
    assert cli.main(arguments) == 0
    (config,) = started
    assert config.load_models == "a.mar,n=b.mar,c.mar"
    assert (config.strict, config.disable_token_authorization, config.enable_model_api) == (True, True, True)
    assert str(config.metrics_address) == "http://h:1"
    assert config.origin["load_models"] == "--models"
    assert config.origin["metrics_address"] == "--metrics-address"
    assert config.notices == []


def test_torchserves_other_flags_are_accepted_and_named(started: list[Config]) -> None:
    arguments = [
        "start",
        "--model-store",
        "store",
        "--ncs",
        "--log-config",
        "x.xml",
        "--plugins-path",
        "p",
        "--workflow-store",
        "w",
    ]
    assert cli.main(arguments) == 0
    assert [line.split()[0] for line in started[0].notices] == [
        "--log-config",
        "--plugins-path",
        "--workflow-store",
    ]
    assert (started[0].no_config_snapshots, started[0].restore) == (True, False)


def test_unset_switches_leave_the_file_alone(started: list[Config]) -> None:
    Path("config.properties").write_text("model_store=store\nstrict=true\nenable_model_api=false\n")
    assert cli.main(["start"]) == 0
    assert (started[0].strict, started[0].enable_model_api) == (True, False)


def test_configuration_error_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["start", "--model-store", "nowhere"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pyserve: error: --model-store directory not found: ")
    assert error.count("\n") == 1


def test_warnings_are_told_even_when_the_configuration_cannot_be_used(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.properties").write_text("modle_store=store\n")
    assert cli.main(["start"]) == 1
    warning, error = capsys.readouterr().err.splitlines()
    assert warning == "pyserve: warning: config.properties:1: unknown key 'modle_store'; did you mean 'model_store'?"
    assert error.startswith("pyserve: error: Missing mandatory parameter --model-store")


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (KeyboardInterrupt(), 130, ""),
        (ConfigError("first\nsecond"), 1, "pyserve: error: first second\n"),
        (PermissionError(13, "Permission denied", "f"), 1, "pyserve: error: [Errno 13] Permission denied: 'f'\n"),
    ],
)
def test_exit_code_of_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: BaseException, code: int, text: str
) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise raised

    monkeypatch.setattr(start, "start_server", fail)
    assert cli.main(["start", "--model-store", "store"]) == code
    assert capsys.readouterr().err == text


def test_mistakes_of_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(start, "start_server", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["start", "--model-store", "store"])


def test_table_is_aligned_and_shows_failures_beneath() -> None:
    rows: list[dict[str, Any]] = [
        {
            "model": "densenet161",
            "version": "1.0",
            "state": "READY",
            "workers": 1,
            "device": "cpu",
            "batch": 8,
            "url": "http://127.0.0.1:8080/predictions/densenet161",
        },
        {"model": "bad\x1b[2J", "state": "FAILED", "error": "line one\nline two"},
    ]
    assert model_table.table_lines(rows) == [
        "MODEL        VERSION  STATE   WORKERS  DEVICE  BATCH  URL",
        "densenet161  1.0      READY   1        cpu     8      http://127.0.0.1:8080/predictions/densenet161",
        "bad?[2J      -        FAILED  -        -       -      -",
        "    line one",
        "    line two",
    ]


def test_colour_changes_no_column() -> None:
    rows = [{"model": "m", "state": "READY"}]
    plain, colored = model_table.table_lines(rows), model_table.table_lines(rows, colored=True)
    assert colored[1].replace("\x1b[32m", "").replace("\x1b[0m", "") == plain[1]
    assert colored[1] != plain[1]


def test_curl_line_comes_last_and_only_once() -> None:
    lines = model_table.ready_lines({"models": [], "not_loaded": ["a.mar", "b.mar"], "sample": "curl x"})
    assert lines == [
        "no model is loaded",
        "found in model store, not loaded: a.mar, b.mar (start with --models a.mar or POST /models?url=a.mar)",
        "Model server started.",
        "curl x",
    ]


def test_plain_progress_is_one_line_a_second_for_each_model() -> None:
    stream = io.StringIO()
    now = [100.0]
    with console.Progress(stream, clock=lambda: now[0]) as progress:
        progress.update("m", "reading weights 1/9 MB")
        progress.update("n", "tracing")
        now[0] += 0.5
        progress.update("m", "reading weights 2/9 MB")
        now[0] += 0.5
        progress.update("m", "reading weights 3/9 MB")
        now[0] += 5
        progress.update("m", "reading weights 3/9 MB")
    assert stream.getvalue().splitlines() == ["m: reading weights 1/9 MB", "n: tracing", "m: reading weights 3/9 MB"]


def test_progress_on_a_terminal_is_cleared_at_the_end() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with console.Progress(stream) as progress:
        progress.update("m", "reading [weights] 1/9 MB")
    assert "\x1b[?25h" in stream.getvalue() or stream.getvalue() == ""


@pytest.mark.parametrize(
    ("ready", "wanted", "state"),
    [(2, 2, "READY"), (1, 2, "DEGRADED"), (0, 2, "NOT READY"), (0, 0, "NO WORKERS"), (1, 0, "READY"),
     (1, 2, "SCALING"), (0, 2, "STARTING")],
)  # fmt: skip
def test_state_of_a_described_model(monkeypatch: pytest.MonkeyPatch, ready: int, wanted: int, state: str) -> None:
    workers = [{"status": "READY"}] * ready + [{"status": "UNLOADING"}]
    answers = {
        "/models?limit=100": {"models": [{"modelName": "a b"}], "nextPageToken": "1"},
        "/models?limit=100&next_page_token=1": {"models": []},
        "/models/a%20b/all": [
            {
                "modelName": "a b",
                "modelVersion": "2",
                "minWorkers": wanted,
                "batchSize": 1,
                "workers": workers,
                "isScaling": state in ("SCALING", "STARTING"),
            }
        ],
    }
    monkeypatch.setattr(status, "_get", lambda connection, path: answers[path])
    (row,) = status.model_rows(Address("127.0.0.1", 1), "http://0.0.0.0:8080")
    assert (row["state"], row["workers"]) == (state, f"{ready}/{wanted}")
    assert row["url"] == "http://127.0.0.1:8080/predictions/a%20b"
