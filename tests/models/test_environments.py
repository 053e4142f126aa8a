"""A model's own environment sees what the server's interpreter sees, by that interpreter's rule, and its own first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from pyserve.launch import ROOT_DIR
from pyserve.models import environments
from pyserve.models.environments import site_packages

BASE = getattr(sys, "_base_executable", sys.executable)
_SEEN = """
import importlib, json, sys
names = ["plain", "linked", "hooked", "deeper", "usual", "shadowed"]
def value(name):
    try:
        return importlib.import_module(name).V
    except ImportError:
        return None
print(json.dumps({"path": sys.path[1:], "values": {name: value(name) for name in names},
                  "custom": "usercustomize" in sys.modules}))
"""
_HOOK = """
import importlib.util, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "hooked":
            return importlib.util.spec_from_file_location(name, {place!r})
sys.meta_path.append(Finder)
"""


class Server:
    """An interpreter that a server could run in, with packages of every kind.

    Attributes:
        python: its path.
        packages: where its packages lie.
    """

    def __init__(self, folder: Path, kind: str):
        self._environment = {
            **os.environ, "PYTHONUSERBASE": str(folder / "user"), "PYTHONPATH": str(folder / "given"),
            "HOME": str(folder),
        }  # fmt: skip
        place = folder / "server"
        if kind == "base":
            self.python = Path(BASE)
        elif kind == "nested":
            venv.create(folder / "outer", system_site_packages=True, symlinks=True)
            command = [folder / "outer/bin/python", "-m", "venv", "--without-pip", "--system-site-packages", place]
            subprocess.run(command, check=True)
            self.python = place / "bin/python"
        else:
            venv.create(place, system_site_packages=kind == "venv that shows the system", symlinks=True)
            self.python = place / "bin/python"
        self.packages = site_packages(place)
        for each in (self.packages, folder / "given", _user_site(folder), folder / "elsewhere/below"):
            each.mkdir(parents=True, exist_ok=True)
        (_user_site(folder) / "usual.py").write_text("V = 'of the user'\n")
        (_user_site(folder) / "usercustomize.py").touch()
        (folder / "given" / "shadowed.py").write_text("V = 'given'\n")
        if kind != "base":
            self._fill(folder / "elsewhere")

    def _fill(self, elsewhere: Path) -> None:
        (self.packages / "pip").mkdir()  # or ensurepip would run, which takes seconds
        (self.packages / "pip/__init__.py").touch()
        (self.packages / "plain.py").write_text("V = 'plain'\n")
        (elsewhere / "linked.py").write_text("V = 'linked'\n")
        (elsewhere / "hooked_source.py").write_text("V = 'hooked'\n")
        (elsewhere / "below/deeper.py").write_text("V = 'deeper'\n")
        (self.packages / "aa_linked.pth").write_text(f"{elsewhere}\n")
        hook = _HOOK.format(place=f"{elsewhere}/hooked_source.py")
        (self.packages / "__editable___hooked_finder.py").write_text(hook)
        (self.packages / "__editable__.hooked.pth").write_text("import __editable___hooked_finder\n")
        # As distutils and system packages do: a folder whose own .pth files are read too.
        (self.packages / "zzz_more.pth").write_text(f"import site; site.addsitedir({str(elsewhere / 'below')!r})\n")

    def run(self, code: str, *arguments: str, python: Path | None = None) -> str:
        command = [str(python or self.python), "-c", code, *arguments]
        return subprocess.check_output(command, env=self._environment, cwd="/", text=True)

    def make(self, folder: Path) -> Path:
        """A model's environment of this server; its interpreter."""
        code = "import sys; sys.path.append(sys.argv[2])\n"
        code += "from pathlib import Path; from pyserve.models.environments import make_environment\n"
        code += "sys.path.remove(sys.argv[2]); make_environment(Path(sys.argv[1]))"
        self.run(code, str(folder), str(ROOT_DIR))
        return folder / "bin/python"

    def seen(self, python: Path | None = None) -> dict[str, Any]:
        return dict(json.loads(self.run(_SEEN, python=python)))


def _user_site(folder: Path) -> Path:
    return folder / "user/lib" / site_packages(folder).parent.name / "site-packages"


KINDS = ["venv", "venv that shows the system", "nested", "base"]


@pytest.mark.parametrize("kind", KINDS)
def test_environment_sees_what_the_server_sees_in_its_order(tmp_path: Path, kind: str) -> None:
    server = Server(tmp_path, kind)
    python = server.make(tmp_path / "model")
    own = str(site_packages(tmp_path / "model"))
    there, here = server.seen(), server.seen(python)
    assert [each for each in here["path"] if each != own] == there["path"]
    assert here["path"].index(own) < here["path"].index(there["path"][-1])
    assert here["values"] == there["values"]
    assert here["custom"] == there["custom"] == (kind != "venv")
    if kind != "base":
        assert here["values"] | {"shadowed": "", "usual": ""} == {
            "plain": "plain", "linked": "linked", "hooked": "hooked", "deeper": "deeper", "shadowed": "", "usual": "",
        }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_packages_of_the_environment_come_before_the_servers(tmp_path: Path, kind: str) -> None:
    server = Server(tmp_path, kind)
    python = server.make(tmp_path / "model")
    names = ["plain", "linked", "deeper", "usual"]
    for name in names:
        (site_packages(tmp_path / "model") / f"{name}.py").write_text("V = 'own'\n")
    values = server.seen(python)["values"]
    assert [values[name] for name in names] == ["own"] * 4
    assert values["shadowed"] == "given"  # PYTHONPATH goes before all packages


def test_change_of_the_servers_packages_shows_at_once(tmp_path: Path) -> None:
    server = Server(tmp_path, "venv")
    python = server.make(tmp_path / "model")
    (server.packages / "usual.py").write_text("V = 'later'\n")
    assert server.seen(python)["values"]["usual"] == "later"


def test_environment_of_a_server_without_pip_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments.importlib.util, "find_spec", lambda name: None)
    environments.make_environment(tmp_path / "model")
    assert (site_packages(tmp_path / "model") / "pip").is_dir()


def test_pyserve_and_torch_are_seen_however_they_are_installed(tmp_path: Path) -> None:
    environments.make_environment(tmp_path / "model")
    code = "import pyserve, torch; print(pyserve.__file__)"
    found = subprocess.check_output([tmp_path / "model/bin/python", "-c", code], text=True, cwd="/")
    assert Path(found.strip()) == ROOT_DIR / "pyserve/__init__.py"
