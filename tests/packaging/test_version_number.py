"""One version number, in `pyserve/__init__.py`. Whatever shows a version reads that one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from pyserve import __version__

ROOT = Path(__file__).resolve().parents[2]
OTHER = "9.8.7"
COMMAND = "pyserve.commands.cli:main"

# Run in a process in which the version is another one from the start: prints what is shown of it, by place.
SHOWN = f"""
import contextlib, io, json
import pyserve
pyserve.__version__ = {OTHER!r}

from pyserve.api import openapi
from pyserve.api.open_inference_models import server_metadata
from pyserve.commands import cli, torchserve
from pyserve.config.config import Config
from pyserve.models.snapshot import format_snapshot
from pyserve.server.settings_report import settings_lines
from pyserve.telemetry.metrics import Metrics

def printed(call):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        call()
    return text.getvalue()

config = Config(model_store="/nowhere")
scrape = Metrics(torch_version="2.0").render()
print(json.dumps({{
    "pyserve --version": printed(lambda: cli.main(["--version"])),
    "torchserve --version": printed(lambda: torchserve.main(["--version"])),
    "inference description": openapi.inference_api([])["info"]["version"],
    "management description": openapi.management_api([])["info"]["version"],
    "metrics description": openapi.metrics_api()["info"]["version"],
    "metrics": [line for line in scrape.decode().splitlines() if line.startswith("pyserve_build_info{{")][0],
    "/v2": server_metadata()["version"],
    "snapshot": format_snapshot(config, {{}}, "startup.cfg"),
    "settings at start": str(settings_lines(config, gpus=0)),
}}))
"""


def test_everything_that_shows_a_version_reads_the_one() -> None:
    done = subprocess.run([sys.executable, "-c", SHOWN], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown: dict[str, str] = json.loads(done.stdout)
    assert len(shown) == 9
    for place, text in shown.items():
        assert OTHER in text and __version__ not in text, f"{place}: {text}"


@pytest.mark.parametrize("folder", ["pyserve", "handlers", "bench", "deploy", "examples"])
def test_no_file_writes_a_version_of_pyserve_out(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.*")):
        if path.suffix in (".py", ".yaml", ".properties", ".sh", ".md"):
            found = re.search(r"pyserve[-=: v]{1,3}\d+\.\d+\.\d+", path.read_text())
            assert found is None, f"{path}: {found}"


def test_the_package_takes_it_from_there() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    project = text.partition("[project]\n")[2].partition("\n[")[0]
    assert 'dynamic = ["version"]' in project and not re.search("^version", project, re.M)
    assert re.search(r'^version = \{ ?attr = "pyserve\.__version__" ?\}$', text, re.M)


def test_what_is_installed_says_the_same() -> None:
    ours = [each for each in distributions() if any(entry.value == COMMAND for entry in each.entry_points)]
    assert {each.version for each in ours} == {__version__}, "installed by another version: `make build`"


def test_the_changelog_begins_with_it() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None and newest[1] == __version__
