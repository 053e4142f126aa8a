"""A package whose compiled code is not whole fails by itself: the server, and what it serves, stay as they are."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.serving import Load, Server
from tests.support.serving_models import Linear, compile_package, write_compiled, write_linear

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = [pytest.mark.server, pytest.mark.compiles]

INPUT = (4,)


def with_code(whole: Path, path: Path, length: int, *, zeros: bool) -> Path:
    """A copy of the package in which each library has ``length`` bytes, or so many that are not zeros; from the end if
    it is negative. The package itself is whole."""  # fmt: skip
    with zipfile.ZipFile(whole) as before, zipfile.ZipFile(path, "w") as after:
        for each in before.infolist():
            data = before.read(each)
            if each.filename.endswith(".so"):
                kept = data[:length]
                data = kept + bytes(len(data) - len(kept)) if zeros else kept
            after.writestr(each.filename, data)
    return path


@pytest.mark.slow
def test_code_that_was_cut_short_fails_its_own_model_only(server: Server, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("compiling a package needs g++")
    network = Linear(5)
    whole = compile_package(network, torch.randn(2, 4), tmp_path / "whole.pt2")
    write_linear(server.store)
    write_compiled(server.store, whole, INPUT, "whole")
    server.start("--models", "linear.mar")
    pid = server.process.pid
    with Load(server, "linear", Linear(), INPUT, clients=1) as load:
        for length in (0, 100, 4096, 8192, 20_000, -4096, -1):
            for zeros in (False, True):
                if zeros and length == -1:
                    continue  # it may have been one
                damaged = with_code(whole, tmp_path / "damaged.pt2", length, zeros=zeros)
                write_compiled(server.store, damaged, INPUT, "damaged")
                answer = server.ask("POST", "/models?url=damaged.mar&initial_workers=1", port="management")
                assert answer.status >= 400, (length, zeros)
                text = answer.body.decode()
                assert "damaged.pt2: its compiled code (" in text and "copy the file again" in text, text
                assert server.process.pid == pid
        load.wait_for_more(5)
    server.manage("POST", "/models?url=whole.mar&initial_workers=1")
    with Load(server, "whole", network, INPUT, clients=1) as load:
        load.wait_for_more(5)
    assert server.process.pid == pid
