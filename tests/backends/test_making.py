"""A child process makes an archive's model for other backends, compares it, and keeps it; or says why not."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyserve.archive.archive import Archive, open_archive
from pyserve.backends import child, making, table
from pyserve.backends.child import check_room, failure_of
from pyserve.backends.kept import Made, main_file, read_made
from pyserve.backends.making import GIVING_WAY, STOPPED, Making
from pyserve.backends.precision import PrecisionAgreement
from pyserve.backends.sources import LOWER, UnsuitableError, open_source
from pyserve.errors import ModelLoadError
from pyserve.proof.comparison import difference
from pyserve.proof.package_rules import read_program
from tests.support.file_limits import files_of_at_most
from tests.support.packing import EAGER, pack

HANG_S = 300
LIMIT_S = 60
WEIGHTS = {"linear.weight": torch.arange(8.0).reshape(2, 4), "linear.bias": torch.ones(2)}
NET = "import torch\nclass Net(torch.nn.Module):\n{}    def forward(self, {}):\n        {}\n"

# A model's own code may write where reports go.
NOISE = r"""import os, sys
for line in (b"hello", b"[" * 100_000, b"7", b'{"made": 5}', b'{"made": "{}"}', b'{"backend": [1]}', b"\xff"):
    os.write(int(sys.argv[1]), line + b"\n")
"""

OpenPacked = Callable[..., Archive]

needs_openvino = pytest.mark.skipif(bool(table.BACKENDS["openvino"].missing()), reason="needs OpenVINO")


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenPacked:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    return lambda **given: open_archive(pack(tmp_path, **given))


def make(archive: Archive, *backends: str, texts: list[str] | None = None) -> list[Made]:
    return Making(archive, backends, batch_size_max=4, nice=0).wait(
        [].append if texts is None else texts.append, HANG_S
    )


@needs_openvino
@pytest.mark.slow
def test_an_eager_model_is_made_compared_and_kept(packed: OpenPacked) -> None:
    texts: list[str] = []
    with packed(model_code=NOISE + EAGER, state=WEIGHTS) as archive:
        [made] = make(archive, "openvino", texts=texts)
        assert made.error == "" and made.difference <= table.AGREEMENT["fp32"] and made.probes > 5 and made.size > 0
        assert made.sizes == (((4, 4),),) and made.ranges == (None,)
        assert texts[-2:] == ["making it for OpenVINO", "comparing OpenVINO with the model"]
        assert read_made(archive, "openvino", "fp32") == made
        assert main_file(archive, "openvino", "fp32").is_file()
        again = Making(archive, ["openvino"])
        assert again._process is None and again.wait(texts.append, 0.0) == [made], "nothing is made twice"
        folder = main_file(archive, "openvino", "fp32").parents[1]
        assert [each.name for each in folder.iterdir()] == [main_file(archive, "openvino", "fp32").parent.name]


@needs_openvino
@pytest.mark.slow
def test_what_any_engine_loses_at_a_lower_precision_is_no_objection(
    packed: OpenPacked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A difference of two large numbers: in bf16 torch itself is off by far more than what engines may differ by."""
    code = NET.format(
        "    def __init__(self):\n        super().__init__()\n        self.linear = torch.nn.Linear(4, 2)\n", "x",
        "return torch.tanh(self.linear(x)) * 20 - torch.tanh(self.linear(x * 1.02)) * 19.9",
    )  # fmt: skip
    with packed(model_code=code, state=WEIGHTS) as archive:
        [made] = Making(archive, ["openvino"], "bf16", batch_size_max=4, nice=0).wait([].append, HANG_S)
        monkeypatch.chdir(tmp_path)  # opening goes elsewhere, and this comes back
        source = open_source(archive, [].append)
        probe = source.probes(4)[0].inputs
        assert difference(source.run(probe), source.run_at(LOWER["bf16"], probe)) > table.AGREEMENT["bf16"]
    assert made.error == ""


LOOKING_UP = """    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(50, 8)
        self.places = torch.nn.Embedding(30, 8)
"""
TWO_INPUTS = "input:\n- {name: ids, dtype: int64, shape: [-1]}\n- {name: mask, dtype: int64, shape: [-1]}\n"


@needs_openvino
@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.bin", "model.xml"])
def test_what_was_damaged_since_it_was_kept_is_made_again(packed: OpenPacked, name: str) -> None:
    with packed(model_code=EAGER, state=WEIGHTS) as archive:
        [made] = make(archive, "openvino")
        path = main_file(archive, "openvino", "fp32").with_name(name)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
        [again] = make(archive, "openvino")
        assert (again.error, again.digests) == ("", made.digests) and path.read_bytes() == whole


@needs_openvino
@pytest.mark.slow
def test_what_a_model_looks_up_bounds_numbers_and_sizes(packed: OpenPacked) -> None:
    code = NET.format(
        LOOKING_UP,
        "ids, mask",
        """x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return {"y": (x * mask.unsqueeze(-1)).mean(1), "x": x}""",
    )
    torch.manual_seed(0)
    state = {"words.weight": torch.randn(50, 8), "places.weight": torch.randn(30, 8)}
    with packed(model_code=code, state=state, config=TWO_INPUTS) as archive:
        [made] = make(archive, "openvino")
        assert made.error == ""
        assert made.ranges == ((0, 49), (-(1 << 31), (1 << 31) - 1))
        assert made.sizes == (((1, 30),), ((1, 30),))
        # The engine checks inputs against the sizes in the file; its converter makes all of them free.
        assert 'shape="?,1..30"' in main_file(archive, "openvino", "fp32").read_text()


@needs_openvino
@pytest.mark.slow
def test_a_script_is_made_of_its_graph_with_a_free_batch(packed: OpenPacked) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    with packed(network=network) as archive:
        [made] = make(archive, "openvino")
        assert made.error == "" and made.difference <= table.AGREEMENT["fp32"]


@pytest.mark.skipif(bool(table.BACKENDS["aotinductor"].missing()), reason="needs a C++ compiler")
@pytest.mark.slow
def test_a_package_is_compiled_for_any_batch_and_any_number_of_threads(packed: OpenPacked) -> None:
    with packed(model_code=EAGER, state=WEIGHTS) as archive:
        [made] = make(archive, "aotinductor")
        assert made.error == "" and made.difference <= table.AGREEMENT["fp32"] and made.probes > 5
        path = main_file(archive, "aotinductor", "fp32")
        assert sorted(each.name for each in path.parent.iterdir()) == ["made.json", "package.pt2"]
        found = read_program(path, path.name)
        assert (found.rows_min, found.rows_max, found.written) == (1, None, ())
        with zipfile.ZipFile(path) as package:
            sources = [package.read(name) for name in package.namelist() if name.endswith(".cpp")]
        # Otherwise the threads of the process that compiled it would be those of every worker.
        assert sources and not any(b"num_threads(" in each for each in sources)


@needs_openvino
@pytest.mark.slow
def test_one_that_cannot_be_made_says_why_and_is_not_tried_again(packed: OpenPacked) -> None:
    code = NET.format("", "x", "return x + torch.rand(())")
    with packed(model_code=code) as archive:
        [made] = make(archive, "openvino")
        assert "random" in made.error and made.lasts
        again = Making(archive, ["openvino"])
        assert again._process is None and again.wait(print, 0.0) == [made]
        assert not main_file(archive, "openvino", "fp32").exists()


@pytest.mark.slow
def test_a_child_that_dies_says_how(packed: OpenPacked) -> None:
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n" + EAGER
    with packed(model_code=code, state=WEIGHTS) as archive:
        [made] = make(archive, "aotinductor")
        assert "SIGKILL" in made.error and not made.lasts
        assert read_made(archive, "aotinductor", "fp32") is None, "another try may do better"


@pytest.mark.slow
def test_what_a_child_that_dies_has_started_ends_and_its_files_go(packed: OpenPacked, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"""import os, signal, subprocess, tempfile
tempfile.mkdtemp()
open({str(note)!r}, "w").write(str(subprocess.Popen(["sleep", "{HANG_S}"]).pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    with packed(model_code=code + EAGER, state=WEIGHTS) as archive:
        [made] = make(archive, "aotinductor")
        assert "SIGKILL" in made.error
        folder = main_file(archive, "aotinductor", "fp32").parents[1]
        assert not list(folder.iterdir())
    started = Path(f"/proc/{note.read_text()}/stat")
    with contextlib.suppress(FileNotFoundError):  # nobody may have reaped it
        deadline = time.monotonic() + LIMIT_S  # killed already, but not yet scheduled
        while started.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline, "it still runs"
            time.sleep(0.05)


def test_one_that_cannot_be_started_says_why(packed: OpenPacked, monkeypatch: pytest.MonkeyPatch) -> None:
    def stderr_file() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(making, "stderr_file", stderr_file)
    with packed(model_code=EAGER, state=WEIGHTS) as archive:
        [made] = make(archive, "aotinductor")
        assert made.error == "its process cannot be started: Too many open files" and not made.lasts


@pytest.mark.slow
def test_stopping_ends_it_at_once(packed: OpenPacked) -> None:
    code = "import time\ntime.sleep(1e6)\n" + EAGER
    with packed(model_code=code, state=WEIGHTS) as archive:
        under_way = Making(archive, ["aotinductor"])
        found: list[list[Made]] = []
        is_building = threading.Event()
        waiting = threading.Thread(
            target=lambda: found.append(under_way.wait(lambda text: is_building.set(), HANG_S)), daemon=True
        )
        waiting.start()
        try:
            assert is_building.wait(HANG_S)
            assert under_way._process is not None
            process = Path(f"/proc/{under_way._process.pid}")
            nice = min(19, os.getpriority(os.PRIO_PROCESS, 0) + GIVING_WAY)
            assert process.joinpath("stat").read_text().rpartition(")")[2].split()[16] == str(nice)
            if process.joinpath("autogroup").exists():
                assert process.joinpath("autogroup").read_text().rstrip().endswith(f"nice {GIVING_WAY}")
        finally:
            under_way.stop()
            under_way.stop()
            waiting.join(HANG_S)
        assert found[0][0].error == STOPPED and not found[0][0].lasts


def test_one_that_nobody_wants_any_more_ends(packed: OpenPacked) -> None:
    with packed(model_code="import time\ntime.sleep(1e6)\n" + EAGER, state=WEIGHTS) as archive:
        [made] = Making(archive, ["aotinductor"], is_over=lambda: True).wait(print, HANG_S)
        assert made.error == STOPPED and not made.lasts


@needs_openvino
@pytest.mark.slow
def test_what_the_models_code_has_started_is_not_waited_for(packed: OpenPacked, tmp_path: Path) -> None:
    file = tmp_path / "started"
    code = f"""import os, time
if os.fork() == 0:
    os.setsid()
    with open({str(file)!r}, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(1e6)
"""
    with packed(model_code=code + EAGER, state=WEIGHTS) as archive:
        try:
            [made] = Making(archive, ["openvino"], nice=0).wait(print, 1e6)
            assert made.error == ""
        finally:
            os.kill(int(file.read_text()), signal.SIGKILL)


@pytest.mark.slow
def test_stopping_does_not_wait_for_files_that_are_removed(packed: OpenPacked, monkeypatch: pytest.MonkeyPatch) -> None:
    is_removing, may_end = threading.Event(), threading.Event()

    def remove_left_drafts(folder: Path) -> None:
        is_removing.set()
        assert may_end.wait(HANG_S)

    monkeypatch.setattr(making, "remove_left_drafts", remove_left_drafts)
    with packed(model_code="import time\ntime.sleep(1e6)\n" + EAGER, state=WEIGHTS) as archive:
        under_way = Making(archive, ["aotinductor"])
        waiting = threading.Thread(target=under_way.wait, args=(print, 0.1))
        waiting.start()
        assert is_removing.wait(HANG_S)
        stopping = threading.Thread(target=under_way.stop)
        stopping.start()
        stopping.join(10.0)
        has_stopped = not stopping.is_alive()
        may_end.set()
        waiting.join(HANG_S)
        assert has_stopped


@pytest.mark.slow
def test_one_that_takes_too_long_is_ended_and_names_the_limit(packed: OpenPacked) -> None:
    with packed(model_code="import time\ntime.sleep(1e6)\n" + EAGER, state=WEIGHTS) as archive:
        [made] = Making(archive, ["aotinductor"]).wait(print, 0.5)
        assert "took longer than" in made.error and not made.lasts


@needs_openvino
@pytest.mark.slow
def test_one_that_takes_too_long_may_go_on_in_the_same_process(packed: OpenPacked, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    held = f"import os, time\nwhile not os.path.exists({str(gate)!r}):\n    time.sleep(0.01)\n"
    with packed(model_code=held + EAGER, state=WEIGHTS) as archive:
        under_way = Making(archive, ["openvino"], nice=0)
        assert under_way._process is not None
        pid = under_way._process.pid
        assert list(under_way.each(print, 0.1, continues=True)) == [] and under_way.is_late
        assert under_way._process.pid == pid
        under_way.give_way()
        assert os.getpriority(os.PRIO_PROCESS, pid) == GIVING_WAY
        gate.touch()
        [made] = under_way.each(print, HANG_S)
        assert made.error == "" and not under_way.is_late
        folder = main_file(archive, "openvino", "fp32").parents[1]
        assert [each.name for each in folder.iterdir()] == [main_file(archive, "openvino", "fp32").parent.name]


def test_without_what_it_needs_nothing_is_started(packed: OpenPacked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with packed(model_code=EAGER, state=WEIGHTS) as archive:
        nothing = Making(archive, ["torchscript", "aotinductor"])
        assert nothing._process is None
        first, second = nothing.wait(print, 0.0)
        assert first.error == "" and "no-such-compiler" in second.error
        [other] = Making(archive, ["torchscript"], "int8").wait(print, 0.0)
        assert other.error == "", "nothing is to be made for TorchScript"


@pytest.mark.parametrize(
    ("error", "lasts", "text"),
    [
        (RuntimeError("no lowering for aten.foo"), True, "RuntimeError: no lowering for aten.foo"),
        (RuntimeError("write failed: No space left on device"), False, "No space left"),
        (MemoryError(), False, "not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device"), False, "set PYSERVE_CACHE"),
        (ModelLoadError("its weights do not fit"), False, "its weights do not fit"),
        (UnsuitableError("it draws random numbers"), True, "it draws random numbers"),
    ],
    ids=["torch", "torch, on a full disk", "memory", "disk", "archive", "unsuitable"],
)
def test_only_what_would_come_again_is_kept(error: Exception, lasts: bool, text: str) -> None:
    found = failure_of(error)
    assert found["lasts"] is lasts and text in found["error"]


def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"is full .* set PYSERVE_CACHE"):
        check_room(tmp_path, 1 << 60)
    check_room(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_that_no_disk_has_shows_before_and_after(tmp_path: Path) -> None:
    with files_of_at_most(100_000), pytest.raises(OSError, match="File too large"):
        check_room(tmp_path, 100_001)
    with files_of_at_most(100_000):
        check_room(tmp_path, 99_999)
    assert list(tmp_path.iterdir()) == []


WIDE = EAGER.replace("4, 2", "256, 256")
WIDE_WEIGHTS = {"linear.weight": torch.eye(256), "linear.bias": torch.ones(256)}


@needs_openvino
@pytest.mark.slow
def test_one_that_cannot_be_written_is_named_and_made_at_the_next_try(packed: OpenPacked) -> None:
    """OpenVINO itself says "basic_ios::clear: iostream error"."""
    config = "input: {dtype: float32, shape: [256]}\n"
    with packed(model_code=WIDE, state=WIDE_WEIGHTS, config=config) as archive:
        with files_of_at_most(100_000):
            [made] = make(archive, "openvino")
        assert made.error == (
            "what is made cannot be kept: files may not be that large here (ulimit -f) (EFBIG: File too large); "
            "free space, or set PYSERVE_CACHE to a folder on a larger disk"
        )
        assert not made.lasts and read_made(archive, "openvino", "fp32") is None
        [made] = make(archive, "openvino")
        assert made.error == ""


def test_a_disk_that_became_full_meanwhile_is_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails then fails in words of the library's, and would not do so again."""

    def full(folder: Path, size: int) -> None:
        looks.append(size)
        if len(looks) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: object) -> None:
        raise UnsuitableError("OpenVINO cannot compile it: wrong size of model.bin")

    looks: list[int] = []
    monkeypatch.setattr(child, "check_room", full)
    monkeypatch.setattr("pyserve.backends.to_openvino.make", fail)
    source = SimpleNamespace(notes=[], archive=None, model=torch.nn.Linear(4, 2))
    monkeypatch.setattr(child, "draft", lambda *_: contextlib.nullcontext(tmp_path))
    with pytest.raises(OSError, match="No space") as caught:
        child._make(source, Made("openvino", "fp32"), [], {}, lambda text: None)
    assert not failure_of(caught.value)["lasts"]


@needs_openvino
@pytest.mark.slow
def test_int8_is_calibrated_compared_with_fp32_and_says_so(packed: OpenPacked, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    folder = tmp_path / "inputs"
    folder.mkdir()
    torch.save(torch.rand(20, 4), folder / "a.pt")
    (folder / "broken.npy").write_bytes(b"nothing")
    texts: list[str] = []
    with packed(model_code=EAGER, state=WEIGHTS, calibration=folder) as archive:
        [made] = Making(archive, ["openvino"], "int8", 4).wait(texts.append, HANG_S)
        assert made.error == "" and made.agreement is not None
        agreement = PrecisionAgreement.from_json(made.agreement)
        assert agreement.items == 20 and agreement.top1 == 1.0 and 0 < agreement.largest < 0.5
        assert "calibrating (1 of 20)" in texts and "comparing int8 with fp32 on 20 calibration items" in texts
        assert read_made(archive, "openvino", "int8") == made and read_made(archive, "openvino", "fp32") is None


@needs_openvino
@pytest.mark.slow
def test_int8_without_a_file_that_can_be_used_names_one(packed: OpenPacked, tmp_path: Path) -> None:
    pytest.importorskip("nncf")
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs/broken.npy").write_bytes(b"nothing")
    with packed(model_code=EAGER, state=WEIGHTS, calibration=tmp_path / "inputs") as archive:
        [made] = Making(archive, ["openvino"], "int8", 4).wait([].append, HANG_S)
        assert "calibration/broken.npy: it cannot be read" in made.error and not made.lasts
        assert read_made(archive, "openvino", "int8") is None
