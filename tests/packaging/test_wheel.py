"""The wheel, installed into a fresh environment outside of the source tree: what is in it, and that it serves.

``make wheel`` builds it and runs this file on it (``PYSERVE_WHEEL``). Without that variable it is built here first,
which takes minutes. The environment sees torch and what the wheel says it needs, and nothing else that is installed
here; pip finds all of it there and downloads nothing.
"""

from __future__ import annotations

import email
import http.client
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from importlib.metadata import Distribution, distribution
from pathlib import Path

import psutil
import pytest
import torch
from packaging.requirements import Requirement

from pyserve import __version__

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 180.0
WEIGHTS = torch.tensor([[0.5, -1.0, 2.0, 0.25]])

HANDLER = """
import ts
from ts.torch_handler.base_handler import BaseHandler


class Sums(BaseHandler):
    def initialize(self, context):
        self.initialized = True

    def handle(self, data, context):
        return [{"sum": sum(row["body"]), "ts": ts.__file__, "base": BaseHandler.__module__} for row in data]
"""


def run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("PYSERVE_WHEEL")
    if given:
        return Path(given).resolve(strict=True)
    folder = tmp_path_factory.mktemp("built")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "."]
    run(build, ROOT)
    (built,) = folder.glob("*.whl")
    return built


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def metadata_of(wheel: Path) -> Message:
    (name,) = [each for each in names_in(wheel) if each.endswith(".dist-info/METADATA")]
    with zipfile.ZipFile(wheel) as file:
        return email.message_from_bytes(file.read(name))


def needed(names: list[str]) -> dict[str, Distribution]:
    """The distributions of these names and all that they need, in this environment."""
    found: dict[str, Distribution] = {}
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in found:
            continue
        found[name] = distribution(name)
        requirements = [Requirement(each) for each in found[name].requires or []]
        names += [each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
    return found


def link(each: Distribution, site: Path) -> None:
    """Makes an installed distribution visible in another environment, by links to its files' topmost folders."""
    for file in each.files or []:
        top = file.parts[0]
        if top not in ("..", "__pycache__") and not (site / top).exists():
            (site / top).symlink_to(Path(str(each.locate_file(top))).resolve(strict=True))


class Environment:
    """A virtual environment with the wheel in it, and a folder to work in."""

    def __init__(self, folder: Path, wheel: Path):
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        run([sys.executable, "-m", "venv", str(folder / "venv")], folder)
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site = Path(run([str(self.bin / "python"), "-c", ask], folder).strip())
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYSERVE", "TS_"))}
        self.variables = {
            **kept,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYSERVE_CACHE": str(folder / "cache"),
            "LOG_LOCATION": str(folder / "logs"),
            "TMPDIR": str(folder),
        }
        # venv may bring one that is older than torch asks for.
        self.run("pip", "uninstall", "--quiet", "--yes", "setuptools")
        requirements = [Requirement(each) for each in metadata_of(wheel).get_all("Requires-Dist") or []]
        names = [each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]
        for each in needed(names).values():
            link(each, self.site)
        self.run("pip", "install", "--quiet", "--no-build-isolation", "--no-index", str(wheel))

    def run(self, name: str, *arguments: str) -> str:
        """Runs a command of the environment."""
        return run([str(self.bin / name), *arguments], self.folder, self.variables)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("fresh")
    assert not folder.is_relative_to(ROOT)
    return Environment(folder, wheel)


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 1, bias=False)
        self.linear.weight.data.copy_(WEIGHTS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


def pack(environment: Environment) -> None:
    """One model for the native lane and one with a handler of its own, by the commands that the wheel installs."""
    folder = environment.folder
    (folder / "store").mkdir()
    torch.jit.save(torch.jit.script(Linear().eval()), str(folder / "linear.pt"))
    (folder / "model-config.yaml").write_text("input: {dtype: float32, shape: [4]}\n")
    (folder / "sums.py").write_text(HANDLER)
    common = ["--version", "1.0", "--export-path", str(folder / "store")]
    environment.run("pyserve", "archive", "--model-name", "linear", "--serialized-file", "linear.pt", "--handler",
                    "tensor", "--config-file", "model-config.yaml", *common)  # fmt: skip
    environment.run("torch-model-archiver", "--model-name", "sums", "--handler", "sums.py", *common)


@pytest.fixture(scope="module")
def port(environment: Environment) -> Iterator[int]:
    """The inference port of a server that serves both models."""
    pack(environment)
    addresses = [part for name in ("inference", "management", "metrics")
                 for part in (f"--{name}-address", "http://127.0.0.1:0")]  # fmt: skip
    environment.run("pyserve", "start", "--model-store", "store", "--models", "all", "--strict", "--grpc", "false",
                    "--pid-file", "pid", *addresses)  # fmt: skip
    try:
        told = environment.run("pyserve", "status", "--pid-file", "pid")
        (found,) = set(re.findall(r"http://127\.0\.0\.1:(\d+)/predictions/", told))
        yield int(found)
    finally:
        environment.run("pyserve", "stop", "--pid-file", "pid")


def predict(port: int, model: str, body: object) -> object:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        connection.request("POST", f"/predictions/{model}", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        return json.loads(text)
    finally:
        connection.close()


def test_it_holds_what_the_source_holds_and_nothing_else(wheel: Path) -> None:
    tracked = run(["git", "ls-files", "pyserve", "handlers"], ROOT).split()
    source = {re.sub("^handlers/", "pyserve/handlers/", name) for name in tracked} - {"pyserve/handlers"}
    extensions = {f"pyserve/{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_core", "_front", "_http")}
    made = {"pyserve/_build_info.py", *extensions}
    packed = {name for name in names_in(wheel) if name.startswith("pyserve/")}
    assert packed == source | made


def test_beside_the_package_lie_only_a_manual_page_and_the_path_to_the_names_of_torchserve(wheel: Path) -> None:
    others = {name for name in names_in(wheel) if not name.startswith("pyserve/") and ".dist-info/" not in name}
    (manual,) = [name for name in others if name.endswith(".data/data/share/man/man1/pyserve.1")]
    assert others == {"pyserve-compat.pth", manual}


def test_its_metadata_has_version_and_licence(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert (
        metadata["Name"] == "pyserve-torch"
        and metadata["License-Expression"] == "Apache-2.0"
        and metadata["Version"] == __version__
    )
    assert metadata["License-Expression"] == "Apache-2.0"
    with zipfile.ZipFile(wheel) as file:
        (licence,) = [name for name in file.namelist() if name.endswith("LICENSE")]
        assert file.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_it_is_found_in_the_environment_and_not_in_the_tree(environment: Environment) -> None:
    where = environment.run(
        "python", "-c", "import torch, pyserve._core, pyserve._http, pyserve; print(pyserve.__file__)"
    ).strip()
    assert Path(where).is_relative_to(environment.site)


@pytest.mark.parametrize("command", ["pyserve", "torchserve", "torch-model-archiver"])
def test_its_commands_start(environment: Environment, command: str) -> None:
    asked = "--help" if command == "torch-model-archiver" else "--version"
    text = environment.run(command, asked)
    assert (__version__ in text) if asked == "--version" else ("--model-name" in text)


def test_a_network_in_the_native_lane_answers(port: int) -> None:
    row = [1.0, 2.0, 3.0, 4.0]
    expected = (torch.tensor([row]) @ WEIGHTS.T).flatten()
    answer = torch.tensor(predict(port, "linear", row)).flatten()
    torch.testing.assert_close(answer, expected, rtol=0, atol=0)


def test_a_handler_in_a_worker_process_imports_ts(environment: Environment, port: int) -> None:
    answer = predict(port, "sums", [1, 2, 3.5])
    ts = str(environment.site / "pyserve" / "compat" / "ts" / "__init__.py")
    assert answer == {"sum": 6.5, "ts": ts, "base": "pyserve.handlers.base_handler"}


def test_no_process_of_the_server_uses_the_source_tree(environment: Environment, port: int) -> None:
    assert predict(port, "sums", [1]) == predict(port, "sums", [1])
    supervisor = psutil.Process(int((environment.folder / "pid").read_text().split()[0]))
    processes = [supervisor, *supervisor.children(recursive=True)]
    assert len(processes) >= 4  # supervisor, server, zygote, the worker of `sums`
    for process in processes:
        used = [process.cwd(), *process.cmdline(), *(each.path for each in process.memory_maps())]
        assert not [path for path in used if path.startswith(f"{ROOT}/") and "/.venv/" not in path], process


def test_uninstalling_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    other = Environment(tmp_path, wheel)
    assert list(other.site.glob("pyserve*"))
    other.run("pip", "uninstall", "--quiet", "--yes", "pyserve-torch")
    assert not list(other.site.glob("pyserve*")) and not list(other.bin.glob("*serve*"))


def test_the_source_archive_has_all_that_a_build_needs(tmp_path: Path) -> None:
    code = "import sys, setuptools.build_meta as backend; print(backend.build_sdist(sys.argv[1]))"
    run([sys.executable, "-c", code, str(tmp_path)], ROOT)
    (made,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    tracked = set(run(["git", "ls-files", "csrc", "pyserve", "handlers", "setup.py", "pyproject.toml", "LICENSE",
                       "README.md"], ROOT).split())  # fmt: skip
    wanted = {re.sub("^handlers/", "pyserve/handlers/", name) for name in tracked} - {"pyserve/handlers"}
    assert not wanted - names
