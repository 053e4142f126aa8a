"""Versions that an archive was packed with, beside those that run."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from pyserve.archive import versions
from pyserve.archive.archive import open_archive
from tests.support.handler_archives import write_handler


def test_archive_records_what_its_code_imports(tmp_path: Path) -> None:
    path = write_handler(tmp_path, "m", "import os\nimport yaml\nimport torch\n\ndef handle(data, context): pass\n")
    with open_archive(path, cache_dir=tmp_path / "cache") as archive:
        recorded = archive.manifest.extra[versions.MANIFEST_KEY]
    assert recorded["python"] == platform.python_version()
    assert recorded["torch"] == torch.__version__
    assert {name.lower() for name in recorded["packages"]} == {"pyyaml"}
    assert versions.differences(recorded) == []


def test_reproducible_archive_records_nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    with open_archive(write_handler(tmp_path, "m", None, handler="tensor", network=torch.nn.Identity()),
                      cache_dir=tmp_path / "cache") as archive:  # fmt: skip
        assert archive.manifest.extra == {}


def test_other_versions_are_told_and_patch_levels_are_not() -> None:
    major, minor, *_ = platform.python_version_tuple()
    recorded = {"python": f"{major}.{minor}.99", "torch": "1.2.3+cpu", "packages": {"no-such-package": "4.5"}}
    assert [str(each) for each in versions.differences(recorded)] == [
        f"torch 1.2.3+cpu, here {versions.installed('torch')}",
        "no-such-package 4.5, here not installed",
    ]


@pytest.mark.parametrize("recorded", [None, [], "x", {"packages": []}, {"python": 3, "packages": {"a": None}}])
def test_manifest_of_others_may_hold_anything_there(recorded: object) -> None:
    assert versions.differences(recorded) == []


def test_requirements_that_are_not_met() -> None:
    text = "# comment\n-r other.txt\ntorch>=1\nnumpy==0.1 ; python_version > '3'\nno-such-package[x]>=2\nx @ http://y\n"
    assert [(each.name, each.wanted) for each in versions.unmet_requirements(text)] == [
        ("numpy", "0.1"), ("no-such-package", "(any)"),
    ]  # fmt: skip
