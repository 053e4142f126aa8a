"""`torchserve` and `torch-model-archiver` as scripts know them: flags, texts, habits; the same from Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import pyserve
from pyserve.commands import cli, start, torch_model_archiver, torchserve
from pyserve.config.address import Address
from pyserve.config.config import Config
from pyserve.server import pid_file
from pyserve.server.settings_report import settings_lines
from tests.support.handler_archives import ECHO, write_handler
from tests.support.serving import LIMIT_S, ROOT

COMPAT = Path(pyserve.__file__).parent / "compat"
PROPERTIES = "".join(f"{name}_address=http://127.0.0.1:0\n" for name in ("inference", "management", "metrics"))
STARTED = "Model server started."


class Place:
    """A folder to run commands in, with temporary files, pid files and a model store of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_handler(folder / "store", "echo", ECHO)
        (folder / "my.properties").write_text(PROPERTIES + "enable_grpc=false\n")
        self.environment = {
            **os.environ, "PYTHONPATH": f"{ROOT}:{COMPAT}", "TMPDIR": str(folder),
            "PYSERVE_CACHE": str(folder / "cache"), "XDG_STATE_HOME": str(folder / "state"),
        }  # fmt: skip
        for name in ("TS_CONFIG_FILE", "LOG_LOCATION", "METRICS_LOCATION"):
            self.environment.pop(name, None)
        self.pid_path = folder / ".pyserve.pid"
        self.plain_pid_path = folder / ".model_server.pid"

    def run(self, *arguments: str, module: str = "pyserve.commands.torchserve") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *arguments], env=self.environment, cwd=self.folder,
            capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip

    @contextmanager
    def started(self, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
        """The command and the lines that it has printed up to the one that scripts wait for; stdout stays open."""
        popen = subprocess.Popen(
            [sys.executable, "-m", "pyserve.commands.torchserve", *arguments], env=self.environment, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        )  # fmt: skip
        limit = threading.Timer(LIMIT_S, popen.kill)
        limit.start()
        lines = []
        assert popen.stdout is not None
        try:
            for line in popen.stdout:
                lines.append(line.rstrip("\n"))
                if lines[-1] == STARTED:
                    break
            assert lines and lines[-1] == STARTED, lines
            yield popen, lines
        finally:
            limit.cancel()
            self.run("--stop")
            popen.kill()
            popen.wait()
            popen.stdout.close()

    @property
    def running(self) -> pid_file.RunningServer:
        running = pid_file.read(self.pid_path)
        assert running is not None
        return running


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Config, dict[str, Any]]]:
    """What `torchserve` would have started, and how."""
    (tmp_path / "store").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TS_CONFIG_FILE", raising=False)
    monkeypatch.setattr(pid_file, "default_path", lambda: tmp_path / "none.pid")
    found: list[tuple[Config, dict[str, Any]]] = []

    def start_server(config: Config, **how: Any) -> int:
        found.append((config, how))
        return 0

    monkeypatch.setattr(start, "start_server", start_server)
    return found


def test_version_is_torchserves_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("-v", "--version", "--ver"):
        assert torchserve.main([flag]) == 0
        out, err = capsys.readouterr()
        assert out == "TorchServe Version is 0.12.0\n"
        assert f"pyserve {pyserve.__version__}" in err


@pytest.mark.parametrize(
    "arguments", [["--start", "--stop"], ["-v", "--start"], ["--mod", "x"], ["--bogus"], ["--models"], ["extra"]]
)
def test_usage_error_is_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        torchserve.main(arguments)
    assert caught.value.code == 2
    assert "torchserve: error: " in capsys.readouterr().err


@pytest.mark.parametrize("first", [["--start"], []])
def test_every_flag_has_its_effect_or_says_that_it_has_none(
    configs: list[tuple[Config, dict[str, Any]]], first: list[str]
) -> None:
    arguments = [
        *first, "--model-store", "store", "--models", "a.mar,n=b.mar", "c=http://h/c.mar", "--ncs", "--dt", "--enable",
        "--workflow-store", "w", "--log-config", "l.xml", "--cpp-log-config", "c.json", "--ppath", "p", "--foreg",
    ]  # fmt: skip
    assert torchserve.main(arguments) == 0
    ((config, how),) = configs
    assert config.load_models == "a.mar,n=b.mar,c=http://h/c.mar"
    assert (config.no_config_snapshots, config.disable_token_authorization, config.enable_model_api) == (True,) * 3
    assert sorted(line.split()[0] for line in config.notices) == [
        "--cpp-log-config",
        "--log-config",
        "--plugins-path",
        "--workflow-store",
    ]
    assert (how["foreground"], how["like_torchserve"]) == (True, True)


def test_ts_config_is_read(configs: list[tuple[Config, dict[str, Any]]]) -> None:
    Path("x.properties").write_text("model_store=store\njob_queue_size=7\n")
    assert torchserve.main(["--ts-c", "x.properties"]) == 0
    assert configs[0][0].job_queue_size == 7


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "Missing mandatory parameter --model-store"),
        (["--model-store", "nowhere"], "--model-store directory not found: "),
        (["--model-store", "store", "--ts-config", "gone"], "--ts-config file not found: gone"),
    ],
)
def test_what_is_missing_is_exit_code_1(
    configs: list[tuple[Config, dict[str, Any]]], capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert torchserve.main(arguments) == 1
    assert capsys.readouterr().err.startswith(f"torchserve: error: {text}")
    assert configs == []


def test_stop_without_a_server_says_so_and_clears_old_keys_away(place: Place) -> None:
    (place.folder / "key_file.json").write_text(json.dumps({"management": {"key": "a" * 8}}))
    stopped = place.run("--stop")
    assert (stopped.returncode, stopped.stdout) == (0, "TorchServe is not currently running.\n")
    assert not (place.folder / "key_file.json").exists()
    for text in ("[]", "{}", "notes", ""):
        (place.folder / "key_file.json").write_text(text)
        assert place.run("--stop").returncode == 0
        assert (place.folder / "key_file.json").exists()  # it is somebody else's


@pytest.mark.server
def test_server_in_the_background_as_scripts_know_it(place: Place) -> None:
    arguments = ("--start", "--ncs", "--model-store", "store", "--models", "echo.mar", "--ts-config", "my.properties")
    place.plain_pid_path.write_text("1\n")  # left behind; that process is no TorchServe
    with place.started(*arguments) as (popen, lines):
        assert popen.wait(LIMIT_S) == 0
        for label in ("Torchserve version: 0.12.0", "Inference address: http://127.0.0.1:", "Initial Models: echo.mar",
                      "Model Store: ", "Config file: my.properties"):  # fmt: skip
            assert sum(label in line for line in lines) == 1, label
        pid = place.running.pid
        assert place.plain_pid_path.read_text() == f"{pid}\n"
        assert "org.pytorch.serve.ModelServer" in psutil.Process(pid).cmdline()
        assert not any("org.pytorch.serve.ModelServer" in each.cmdline() for each in psutil.Process(pid).children())

        again = place.run(*arguments)
        assert again.returncode == 1
        assert again.stdout.startswith("TorchServe is already running, please use torchserve --stop to stop TorchServe")
        ours = place.run("start", *arguments[2:4], module="pyserve")
        assert ours.returncode == 1 and "already running" in ours.stderr
        assert place.running.pid == pid
        assert place.run("status", module="pyserve").stdout.startswith(f"pyserve is running (pid {pid})")

        with urllib.request.urlopen(f"{place.running.addresses['inference']}/ping", timeout=LIMIT_S) as answer:
            assert answer.status == 200
        stopped = place.run("--stop")
        assert (stopped.returncode, stopped.stdout) == (0, "TorchServe has stopped.\n")
        assert popen.stdout is not None
        rest = list(popen.stdout)
        assert any("drained" in line for line in rest)  # the log goes on where it began
        assert any(re.search(r' \[INFO \] ACCESS_LOG - /127\.0\.0\.1:\d+ "GET /ping HTTP/1\.1" 200 \d+$', line)
                   for line in rest)  # fmt: skip
        assert not place.plain_pid_path.exists() and not place.pid_path.exists()
        assert not (place.folder / "logs/pyserve.log").exists()


@pytest.mark.server
def test_server_in_the_foreground_logs_to_stdout_and_stops(place: Place) -> None:
    with place.started("--foreground", "--model-store", "store", "--ts-config", "my.properties") as (popen, lines):
        assert any("pyserve.supervisor - server started" in line for line in lines)
        assert popen.poll() is None and place.running.pid == popen.pid
        assert place.run("--stop", "--foreground").stdout == "TorchServe has stopped.\n"
        assert popen.wait(LIMIT_S) == 0


LAUNCHED = """
import sys
from ts.launcher import register_model, register_model_with_params, start, stop
def ended(lines):
    return [*iter(lambda: lines.get(timeout=60), None)]
assert ended(start(model_store="nowhere")) == []
first = start("store", "my.properties", no_config_snapshots=True)
lines = start("store", "my.properties", no_config_snapshots=True, models="echo.mar", disable_token=True)
assert any("drained" in line for line in ended(first)), "the first server was to end"
answer = register_model("other", "echo.mar")
assert answer.status_code == 200 and answer.ok, answer.text
assert answer.json()["status"] == 'Model "other" Version: 1.0 registered with 1 initial workers', answer.text
answer.raise_for_status()
for params in ({"url": "gone.mar"}, [("url", "gone.mar")], (("url", "gone.mar"), ("model_name", "x"))):
    answer = register_model_with_params(params)
    assert (answer.status_code, answer.json()["type"]) == (404, "ModelNotFoundException"), answer.text
stop()
assert any("drained" in line for line in ended(lines))
stop()
stop(wait=False)
"""


@pytest.mark.server
def test_launcher_starts_registers_and_stops(place: Place) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHED], env=place.environment, cwd=place.folder, capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip
    place.run("--stop")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--model-store directory not found: " in done.stdout  # what it prints is printed
    assert done.stdout.count("Model server started.") == done.stdout.count("TorchServe has stopped.") == 2
    assert done.stdout.count("TorchServe is not currently running.") >= 3  # start, start, stop


def test_module_of_torchserve_is_the_command(place: Place) -> None:
    assert place.run("--version", module="ts.model_server").stdout == "TorchServe Version is 0.12.0\n"
    assert place.run("--model-store", "nowhere", module="ts.model_server").returncode == 1


def test_pid_of_a_real_torchserve_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / ".model_server.pid"
    with subprocess.Popen(
        [sys.executable, "-c", "print(); input()", pid_file.TORCHSERVE_WORD], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        assert other.stdout is not None
        other.stdout.readline()  # it is itself by now, no copy of us
        path.write_text(f"{other.pid}")
        assert not pid_file.write_plain(path, os.getpid())
        pid_file.remove_plain(path, os.getpid())
        assert path.read_text() == f"{other.pid}"
        other.communicate(b"\n")
    for stale in (f"{other.pid}", "", "x", "-1", "1\n{}"):
        path.write_text(stale)
        assert pid_file.write_plain(path, os.getpid())
        assert path.read_text() == f"{os.getpid()}\n"
    pid_file.remove_plain(path, os.getpid())
    assert not path.exists()
    assert not pid_file.write_plain(tmp_path / "no/folder", 1)


def test_labels_tell_what_is_in_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_LOCATION", str(tmp_path))
    config = Config(
        inference_address=Address("127.0.0.1", 99), cpu_budget=3, compat="strict", keystore_pass="secret",
        models={"m": {}}, origin={"models": "x.properties:4", "keystore_pass": "x.properties:5"},
    )  # fmt: skip
    lines = settings_lines(config, gpus=0)
    for line in ("Inference address: http://127.0.0.1:99", "Number of CPUs: 3", "Default workers per model: 3",
                 "Model API enabled: false", "Config file: x.properties", f"Log dir: {tmp_path}", "Model config: m",
                 "Model Store: N/A"):  # fmt: skip
        assert line in lines
    assert "Default workers per model: 2" in settings_lines(config, gpus=2)
    assert not any("secret" in line for line in lines)


# --- the archiver -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_archiver_packs_without_trying_the_model(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    (place.folder / "model.py").write_text("import no_such_module\n")
    (place.folder / "w.pth").write_bytes(b"no weights")
    arguments = [
        "--model-n", "m", "-v", "1.0", "--handler", "image_classifier", "--model-file", str(place.folder / "model.py"),
        "--serialized", str(place.folder / "w.pth"), "--export", str(place.folder / "out"),
    ]  # fmt: skip
    assert torch_model_archiver.main(arguments) == 0
    assert (place.folder / "out/m.mar").is_file()
    assert torch_model_archiver.main(arguments) == 1
    assert "already exists" in capsys.readouterr().err
    assert torch_model_archiver.main([*arguments, "-f"]) == 0
    with pytest.raises(SystemExit) as caught:
        torch_model_archiver.main(["--model-name", "m", "--handler", "h.py"])
    assert caught.value.code == 2


PACKING = """
import argparse, model_archiver
from pathlib import Path
from model_archiver import ModelArchiver, ModelArchiverConfig
from model_archiver.manifest_components.manifest import RuntimeType
from model_archiver.model_archiver_error import ModelArchiverError
from model_archiver.model_packaging import generate_model_archive
Path("h.py").write_text("def handle(data, context):\\n    return data\\n")
config = ModelArchiverConfig(model_name="a", handler="h.py", version="2.0", export_path=Path("out"), force=True,
                             runtime=RuntimeType.PYTHON.value, archive_format="no-archive")
generate_model_archive(config)
ModelArchiver.generate_model_archive(ModelArchiverConfig(model_name="b", handler="h.py", runtime=RuntimeType.PYTHON))
model_archiver.model_packaging.generate_model_archive(
    ModelArchiverConfig.from_args(argparse.Namespace(model_name="c", handler="h.py", version="1.0", other=1)))
try:
    generate_model_archive(ModelArchiverConfig(model_name="d", handler="gone.py"))
except ModelArchiverError as error:
    assert "gone.py" in str(error)
else:
    raise AssertionError
assert Path("out/a/MAR-INF/MANIFEST.json").is_file() and Path("b.mar").is_file() and Path("c.mar").is_file()
assert model_archiver.__version__
"""


def test_archiver_from_python(place: Place) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PACKING], env=place.environment, cwd=place.folder, capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    module = place.run("--model-name", "e", "-v", "1", "--handler", "h.py", module="model_archiver.model_packaging")
    assert module.returncode == 0 and (place.folder / "e.mar").is_file(), module.stderr


def test_commands_of_the_package_exist() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for name, function in (("pyserve", cli.main), ("torchserve", torchserve.main),
                           ("torch-model-archiver", torch_model_archiver.main)):  # fmt: skip
        assert f'{name} = "{function.__module__}:{function.__name__}"' in text
