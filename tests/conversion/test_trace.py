"""Eager archives become TorchScript in a process of their own, or say why not."""

from __future__ import annotations

import argparse
import errno
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyserve.archive.archive import Archive, open_archive
from pyserve.commands.inspect_archive import inspect_command
from pyserve.conversion.child import CODE_SIZE, check_room
from pyserve.conversion.record import conversion_file, conversion_of, python_reason
from pyserve.conversion.torchscript import NeedsPythonError, Tracing, needs_tracing, traced_file
from pyserve.errors import ModelLoadError
from tests.support.file_limits import files_of_at_most
from tests.support.packing import EAGER, TENSOR_CONFIG, pack

HANG_S = 120
WEIGHTS = {"linear.weight": torch.arange(8.0).reshape(2, 4), "linear.bias": torch.ones(2)}
NO_WEIGHTS = "import torch\nclass Net(torch.nn.Module):\n    def forward(self, x):\n        {}\n"

OpenPacked = Callable[..., Archive]


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenPacked:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))

    def make(code: str = EAGER, state: dict[str, torch.Tensor] | None = None, config: str = TENSOR_CONFIG) -> Archive:
        return open_archive(pack(tmp_path, model_code=code, state=state, config=config))

    return make


def trace(archive: Archive, timeout_s: float = HANG_S) -> list[str]:
    """The progress it reported."""
    texts: list[str] = []
    with archive:
        Tracing(archive).wait(texts.append, timeout_s)
    return texts


def failure(archive: Archive, timeout_s: float = HANG_S) -> str:
    with pytest.raises(ModelLoadError) as caught:
        trace(archive, timeout_s)
    assert not traced_file(archive).exists()
    return caught.value.message


@pytest.mark.slow
def test_the_traced_model_is_the_eager_one_and_is_kept(packed: OpenPacked) -> None:
    # What the model file prints, even if it looks like a report, is ignored; so is much text on stderr.
    noise = 'import sys\nprint(\'{"error": "mine"}\')\nprint("{", flush=True)\nsys.stderr.write("x" * 300_000)\n'
    archive = packed(noise + EAGER, WEIGHTS)
    assert needs_tracing(archive)
    assert trace(archive) == ["building the model and reading its weights", "tracing", "keeping the TorchScript"]
    assert not needs_tracing(archive)
    kept = traced_file(archive)
    assert {path.name for path in kept.parent.iterdir()} == {kept.name, conversion_file(kept).name}
    conversion = conversion_of(archive)
    assert conversion is not None
    assert (conversion.how, conversion.override) == ("traced", False) and conversion.difference < 1e-6
    x = torch.randn(3, 4)
    torch.testing.assert_close(
        torch.jit.load(str(traced_file(archive)))(x), x @ WEIGHTS["linear.weight"].t() + 1, atol=1e-5, rtol=1e-5
    )


def inspected(archive: Archive, capsys: pytest.CaptureFixture[str]) -> str:
    """The line about the conversion."""
    capsys.readouterr()
    assert inspect_command(argparse.Namespace(archive=str(archive.path))) == 0
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("conversion: "))


@pytest.mark.slow
def test_how_a_model_was_converted_is_shown(packed: OpenPacked, capsys: pytest.CaptureFixture[str]) -> None:
    archive = packed(state=WEIGHTS)
    assert "none kept on this machine" in inspected(archive, capsys)
    trace(archive)
    assert inspected(archive, capsys).startswith("conversion: traced; nothing in it depends on sizes or data; largest ")


@pytest.mark.slow
def test_why_a_model_was_not_converted_is_shown_and_kept(
    packed: OpenPacked, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = packed(NO_WEIGHTS.format("return x * float(x.sum()) if x.numpy().sum() > 0 else x"))
    text = failure(archive)
    assert python_reason(archive) == text and not needs_tracing(archive)
    assert inspected(archive, capsys) == f"conversion: none, it runs in worker processes: {text}"


@pytest.mark.slow
def test_a_model_that_tracing_gets_wrong_is_scripted(packed: OpenPacked) -> None:
    archive = packed(NO_WEIGHTS.format("return x + 1 if bool(x.sum() > 0.05) else x - 1"))
    trace(archive)
    script = torch.jit.load(str(traced_file(archive)))
    for sign in (1, -1):
        assert torch.equal(script(sign * torch.ones(2, 4)), sign * 2 * torch.ones(2, 4))


@pytest.mark.slow
def test_a_model_that_changes_its_input_in_place_is_traced(packed: OpenPacked) -> None:
    archive = packed(NO_WEIGHTS.format("return x.mul_(2).add_(1)"))
    trace(archive)
    assert torch.equal(torch.jit.load(str(traced_file(archive)))(torch.ones(2, 4)), torch.full((2, 4), 3.0))


@pytest.mark.slow
def test_a_model_that_depends_on_the_data_in_python_is_rejected(packed: OpenPacked) -> None:
    text = failure(packed(NO_WEIGHTS.format("return x * len(eval(repr([1] * int(abs(x).sum().item()*100))))")))
    assert "export the model yourself" in text and "depends on the data" in text


@pytest.mark.slow
def test_model_config_can_ask_for_a_trace_that_is_not_proven(packed: OpenPacked) -> None:
    code = NO_WEIGHTS.format("return x + 1 if x.numpy().sum() > -1 else x")
    archive = packed(code, config=TENSOR_CONFIG + "conversion: trace\n")
    trace(archive)
    conversion = conversion_of(archive)
    assert conversion is not None
    assert (conversion.how, conversion.override) == ("traced", True) and "numpy" in conversion.reason


def test_model_config_can_keep_a_model_in_worker_processes(packed: OpenPacked) -> None:
    archive = packed(config=TENSOR_CONFIG + "conversion: python\n")
    assert not needs_tracing(archive) and "conversion: python" in python_reason(archive)
    assert conversion_of(archive) is None


CASES = {
    "missing import": ("import torchvision_that_is_missing\n" + EAGER, None,
                       ["model.py", "No module named 'torchvision_that_is_missing'"]),
    "weights that do not fit": (EAGER, {"linear.weight": torch.ones(3, 3)}, ["weights", "does not fit Net"]),
    "no class": ("import torch\n", None, ["must define exactly one class"]),
    "arguments": (EAGER.replace("__init__(self)", "__init__(self, size)"), None, ["buildable without arguments"]),
    "raises": (NO_WEIGHTS.format("raise ValueError('not today')"), None, ["not today"]),
    "exits": ("import os, sys\nsys.stderr.write('first\\nlast words')\nsys.stderr.flush()\nos._exit(7)\n" + EAGER, None,
              ["exit status 7", "last words"]),
    "crashes": ("import os\nos.kill(os.getpid(), 9)\n" + EAGER, None, ["killed by SIGKILL"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_conversion_that_fails_says_why(packed: OpenPacked, case: str) -> None:
    code, state, parts = CASES[case]
    text = failure(packed(code, state))
    assert all(part in text for part in parts), text
    assert "Traceback" not in text and "\n" not in text


def test_a_conversion_that_hangs_is_ended(packed: OpenPacked) -> None:
    archive = packed("import time\nwhile True: time.sleep(9)\n")
    tracing = Tracing(archive)
    with pytest.raises(ModelLoadError, match="startup_timeout"):
        tracing.wait(lambda text: None, 0.2)
    assert tracing._process.returncode == -signal.SIGKILL
    tracing.stop()
    archive.close()


def test_a_conversion_that_is_not_wanted_any_more_is_ended(packed: OpenPacked) -> None:
    archive = packed("import time\nwhile True: time.sleep(9)\n")
    tracing = Tracing(archive)
    tracing.stop()
    tracing.stop()
    assert tracing._process.returncode == -signal.SIGKILL
    tracing = Tracing(archive)
    with pytest.raises(ModelLoadError, match="not wanted any more"):
        tracing.wait(lambda text: None, 1e6, is_over=lambda: True)
    assert tracing._process.returncode == -signal.SIGKILL
    archive.close()


READS_THE_ENVIRONMENT = """
import os
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.linear(x) * float(os.environ["SCALE_OF_TEST"])
"""


@pytest.mark.slow
def test_what_the_code_reads_from_elsewhere_is_read_once_unless_it_runs_in_python(
    packed: OpenPacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALE_OF_TEST", "2")
    archive = packed(READS_THE_ENVIRONMENT, WEIGHTS)
    trace(archive)
    monkeypatch.setenv("SCALE_OF_TEST", "3")
    assert not needs_tracing(archive)
    program = torch.jit.load(traced_file(archive))
    assert program(torch.ones(1, 4)).tolist() == [[14.0, 46.0]]  # (0 + 1 + 2 + 3 + 1) * 2 and (4 + 5 + 6 + 7 + 1) * 2
    config = TENSOR_CONFIG + "conversion: python\n"
    path = pack(tmp_path, name="n", model_code=READS_THE_ENVIRONMENT, state=WEIGHTS, config=config)
    with open_archive(path) as other:
        assert not needs_tracing(other)
        assert "conversion: python" in python_reason(other)


def test_a_disk_without_room_for_the_torchscript_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=CODE_SIZE + 99))
    check_room("m.mar", tmp_path, 99)
    with pytest.raises(ModelLoadError, match=r"^m\.mar: .*the disk of the cache folder is full .*PYSERVE_CACHE"):
        check_room("m.mar", tmp_path, 100)


WIDE = EAGER.replace("4, 2", "256, 256")
WIDE_WEIGHTS = {"linear.weight": torch.eye(256), "linear.bias": torch.ones(256)}


@pytest.mark.slow
def test_a_torchscript_that_cannot_be_written_is_named_and_made_at_the_next_try(packed: OpenPacked) -> None:
    archive = packed(WIDE, WIDE_WEIGHTS, "input: {dtype: float32, shape: [256]}\n")
    with files_of_at_most(100_000):
        text = failure(archive)
    assert text == (
        "m-1.0.mar: its TorchScript cannot be kept in the cache folder: files may not be that large here (ulimit -f) "
        "(EFBIG: File too large); free space, or set PYSERVE_CACHE to a folder on a larger disk"
    )
    trace(archive)
    assert torch.jit.load(traced_file(archive))(torch.zeros(1, 256)).tolist() == [[1.0] * 256]


@pytest.mark.slow
def test_a_reason_that_cannot_be_written_is_given_all_the_same(
    packed: OpenPacked, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pyserve.conversion.torchscript.write_whole", full)
    code = NO_WEIGHTS.format("return x * len(x.tolist()[0])")
    archive = packed(code)
    with pytest.raises(NeedsPythonError, match="tracing: its code reads numbers or sizes"):
        trace(archive)
    assert needs_tracing(archive)  # it is found out again
