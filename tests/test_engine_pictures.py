"""The engine and pictures: bytes that become numbers in front of the model, and answers that a worker finishes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pyserve import _core
from pyserve.handlers.image import IMAGENET_MEAN, IMAGENET_STD
from pyserve.handlers.image_classifier import ImageClassifier
from pyserve.handlers.image_segmenter import ImageSegmenter
from pyserve.handlers.pixels import IDENTITY, Normalization, every_byte
from tests.support.lane_bench import LaneBench
from tests.support.networks import save_script

SEED = int(os.environ.get("PYSERVE_TEST_SEED", "34"))
IMAGENET = Normalization(IMAGENET_MEAN, IMAGENET_STD)
SIDE = 8
BYTES = [torch.randint(0, 256, (1, SIDE, SIDE, 3), dtype=torch.uint8)]
MakeBench = Callable[..., LaneBench]


class Classes(nn.Module):
    """Pictures -> scores of 10 classes; a view in it wants its numbers in the order of NCHW."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * (SIDE - 2) ** 2, 10)

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.head(torch.relu(self.conv(x)).view(x.size(0), -1))


class Flat(nn.Module):
    def forward(self, x):  # type: ignore[no-untyped-def]
        return x * 1


class Segments(nn.Module):
    """Pictures -> a dict with scores of 5 classes per pixel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"out": self.conv(x), "aux": x * 1}


def pixels(count: int) -> list[torch.Tensor]:
    print(f"PYSERVE_TEST_SEED={SEED}")
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(0, 256, (1, SIDE, SIDE, 3), dtype=torch.uint8, generator=generator) for _ in range(count)]


@pytest.fixture(params=["cpu", pytest.param("simdev", marks=pytest.mark.accelerator)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        return "cpu"
    request.getfixturevalue("simdev")
    return "simdev:0"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[MakeBench]:
    """Makes benches and closes them."""
    made: list[LaneBench] = []

    def make(network: nn.Module, example: list[torch.Tensor] | None = None, **options: Any) -> LaneBench:
        path = save_script(network, tmp_path / f"{len(made)}.pt")
        made.append(LaneBench(path, BYTES if example is None else example, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def loaded(network: nn.Module, folder: Path, **options: Any) -> Any:
    path = save_script(network, folder / "m.pt")
    return _core.TorchModel.load(str(path), [torch.zeros(1, 3, SIDE, SIDE)], **options)


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", [IMAGENET, IDENTITY, Normalization((0.5, 0, 0), (1, 1, 0.25))])
def test_every_value_becomes_the_number_that_the_host_makes(
    normalization: Normalization, device: str, tmp_path: Path
) -> None:
    model = loaded(Flat(), tmp_path, device=device, pixels=normalization)
    column = every_byte()
    numbers = model.numbers_of(column.to(device)).cpu()
    assert torch.equal(numbers, normalization.numbers(column)) and numbers.is_contiguous()
    assert torch.equal(model.run([column.to(device)]).cpu(), numbers)


@pytest.mark.parametrize("options", [{}, {"channels_last": True}, {"precision": "bf16"}])
def test_model_answers_bytes_as_it_answers_their_numbers(options: dict[str, Any], device: str, tmp_path: Path) -> None:
    network = Flat() if options.get("channels_last") else Classes()
    model = loaded(network, tmp_path, device=device, pixels=IMAGENET, optimizes=False, **options)
    for batch in (torch.cat(pixels(5)), pixels(1)[0]):
        numbers = IMAGENET.numbers(batch)
        wanted = model.run([numbers.to(device)])
        assert torch.equal(model.run([batch.to(device)]).cpu(), wanted.cpu())
        assert torch.equal(model.numbers_of(numbers), numbers)


def test_bytes_stay_bytes_for_a_model_that_was_not_told_or_of_another_shape(device: str, tmp_path: Path) -> None:
    batch = pixels(1)[0]
    assert loaded(Flat(), tmp_path, device=device).run([batch.to(device)]).dtype is torch.uint8
    model = loaded(Flat(), tmp_path, device=device, pixels=IMAGENET)
    for other in (batch.permute(0, 3, 1, 2).contiguous(), batch[0], batch.to(torch.int16), batch[..., :2].contiguous()):
        assert torch.equal(model.run([other.to(device)]).cpu(), other)


def test_each_worker_with_a_model_of_its_own_takes_bytes(tmp_path: Path) -> None:
    model = loaded(Flat(), tmp_path, pixels=IMAGENET)
    model.note_state("for the test")
    assert torch.equal(model.instance().run(BYTES), IMAGENET.numbers(BYTES[0]))


def test_rules_of_a_compiled_program_are_about_the_numbers(bench: MakeBench) -> None:
    lane = bench(Flat(), model={"pixels": IMAGENET})
    rule = ("input", torch.float32, [(3, 3, ""), (SIDE, SIDE, ""), (4, SIDE, "")])
    lane.lane.set_input_rules([rule])
    lane.submit("good", BYTES[0])
    lane.wait_for(1)
    assert torch.equal(lane.answers["good"], IMAGENET.numbers(BYTES[0])[0])
    with pytest.raises(_core.InputRefused, match=f"dimension 3 has size {SIDE + 1}"):
        lane.submit("bad", torch.zeros(1, SIDE, SIDE + 1, 3, dtype=torch.uint8))


def test_bytes_and_numbers_in_one_queue_are_answered_as_what_they_are(
    bench: MakeBench, device: str, request: pytest.FixtureRequest
) -> None:
    network, chance = Classes().eval(), random.Random(SEED)
    lane = bench(network, batch=8, workers=2, device=device, model={"pixels": IMAGENET, "optimizes": False})
    if device != "cpu":
        request.getfixturevalue("simdev").fault(f"random seed={SEED} max_us=2000")
    items = pixels(200)
    for owner, item in enumerate(items):
        lane.submit(owner, item if chance.random() < 0.6 else IMAGENET.numbers(item))
        if chance.random() < 0.05:
            lane.wait_for(owner // 2)
    lane.wait_for(len(items))
    with torch.inference_mode():
        wanted = network(IMAGENET.numbers(torch.cat(items)))
    assert torch.allclose(torch.stack([lane.answers[owner] for owner in range(len(items))]), wanted, atol=1e-5)


def test_a_quarter_of_the_bytes_goes_to_the_device(bench: MakeBench, simdev: Any) -> None:
    lane = bench(Classes(), device="simdev:0", batch=4, model={"pixels": IMAGENET})
    moved = []
    for made in (pixels(16), [IMAGENET.numbers(each) for each in pixels(16)]):
        lane.hold(4)
        before = simdev.counters()["h2d_bytes"]
        for item in made:
            lane.submit((len(moved), id(item)), item)
        lane.wait_for(16 * (len(moved) + 1))
        moved.append(simdev.counters()["h2d_bytes"] - before)
    assert moved == [16 * SIDE * SIDE * 3, 4 * 16 * SIDE * SIDE * 3]


# --- answers that a worker finishes -----------------------------------------------------------------------------------


def score_rows(count: int, classes: int) -> list[torch.Tensor]:
    """Few different numbers, so that many are equal; one row has none that is a number."""
    print(f"PYSERVE_TEST_SEED={SEED}")
    generator = torch.Generator().manual_seed(SEED)
    rows = [torch.randint(0, 4, (1, classes), generator=generator).float() for _ in range(count)]
    rows[0][0, 0] = float("nan")
    rows[1][0, 0] = float("inf")
    return rows


@pytest.mark.parametrize("topk", [1, 5, 100])
def test_worker_ranks_classes_as_the_handler_does(topk: int, bench: MakeBench, device: str) -> None:
    handler = ImageClassifier()
    handler.set_max_result_classes(topk)
    lane = bench(nn.Identity(), [torch.zeros(1, 40)], batch=16, device=device, finish=handler.finish)
    lane.hold(16)
    rows = score_rows(16, 40)
    for owner, row in enumerate(rows):
        lane.submit(owner, row)
    lane.wait_for(16)
    (completion,) = lane.completions
    assert completion.owners == list(range(16)) and completion.output is None
    wanted = handler.postprocess(torch.cat(rows))
    got = handler.finished(*completion.finished)
    assert got == wanted and [list(each) for each in got] == [list(each) for each in wanted]


@pytest.mark.parametrize("network", [Segments(), nn.Conv2d(3, 5, 1)], ids=["dict", "tensor"])
def test_worker_finds_the_class_of_each_pixel_as_the_handler_does(
    network: nn.Module, bench: MakeBench, device: str
) -> None:
    handler, item = ImageSegmenter(), torch.randn(1, 3, SIDE, SIDE)
    lane = bench(network, [item], device=device, finish=handler.finish)
    lane.submit("a", item)
    lane.wait_for(1)
    (completion,) = lane.completions
    assert completion.output is None
    with torch.inference_mode():
        wanted = handler.postprocess(network.eval()(item))
    got = torch.tensor(handler.finished(completion.finished))
    assert got.shape == (1, SIDE, SIDE, 2)
    assert torch.equal(got[..., 0], torch.tensor(wanted)[..., 0])
    assert torch.allclose(got, torch.tensor(wanted), atol=1e-6)


def test_fewer_bytes_come_back_of_a_segmentation(bench: MakeBench, simdev: Any) -> None:
    moved = []
    for wants_output in (False, True):
        lane = bench(Segments(), [torch.zeros(1, 3, SIDE, SIDE)], device="simdev:0", finish=("classes", 0))
        before = simdev.counters()["d2h_bytes"]
        lane.submit("a", torch.randn(1, 3, SIDE, SIDE), wants_output=wants_output)
        lane.wait_for(1)
        moved.append(simdev.counters()["d2h_bytes"] - before)
    assert moved == [SIDE * SIDE * 2 * 4, SIDE * SIDE * (5 + 3) * 4]


@pytest.mark.parametrize("finish", [("ranked", 3), ("classes", 0)])
def test_output_of_another_form_is_left_to_the_handler(finish: tuple[str, int], bench: MakeBench, device: str) -> None:
    lane = bench(nn.Identity(), [torch.zeros(1, 2, 3)], device=device, finish=finish)
    lane.submit("a", torch.ones(1, 2, 3))
    lane.wait_for(1)
    assert torch.equal(lane.answers["a"], torch.ones(2, 3)) and lane.completions[0].finished is None


@pytest.mark.parametrize("finish", [("ranked", 3), ("classes", 0)])
def test_who_wants_the_models_output_gets_it_also_beside_others(
    finish: tuple[str, int], bench: MakeBench, device: str
) -> None:
    shape = (1, 6) if finish[0] == "ranked" else (1, 6, 2, 2)
    lane = bench(nn.Identity(), [torch.zeros(shape)], batch=4, device=device, finish=finish)
    lane.hold(4)
    items = [torch.randn(shape) for _ in range(4)]
    for owner, item in enumerate(items):
        lane.submit(owner, item, wants_output=owner == 2)
    lane.wait_for(4)
    assert all(torch.equal(lane.answers[owner], items[owner][0]) for owner in range(4))
    finished = lane.completions[-1].finished
    assert (finished is not None) == (finish[0] == "ranked")


def test_unknown_way_to_finish_is_refused(bench: MakeBench) -> None:
    lane = bench(nn.Identity(), [torch.zeros(1, 2)])
    for kind, count in (("sorted", 1), ("ranked", 0)):
        with pytest.raises(ValueError, match=f"finish answers by {kind}"):
            lane.lane.set_finish(kind, count)


# --- inputs that lie on the device ------------------------------------------------------------------------------------


def test_inputs_on_the_device_wait_for_what_makes_them(bench: MakeBench, simdev: Any) -> None:
    lane = bench(Classes(), batch=4, workers=2, device="simdev:0", model={"pixels": IMAGENET})
    items, stream = pixels(60), torch.Stream("simdev:0")
    simdev.fault("delay kind=h2d us=3000")  # the engine's streams would be there first
    up = simdev.counters()["h2d_bytes"]
    for owner, item in enumerate(items):
        if owner % 3:
            with stream:
                made = item.pin_memory().to("simdev:0", non_blocking=True) if owner % 2 else item.to("simdev:0")
                lane.submit(owner, made)
                del made
        else:
            lane.submit(owner, item)
    lane.wait_for(len(items))
    with torch.inference_mode():
        wanted = Classes().eval()(IMAGENET.numbers(torch.cat(items)))
    assert torch.allclose(torch.stack([lane.answers[owner] for owner in range(len(items))]), wanted, atol=1e-5)
    assert simdev.counters()["h2d_bytes"] - up == len(items) * items[0].nbytes  # none of them went up twice


def test_inputs_on_the_device_are_run_singly_when_their_batch_fails(bench: MakeBench, simdev: Any) -> None:
    lane = bench(nn.Flatten(), [torch.zeros(1, 4, 4)], batch=4, device="simdev:0")
    lane.hold(4)
    items = [torch.full((1, 4, 4), float(number)) for number in range(4)]
    on_device = [item.to("simdev:0") for item in items]
    simdev.fault("fail_launch at=1 count=1")
    for owner, item in enumerate(on_device):
        lane.submit(owner, item)
    lane.wait_for(4)
    assert all(torch.equal(lane.answers[owner], items[owner].flatten()) for owner in range(4))


def test_inputs_on_another_device_are_refused_by_name(bench: MakeBench, simdev: Any) -> None:
    lane = bench(nn.Identity(), [torch.zeros(1, 2)], device="simdev:0")
    with pytest.raises(ValueError, match=r"on the device of the model, simdev:0; got one on simdev:1"):
        lane.submit("a", torch.zeros(1, 2, device="simdev:1"))
    with pytest.raises(ValueError, match="got one on simdev:0"):
        lane.submit("a", [torch.zeros(1, 2), torch.zeros(1, 2, device="simdev:0")])
    on_cpu = bench(nn.Identity(), [torch.zeros(1, 2)])
    with pytest.raises(ValueError, match=r"on the device of the model, cpu; got one on simdev:0"):
        on_cpu.submit("a", torch.zeros(1, 2, device="simdev:0"))
    lane.submit("b", torch.ones(1, 2, device="simdev:0"))
    lane.wait_for(1)
    assert torch.equal(lane.answers["b"], torch.ones(2))
