"""`torchserve` and `torch-model-archiver` where TorchServe's packages have taken their place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from pyserve.commands import cli, doctor
from pyserve.commands.doctor_check import NOTE, PASS, WARN

OURS = "#!/usr/bin/python3\nfrom pyserve.commands.torchserve import main\n"
THEIRS = "#!/usr/bin/python3\nfrom ts.model_server import start\n"


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the commands of this Python, and nothing else on the path but a package that claims one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", str(folder))
    info = tmp_path / "torchserve-0.12.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchserve\nVersion: 0.12.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\ntorchserve = ts.model_server:start\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def test_the_owner_of_a_command_is_named(scripts: Path) -> None:
    write(scripts / "torchserve", THEIRS)
    write(scripts / "torch-model-archiver", OURS)
    first, second = doctor.command_owners()
    assert first.level == WARN and first.text == f"{scripts}/torchserve is of torchserve 0.12.0, not pyserve's"
    assert "`pyserve torchserve ...` is ours" in first.fix
    assert second.level == PASS


def test_a_command_that_is_not_there_has_another_name(scripts: Path) -> None:
    assert [(check.level, "`pyserve " in check.text) for check in doctor.command_owners()] == [(NOTE, True)] * 2


def test_pyserve_speaks_as_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["torchserve", "--version"]) == 0
    assert capsys.readouterr().out.startswith("TorchServe Version is ")
    with pytest.raises(SystemExit) as ended:
        cli.main(["torch-model-archiver", "--help"])
    assert ended.value.code == 0 and "--serialized-file" in capsys.readouterr().out
