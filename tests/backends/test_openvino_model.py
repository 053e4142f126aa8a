"""OpenVINO's models in the native engine: their answers, threads, errors and ends."""

# TorchScript and torch.export read `forward` as it is.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyserve import _core
from tests.support.lane_bench import LaneBench
from tests.support.networks import Affine, Conv, Outputs
from tests.support.openvino_files import library, save_openvino

COUNTING = """
#include <cstddef>
#include <dlfcn.h>
extern "C" {
long started = 0, compiled = 0, freed = 0;
// Asked once of each model that was compiled.
int ov_compiled_model_inputs_size(const void* model, size_t* size) {
    using Real = int (*)(const void*, size_t*);
    static auto real = reinterpret_cast<Real>(dlsym(RTLD_NEXT, "ov_compiled_model_inputs_size"));
    __atomic_add_fetch(&compiled, 1, __ATOMIC_SEQ_CST);
    return real(model, size);
}
void ov_compiled_model_free(void* model) {
    static auto real = reinterpret_cast<void (*)(void*)>(dlsym(RTLD_NEXT, "ov_compiled_model_free"));
    real(model);
    __atomic_add_fetch(&freed, 1, __ATOMIC_SEQ_CST);
}
int ov_infer_request_start_async(void* request) {
    static auto real = reinterpret_cast<int (*)(void*)>(dlsym(RTLD_NEXT, "ov_infer_request_start_async"));
    __atomic_add_fetch(&started, 1, __ATOMIC_SEQ_CST);
    return real(request);
}
}
"""
ITEM = [torch.zeros(1, 16)]
HANG_S = 60


class Looked(nn.Module):
    """Whole numbers in; numbers of several kinds out."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, ids, mask):
        rows = self.table(ids)
        return rows.sum(1), (rows[:, :, 0] > 0) & mask, ids + 1


class Long(nn.Module):
    """Takes seconds, in many operators."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.rand(1024, 1024) / 512)

    def forward(self, x):
        for _ in range(400):
            x = torch.tanh(x @ self.weights)
        return x.sum((1, 2))


class Wide(nn.Module):
    """Takes long for each item, with few weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.others = nn.ModuleList(nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for each in self.others:
            x = torch.tanh(each(x))
        return x.mean((2, 3)), x.amax((2, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openvino")


@pytest.fixture(scope="module")
def affine(folder: Path) -> Path:
    return save_openvino(Affine(), folder / "affine.xml", [torch.randn(4, 16)])


def load(path: Path, example: list[torch.Tensor] = ITEM, **options: Any) -> _core.TorchModel:
    options.setdefault("library", library())
    return _core.TorchModel.load(str(path), example, backend="openvino", **options)


@pytest.fixture(scope="module")
def counting(folder: Path) -> str:
    """OpenVINO's C library, which counts the runs that are started."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    real, source, path = Path(library()), folder / "counting.cpp", folder / "libcounting.so"
    source.write_text(COUNTING)
    subprocess.run(
        ["g++", "-shared", "-fPIC", str(source), "-o", str(path), "-Wl,--no-as-needed", str(real),
         f"-Wl,-rpath,{real.parent}", "-ldl"],
        check=True,
    )  # fmt: skip
    return str(path)


def started(counting: str) -> int:
    return count_of(counting, "started")


def count_of(counting: str, name: str) -> int:
    return ctypes.c_long.in_dll(ctypes.CDLL(counting), name).value


def await_threads(model: _core.TorchModel, expected: tuple[int, int]) -> None:
    """Until what is compiled beside the runs is there."""
    end = time.monotonic() + HANG_S
    while model.streams_and_threads != expected:
        assert time.monotonic() < end, model.streams_and_threads
        time.sleep(0.01)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_it_answers_as_torch_does_for_any_batch(affine: Path, batch_size: int) -> None:
    model = load(affine)
    x = torch.randn(batch_size, 16, generator=torch.Generator().manual_seed(batch_size))
    torch.testing.assert_close(model.run([x]), Affine()(x), atol=1e-5, rtol=1e-5)
    strided = torch.cat([x, x], dim=1)[:, :16]  # memory in another order than its indices
    torch.testing.assert_close(model.run([strided]), Affine()(x), atol=1e-5, rtol=1e-5)
    assert model.backend == "openvino" and model.weights_size >= (16 * 5 + 5) * 4


def test_several_outputs_come_in_order_and_in_their_types(folder: Path) -> None:
    ids, mask = torch.tensor([[1, 2, 3], [9, 0, 4]]), torch.tensor([[True, False, True], [True, True, True]])
    network = Looked().eval()
    path = save_openvino(network, folder / "looked.xml", [ids, mask])
    got = load(path, [ids[:1], mask[:1]]).run([ids, mask])
    for each, expected in zip(got, network(ids, mask), strict=True):
        assert each.dtype == expected.dtype
        torch.testing.assert_close(each, expected)


def test_later_runs_do_not_write_into_earlier_answers(affine: Path) -> None:
    model = load(affine)
    first = model.run([torch.ones(3, 16)])
    kept = first.clone()
    model.run([torch.full((3, 16), 7.0)])
    assert torch.equal(first, kept)


def test_threads_that_run_it_at_once_get_their_own_answers(affine: Path, seed: int) -> None:
    model = load(affine, runners_max=3)
    network = Affine()
    wrong: list[int] = []

    def ask(number: int) -> None:
        generator = torch.Generator().manual_seed(seed + number)
        for _ in range(50):
            x = torch.randn(1 + number, 16, generator=generator)
            if not torch.allclose(model.run([x]), network(x), atol=1e-4):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(HANG_S)
    assert not wrong
    streams, count = model.streams_and_threads
    assert count == 1 and streams <= 3  # never more threads than there are CPUs to be used


def test_threads_are_compiled_for_and_stay_within_the_cpus(affine: Path) -> None:
    model = load(affine, runners_max=4, workers=2, threads=2)
    assert model.streams_and_threads == (2, 2)
    assert load(affine, runners_max=2, workers=8).streams_and_threads == (2, 1)
    assert load(affine, runners_max=8).streams_and_threads == (1, 1)  # one worker needs no more
    model.prepare_threads(4)
    assert model.streams_and_threads == (1, 4)
    expected = Affine()(torch.ones(2, 16))
    model.use_threads(1)  # beside the runs that go on
    torch.testing.assert_close(model.run([torch.ones(2, 16)]), expected, atol=1e-5, rtol=1e-5)
    await_threads(model, (2, 1))  # as many workers as before
    for count in (3, 2, 4, 1, 2):  # the last wish counts
        model.use_threads(count)
    await_threads(model, (2, 2))
    torch.testing.assert_close(model.run([torch.ones(2, 16)]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_aside", [False, True])
def test_one_compiled_anew_has_run_in_every_stream_what_was_run_before(
    affine: Path, counting: str, is_aside: bool
) -> None:
    model = load(affine, library=counting, runners_max=3, workers=1, threads=3)
    before = started(counting)
    model.prepare_threads(2)
    assert started(counting) == before, "nothing was run that could be run again"
    for rows in (1, 4, 4, 1):
        model.run([torch.ones(rows, 16)])
    before = started(counting)
    if is_aside:
        model.use_threads(1, workers=3)
        await_threads(model, (3, 1))
    else:
        model.prepare_threads(1, workers=3)
    assert model.streams_and_threads == (3, 1)
    assert started(counting) - before == 3 * 2, "two sizes, before it takes the other's place"


def test_streams_are_as_many_as_workers_within_the_cpus(affine: Path) -> None:
    model = load(affine, runners_max=4, workers=1, threads=4)
    for workers, threads, streams in ((2, 2, 2), (0, 1, 2), (3, 1, 3), (9, 1, 4), (1, 1, 1)):
        model.prepare_threads(threads, workers=workers)
        assert model.streams_and_threads == (streams, threads)


def test_streams_share_what_memory_the_largest_batch_takes(folder: Path, counting: str) -> None:
    """Each keeps that of its largest run: batches go in pieces, where computing takes longer than reading weights."""
    network = Wide().eval()
    path = save_openvino(network, folder / "wide.xml", [torch.randn(4, 3, 64, 64)])
    model = load(path, [torch.zeros(1, 3, 64, 64)], library=counting, runners_max=2, workers=2, threads=1)
    assert model.streams_and_threads == (2, 1)
    for rows, runs in ((1, 1), (8, 2), (4, 1), (5, 2), (8, 2), (16, 2), (8, 1)):
        x = torch.randn(rows, 3, 64, 64)
        before = started(counting)
        found = model.run([x])
        assert started(counting) - before == runs, rows
        with torch.no_grad():
            torch.testing.assert_close(found, network(x), atol=1e-4, rtol=1e-4)
    model.prepare_threads(2, workers=1)
    before = started(counting)
    model.run([torch.randn(16, 3, 64, 64)])
    assert started(counting) - before == 1, "one stream has all memory there is"


def test_networks_that_take_no_time_run_batches_whole(affine: Path, counting: str) -> None:
    model = load(affine, library=counting, runners_max=2, workers=2, threads=1)
    for _ in range(3):
        model.run([torch.ones(8, 16)])
    before = started(counting)
    torch.testing.assert_close(model.run([torch.ones(8, 16)]), Affine()(torch.ones(8, 16)), atol=1e-5, rtol=1e-5)
    assert started(counting) - before == 1


def test_a_model_that_goes_while_another_is_compiled_leaves_nothing_behind(affine: Path, counting: str) -> None:
    compiled, freed = count_of(counting, "compiled"), count_of(counting, "freed")
    for count in (2, 3, 4):
        model = load(affine, library=counting, runners_max=4)
        for rows in range(1, 9):
            model.run([torch.ones(rows, 16)])
        model.use_threads(count)
        del model
    end = time.monotonic() + HANG_S
    while count_of(counting, "freed") - freed != count_of(counting, "compiled") - compiled:
        assert time.monotonic() < end, "a model that was compiled is still there"
        time.sleep(0.01)
    assert count_of(counting, "freed") - freed >= 3


def test_a_worker_that_joins_others_does_not_run_again_what_they_have_run(affine: Path, counting: str) -> None:
    bench = LaneBench(affine, ITEM, workers=0, batch=8, model={"backend": "openvino", "library": counting})
    bench.lane.set_warm_up(items=[], items_limit_s=HANG_S, sizes_limit_s=HANG_S)
    before = started(counting)
    bench.lane.set_workers(1)
    bench.wait(lambda: bench.states() == ["ready"])
    assert started(counting) - before == 4, "1, 2, 4 and 8 rows"
    before = started(counting)
    bench.lane.set_workers(3)
    bench.wait(lambda: bench.states() == ["ready"] * 3)
    assert started(counting) - before == 2 * 2, "one row and the largest batch of each, which have to end well"
    bench.close()


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ([torch.zeros(1, 16, dtype=torch.float64)], "takes Float, got Double"),
        ([torch.zeros(1, 16), torch.zeros(1, 16)], "takes 1 inputs, got 2"),
        ([torch.zeros(1, 15)], r"takes \[\?, 16\], got \[1, 15\]"),
        ([torch.zeros(1, 16, 1)], r"takes \[\?, 16\], got \[1, 16, 1\]"),
    ],
)
def test_inputs_that_it_does_not_take_are_refused_and_harm_no_later_one(
    affine: Path, inputs: list[torch.Tensor], text: str
) -> None:
    model = load(affine)
    with pytest.raises((ValueError, RuntimeError), match=text):
        model.run(inputs)
    torch.testing.assert_close(model.run(ITEM), Affine()(ITEM[0]), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_loaded_says_why(affine: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.xml").write_text("")
    with pytest.raises(RuntimeError, match="OpenVINO cannot use the model"):
        load(tmp_path / "empty.xml")
    with pytest.raises(RuntimeError, match="OpenVINO cannot use the model"):
        load(tmp_path / "nowhere.xml")
    shutil.copy(affine, tmp_path / "cut.xml")
    (tmp_path / "cut.bin").write_bytes(affine.with_suffix(".bin").read_bytes()[:40])
    with pytest.raises(RuntimeError, match="OpenVINO cannot use the model"):
        load(tmp_path / "cut.xml")
    with pytest.raises(RuntimeError, match=r"library cannot be loaded: .*libopenvino_c.so"):
        _core.TorchModel.load(str(affine), ITEM, backend="openvino", library=str(tmp_path / "libopenvino_c.so"))
    with pytest.raises(ValueError, match="has 1 inputs as OpenVINO has it, not 2"):
        load(affine, [*ITEM, *ITEM])
    with pytest.raises(ValueError, match="torchscript, aotinductor, openvino, not abacus"):
        _core.TorchModel.load(str(affine), ITEM, backend="abacus")


def test_a_lane_serves_it_with_several_workers(folder: Path) -> None:
    network = Conv().eval()
    path = save_openvino(network, folder / "conv.xml", [torch.rand(2, 3, 12, 12)])
    options = {"backend": "openvino", "library": library(), "runners_max": 2, "workers": 2}
    bench = LaneBench(path, [torch.zeros(1, 3, 12, 12)], workers=2, batch=4, model=options)
    try:
        pictures = torch.rand(40, 1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
        for owner, picture in enumerate(pictures):
            bench.submit(owner, picture)
        bench.wait_for(len(pictures))
        for owner, picture in enumerate(pictures):
            torch.testing.assert_close(bench.answers[owner], network(picture)[0], atol=1e-5, rtol=1e-5)
        assert bench.model.streams_and_threads == (2, 1)
    finally:
        bench.close()


def test_a_lane_tells_it_how_many_threads_there_are(affine: Path) -> None:
    options = {"backend": "openvino", "library": library(), "runners_max": 2, "workers": 1}
    bench = LaneBench(affine, ITEM, model=options)
    try:
        bench.lane.set_intra_op_threads(2)
        bench.submit("one", torch.ones(1, 16))
        bench.wait_for(1)
        await_threads(bench.model, (1, 2))
        bench.lane.set_intra_op_threads(1)
        bench.lane.set_workers(2)
        await_threads(bench.model, (2, 1))
    finally:
        bench.close()


def test_a_run_that_takes_too_long_ends_behind_its_operator(folder: Path) -> None:
    path = save_openvino(Long(), folder / "long.xml", [torch.rand(2, 64, 1024)])
    options = {"backend": "openvino", "library": library()}
    bench = LaneBench(path, [torch.rand(1, 64, 1024)], ready=False, model=options)
    try:
        bench.wait(lambda: _is_interrupted(bench))
        bench.wait(lambda: bench.states() == ["failed"])  # its warm-up was ended, and nothing hangs
        (row,) = bench.lane.workers()
        assert "did not come to an end in time" in row["error"]
    finally:
        bench.close()


def _is_interrupted(bench: LaneBench) -> bool:
    """Interrupts what the worker runs; whether it has begun to run anything."""
    (row,) = bench.lane.workers()
    return bool(row["running_since"]) and bench.lane.interrupt(row["id"], row["running_since"])


def test_the_two_precisions_that_the_cpu_may_lack_are_taken_as_a_hint(affine: Path) -> None:
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    for precision in ("bf16", "fp16"):
        got = load(affine, precision=precision).run([x])
        assert got.dtype is torch.float32
        torch.testing.assert_close(got, Affine()(x), atol=0.1, rtol=0.1)


def test_outputs_of_networks_with_several_are_a_tuple(folder: Path) -> None:
    path = save_openvino(Outputs(), folder / "outputs.xml", [torch.rand(2, 16)])
    plus, total = load(path).run([torch.ones(3, 16)])
    assert torch.equal(plus, torch.full((3, 16), 2.0)) and torch.equal(total, torch.full((3,), 16.0))
