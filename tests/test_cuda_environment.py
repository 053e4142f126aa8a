"""What the server process is given for CUDA, and nobody else is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pyserve import cuda_environment, launch
from pyserve.cuda_environment import SET_HERE, has_nvidia_driver, knows_catch_all, server_variables, without_own

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"
ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    folder = tmp_path / "proc/driver/nvidia"
    folder.mkdir(parents=True)
    (folder / "version").write_text("NVRM version: NVIDIA UNIX")
    return tmp_path


def test_it_is_set_where_there_is_a_driver_and_the_user_has_not_set_it(driver: Path) -> None:
    assert has_nvidia_driver(driver) and not has_nvidia_driver(driver / "proc")
    added = server_variables({"A": "b"}, driver)
    assert added[NAME] == "32"
    assert without_own({"A": "b", **added}) == {"A": "b"}
    assert NAME not in server_variables({NAME: "8"}, driver)
    assert without_own({NAME: "8"}) == {NAME: "8"}
    assert server_variables({}, driver / "proc") == {}


def test_pinned_memory_of_a_lost_device_is_kept_where_torch_can(driver: Path, tmp_path: Path) -> None:
    wanted = "pinned_free_catch_all:true" if knows_catch_all() else None
    assert server_variables({}, driver).get(ALLOCATOR) == wanted
    for name in (ALLOCATOR, "PYTORCH_ALLOC_CONF"):
        assert ALLOCATOR not in server_variables({name: "expandable_segments:True"}, driver), "the user's stays"
    header = tmp_path / "torch/include/c10/cuda/CUDAAllocatorConfig.h"
    assert not knows_catch_all(tmp_path / "torch")
    header.parent.mkdir(parents=True)
    header.write_text("// an older one")
    assert not knows_catch_all(tmp_path / "torch")
    header.write_text("static bool pinned_free_catch_all()")
    assert knows_catch_all(tmp_path / "torch")


def test_containers_show_the_driver_as_a_device(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert has_nvidia_driver(tmp_path)


@pytest.mark.parametrize("variable", [launch.SERVER_VARIABLE, launch.SUPERVISOR_VARIABLE])
def test_the_server_has_it_and_what_the_server_starts_has_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    monkeypatch.setattr(cuda_environment, "has_nvidia_driver", lambda root: True)
    monkeypatch.delenv(NAME, raising=False)
    script = f"import os; print(os.environ.get('{NAME}'), end='')"
    output = tmp_path / "output"
    with output.open("w") as file:
        child = launch.spawn([sys.executable, "-c", script], variable, {}, output_fd=file.fileno())
        child.popen.wait()
        os.close(child.reports_fd)
    assert output.read_text() == ("32" if variable == launch.SERVER_VARIABLE else "None")

    for name, value in server_variables({}).items():
        monkeypatch.setenv(name, value)
    assert not {NAME, SET_HERE} & launch.child_environment().keys()
