"""Choosing a backend behind a model's first requests: what is made, tried, exchanged, kept, and ended."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from pyserve import _core
from pyserve.archive.model_config import ModelConfig
from pyserve.backends.kept import Choice, Made
from pyserve.backends.trial import NO_TIME, Tried
from pyserve.config.config import Config
from pyserve.errors import ModelLoadError
from pyserve.lanes.network import Network
from pyserve.models import engine_choice, kept_backend
from pyserve.models.backend_network import Split
from pyserve.models.engine_choice import EngineChoice
from tests.support.lane_stand import HANG_S, Stand, run, standing
from tests.support.networks import Affine, Times, save_script


@dataclass
class Surroundings:
    """What a choice asks for, without a compiler: each step as the test wants it.

    Attributes:
        made: what the child process makes.
        tried: what measuring comes to, beside TorchScript.
        networks: backend -> the network that it is loaded as.
        kept: the choices that were kept.
        makings: the processes that were started.
        may_end: makings end once it is set.
    """

    made: list[Made] = field(default_factory=lambda: [Made("openvino", "fp32")])
    tried: list[Tried] = field(default_factory=lambda: [Tried("openvino", 1.0, 1.0)])
    networks: dict[str, Any] = field(default_factory=dict)
    kept: list[Choice] = field(default_factory=list)
    makings: list[Making] = field(default_factory=list)
    may_end: threading.Event = field(default_factory=threading.Event)
    stays: str = ""
    keeping_fails: bool = False
    is_short_of_memory: bool = False

    def load(self, archive: Any, network: Network, made: Made, split: Split) -> Network:
        if made.error:
            raise ModelLoadError(made.error)
        if self.is_short_of_memory:
            raise ModelLoadError("OpenVINO cannot run it") from MemoryError()
        return self.networks[made.backend]

    def try_backends(self, candidates: dict[str, Any], *_: Any, **__: Any) -> list[Tried]:
        return [Tried("torchscript", 2.0, 2.0), *(each for each in self.tried if each.backend in candidates)]

    def keep(self, archive: Any, precision: str, batch_size: int, cpus: int, choice: Choice) -> None:
        if self.keeping_fails:
            raise OSError(28, "No space left on device")
        self.kept.append(choice)


class Making:
    """As `pyserve.backends.making.Making`."""

    surroundings: Surroundings

    def __init__(self, archive: Any, backends: list[str], precision: str, batch_size_max: int):
        self.is_stopped = self.is_over = False
        self.surroundings.makings.append(self)

    def wait(self, progress: Callable[[str], None], timeout_s: float) -> list[Made]:
        progress("compiling it")
        assert self.surroundings.may_end.wait(HANG_S)
        self.is_over = True
        return self.surroundings.made

    def stop(self) -> None:
        self.is_stopped = True
        self.surroundings.may_end.set()


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Surroundings:
    found = Surroundings()
    found.may_end.set()
    Making.surroundings = found
    monkeypatch.setattr(engine_choice, "TRIAL_MIN_MS", 0.0)
    monkeypatch.setattr(engine_choice, "Making", Making)
    monkeypatch.setattr(engine_choice, "_candidates", lambda precision: ["openvino"])
    monkeypatch.setattr(engine_choice, "conservative_reason", lambda network, batch_size: found.stays)
    monkeypatch.setattr(engine_choice, "load_backend", found.load)
    monkeypatch.setattr(engine_choice, "prove_backend", lambda *_: "")
    monkeypatch.setattr(engine_choice, "try_backends", found.try_backends)
    monkeypatch.setattr(engine_choice, "keep_choice", found.keep)
    return found


def choice_of(stand: Stand, **config: Any) -> EngineChoice:
    archive: Any = SimpleNamespace(config=replace(ModelConfig(backend="auto"), **config))
    return EngineChoice(stand.services, archive, stand.lane)


def another(stand: Stand, path: Path, network: nn.Module) -> Network:
    script = save_script(network, path / f"{type(network).__name__}.pt")
    return replace(
        stand.lane.network, torch_model=_core.TorchModel.load(str(script), stand.lane.network.example), findings={}
    )


def shown(stand: Stand) -> dict[str, Any]:
    found: dict[str, Any] = stand.lane.network.findings["backend"]
    return found


async def settled(stand: Stand) -> dict[str, Any]:
    await stand.until(lambda: shown(stand)["state"] == "settled")
    return shown(stand)


async def served(stand: Stand) -> float:
    """What the network that runs makes of 1."""
    return float(json.loads(bytes((await stand.answer(1.0)).body))[0])


def test_the_quickest_takes_over_and_is_kept(tmp_path: Path, surroundings: Surroundings) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0), workers=2) as stand:
            surroundings.networks["openvino"] = another(stand, tmp_path, Times(3.0))
            surroundings.may_end.clear()
            choice = choice_of(stand)
            choice.start()
            await stand.until(lambda: shown(stand)["reason"] == "compiling it")
            assert (shown(stand)["chosen"], shown(stand)["state"]) == ("torchscript", "making")
            assert await served(stand) == 2.0
            surroundings.may_end.set()
            found = await settled(stand)
            assert found["chosen"] == "openvino" and {each["backend"] for each in found["tried"]} == {
                "torchscript", "openvino"
            }  # fmt: skip
            assert await served(stand) == 3.0
            assert [each.backend for each in surroundings.kept] == ["openvino"]
            choice.start()  # as when workers are added
            assert len(surroundings.makings) == 1
            await choice.stop()

    run(test())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"made": [Made("openvino", "fp32", error="it has an operator of its own")]}, "an operator of its own"),
        ({"tried": [Tried("openvino", 3.0, 3.0)]}, "none is quicker"),
        ({"tried": [Tried("openvino", 1.0, 1.0, refused="it rounds otherwise")]}, "it rounds otherwise"),
    ],
    ids=["not made", "slower", "refused"],
)
def test_it_stays_with_the_reason(
    tmp_path: Path, surroundings: Surroundings, change: dict[str, Any], reason: str
) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            surroundings.networks["openvino"] = another(stand, tmp_path, Times(3.0))
            for name, value in change.items():
                setattr(surroundings, name, value)
            choice = choice_of(stand)
            choice.start()
            found = await settled(stand)
            assert found["chosen"] == "torchscript" and reason in found["reason"]
            assert [each.backend for each in surroundings.kept] == ["torchscript"]  # not made again at every start
            assert await served(stand) == 2.0
            await choice.stop()

    run(test())


@pytest.mark.parametrize(
    "change",
    [
        {"tried": [Tried("openvino", refused=NO_TIME)]},
        {"made": [Made("openvino", "fp32", error="its process was killed", lasts=False)]},
    ],
)
def test_what_another_start_may_find_otherwise_is_not_kept(
    tmp_path: Path, surroundings: Surroundings, change: dict[str, Any]
) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            surroundings.networks["openvino"] = another(stand, tmp_path, Times(3.0))
            for name, value in change.items():
                setattr(surroundings, name, value)
            choice = choice_of(stand)
            choice.start()
            assert (await settled(stand))["chosen"] == "torchscript"
            assert not surroundings.kept
            await choice.stop()

    run(test())


def test_of_those_that_lose_no_weights_stay(tmp_path: Path, surroundings: Surroundings) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            surroundings.networks["openvino"] = loser = another(stand, tmp_path, Times(3.0))
            surroundings.tried = [Tried("openvino", 3.0, 3.0)]
            choice = choice_of(stand)
            choice.start()
            assert (await settled(stand))["chosen"] == "torchscript"
            await choice.stop()
            assert loser.torch_model is None

    run(test())


def test_what_was_measured_at_another_batch_size_is_not_kept(tmp_path: Path, surroundings: Surroundings) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            surroundings.networks["openvino"] = another(stand, tmp_path, Times(3.0))
            surroundings.may_end.clear()
            choice = choice_of(stand)
            choice.start()
            await stand.until(lambda: shown(stand)["reason"] == "compiling it")
            stand.lane.settings.batch_size = 2
            surroundings.may_end.set()
            assert (await settled(stand))["chosen"] == "openvino" and not surroundings.kept
            await choice.stop()

    run(test())


def test_one_that_the_workers_cannot_run_is_not_used(tmp_path: Path, surroundings: Surroundings) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            surroundings.networks["openvino"] = another(stand, tmp_path, Affine())  # takes another shape
            choice = choice_of(stand)
            choice.start()
            found = await settled(stand)
            assert found["chosen"] == "torchscript" and "cannot run here: mat1 and mat2" in found["reason"]
            assert not surroundings.kept, "the next start would begin with it, and get no worker"
            assert await served(stand) == 2.0
            await choice.stop()

    run(test())


def test_one_that_there_was_no_memory_for_is_tried_again_at_the_next_start(
    tmp_path: Path, surroundings: Surroundings
) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            surroundings.is_short_of_memory = True
            choice = choice_of(stand)
            choice.start()
            assert (await settled(stand))["chosen"] == "torchscript" and not surroundings.kept
            await choice.stop()

    run(test())


def test_nothing_is_made_for_what_has_to_stay(
    tmp_path: Path, surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            surroundings.stays = "it draws random numbers"
            first = choice_of(stand)
            first.start()
            assert (await settled(stand))["reason"] == "it draws random numbers"
            stand.lane.network.findings.clear()
            choice_of(stand, backend="torchscript").start()
            assert "backend: torchscript" in shown(stand)["reason"]
            stand.lane.network.findings.clear()
            choice_of(stand, backend_trial_s=0).start()
            assert "backendTrialSeconds: 0" in (await settled(stand))["reason"]
            stand.lane.network.findings.clear()
            monkeypatch.setattr(engine_choice, "TRIAL_MIN_MS", 1e9)
            choice_of(stand).start()
            assert "one item takes" in (await settled(stand))["reason"]
            assert not surroundings.makings and not surroundings.kept

    run(test())


def test_default_backend_holds_for_models_that_do_not_say(tmp_path: Path, surroundings: Surroundings) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0), config=Config()) as stand:
            surroundings.networks["openvino"] = another(stand, tmp_path, Times(3.0))
            choice_of(stand, backend=None).start()
            assert shown(stand)["state"] == "settled" and not surroundings.makings
            stand.lane.network.findings.clear()
            choice = choice_of(stand, backend="auto")
            choice.start()
            assert (await settled(stand))["chosen"] == "openvino"
            await choice.stop()

    run(test())


def test_one_model_at_a_time_is_made(tmp_path: Path, surroundings: Surroundings) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            surroundings.may_end.clear()
            surroundings.networks["openvino"] = another(stand, tmp_path, Times(3.0))
            first, second = choice_of(stand), choice_of(stand)
            first.start()
            await stand.until(lambda: bool(surroundings.makings))
            stand.lane.network.findings.clear()
            second.start()
            await stand.until(lambda: "its turn" in shown(stand)["reason"])
            assert len(surroundings.makings) == 1
            await first.stop()  # which lets the other one begin
            await stand.until(lambda: len(surroundings.makings) == 2)
            assert surroundings.makings[0].is_stopped
            await settled(stand)
            await second.stop()

    run(test())


def test_the_end_ends_what_is_being_made(tmp_path: Path, surroundings: Surroundings) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            surroundings.may_end.clear()
            choice = choice_of(stand)
            choice.start()
            await stand.until(lambda: shown(stand)["reason"] == "compiling it")
            await choice.stop()
            assert surroundings.makings[0].is_stopped
            await stand.until(lambda: surroundings.makings[0].is_over)
            assert not surroundings.kept and not stand.services.choosing.locked()
            assert await served(stand) == 2.0

    run(test())


def test_what_goes_wrong_costs_no_answer(tmp_path: Path, surroundings: Surroundings) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            surroundings.keeping_fails = True  # the disk is full
            choice = choice_of(stand)
            choice.start()
            found = await settled(stand)  # its network is missing: a fault of ours
            assert found["chosen"] == "torchscript" and "KeyError" in found["reason"]
            assert await served(stand) == 2.0
            stand.lane.network.findings.clear()
            surroundings.networks["openvino"] = another(stand, tmp_path, Times(3.0))
            again = choice_of(stand)
            again.start()
            assert (await settled(stand))["chosen"] == "openvino"
            assert await served(stand) == 3.0 and not surroundings.kept
            for each in (choice, again):
                await each.stop()

    run(test())


# --- a choice of an earlier start -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "chosen"),
    [
        ((None, None, ""), None),
        ((Choice("torchscript", "none is quicker"), None, ""), "torchscript"),
        ((Choice("openvino", "1 ms"), Made("openvino", "fp32"), ""), "openvino"),
        ((Choice("openvino", "1 ms"), None, ""), None),
        ((Choice("openvino", "1 ms"), Made("openvino", "fp32", error="damaged"), ""), None),
        ((Choice("openvino", "1 ms"), Made("openvino", "fp32"), "other answers"), None),
    ],
    ids=["none", "stays", "used", "files gone", "damaged", "differs"],
)
def test_a_kept_choice_is_used_if_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, surroundings: Surroundings,
    kept: tuple[Choice | None, Made | None, str], chosen: str | None,
) -> None:  # fmt: skip
    choice, made, difference = kept

    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            before = replace(stand.lane.network, findings={})
            surroundings.networks["openvino"] = other = another(stand, tmp_path, Times(3.0))
            monkeypatch.setattr(kept_backend, "read_choice", lambda *_: choice)
            monkeypatch.setattr(kept_backend, "read_made", lambda *_: made)
            monkeypatch.setattr(kept_backend, "load_backend", surroundings.load)
            monkeypatch.setattr(kept_backend, "compare_kept", lambda *_: difference)
            monkeypatch.setattr(kept_backend, "prove_backend", lambda *_: "")
            archive: Any = None
            found = kept_backend.on_kept_backend(archive, before, batch_size=1, split=Split())
            assert found is (other if chosen == "openvino" else before)
            assert found.findings.get("backend", {}).get("chosen") == chosen
            assert (before.torch_model is None) == (chosen == "openvino")

    run(test())
