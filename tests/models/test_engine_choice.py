"""Choosing a backend behind a model's first requests: what is made, tried, exchanged, kept, and ended."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pyserve import _core
from pyserve.archive.model_config import ModelConfig
from pyserve.backends.kept import Choice, Made
from pyserve.backends.shown import shown as backend_shown
from pyserve.backends.trial import NO_TIME, Tried
from pyserve.errors import ModelLoadError
from pyserve.lanes.exchange import exchange
from pyserve.lanes.network import Network
from pyserve.models import engine_choice, kept_backend
from pyserve.models.backend_network import Split
from pyserve.models.engine_choice import EngineChoice
from pyserve.proof.agreement import Agreement
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
        may_leave: their files are removed once it is set.
        held: backend -> what making it waits for.
        order: what happened, in order.
    """

    made: list[Made] = field(default_factory=lambda: [Made("openvino", "fp32")])
    tried: list[Tried] = field(default_factory=lambda: [Tried("openvino", 1.0, 1.0)])
    networks: dict[str, Any] = field(default_factory=dict)
    kept: list[Choice] = field(default_factory=list)
    makings: list[Making] = field(default_factory=list)
    may_end: threading.Event = field(default_factory=threading.Event)
    may_leave: threading.Event = field(default_factory=threading.Event)
    held: dict[str, threading.Event] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    stays: str = ""
    keeping_fails: bool = False
    is_short_of_memory: bool = False
    truth: float = 2.0  # what plain TorchScript makes of 1

    def load(self, archive: Any, network: Network, made: Made, split: Split) -> Network:
        if made.error:
            raise ModelLoadError(made.error)
        if self.is_short_of_memory:
            raise ModelLoadError("OpenVINO cannot run it") from MemoryError()
        return self.networks[made.backend]

    def try_backends(self, candidates: dict[str, Any], truth: Any, *_: Any, standing: str, **__: Any) -> list[Tried]:
        self.order.append(" against ".join(reversed(candidates)))
        assert next(iter(candidates)) == standing and truth.run([torch.ones(1, 4)])[0, 0] == self.truth
        known = {each.backend: each for each in [Tried("torchscript", 2.0, 2.0), *self.tried]}
        return [known[name] for name in candidates]

    async def exchange(self, lane: Any, network: Network) -> str:
        refusal = await exchange(lane, network)
        self.order.append("refused" if refusal else "exchanged")
        return refusal

    def keep(self, archive: Any, precision: str, batch_size: int, cpus: int, choice: Choice) -> None:
        if self.keeping_fails:
            raise OSError(28, "No space left on device")
        self.kept.append(choice)
        self.order.append(f"{choice.backend} kept{'' if choice.is_final else ' so far'}")


class Making:
    """As `pyserve.backends.making.Making`."""

    surroundings: Surroundings

    def __init__(self, archive: Any, backends: list[str], precision: str, batch_size_max: int):
        self.backends = list(backends)
        self.is_stopped = self.is_over = False
        self.surroundings.makings.append(self)

    def each(self, progress: Callable[[str], None], timeout_s: float, *, advice: str) -> Iterator[Made]:
        progress("compiling it")
        assert self.surroundings.may_end.wait(HANG_S)
        for made in self.surroundings.made:
            if made.backend not in self.backends:
                continue
            if made.backend in self.surroundings.held:
                progress(f"compiling it for {made.backend}")
                assert self.surroundings.held[made.backend].wait(HANG_S)
            self.surroundings.order.append(f"{made.backend} made")
            yield made
        assert self.surroundings.may_leave.wait(HANG_S)
        self.is_over = True

    def stop(self) -> None:
        self.is_stopped = True
        for each in (self.surroundings.may_end, *self.surroundings.held.values()):
            each.set()


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Surroundings:
    found = Surroundings()
    found.may_end.set()
    found.may_leave.set()
    Making.surroundings = found
    monkeypatch.setattr(engine_choice, "TRIAL_MIN_MS", 0.0)
    monkeypatch.setattr(engine_choice, "Making", Making)
    monkeypatch.setattr(engine_choice, "_candidates", lambda precision: [each.backend for each in found.made])
    monkeypatch.setattr(engine_choice, "exchange", found.exchange)
    monkeypatch.setattr(engine_choice, "conservative_reason", lambda network, batch_size: found.stays)
    monkeypatch.setattr(engine_choice, "load_backend", found.load)
    monkeypatch.setattr(engine_choice, "prove_backend", lambda *_: "")
    monkeypatch.setattr(engine_choice, "try_backends", found.try_backends)
    monkeypatch.setattr(engine_choice, "keep_choice", found.keep)
    return found


def choice_of(stand: Stand, **config: Any) -> EngineChoice:
    archive: Any = SimpleNamespace(config=replace(ModelConfig(backend="auto"), **config))
    return EngineChoice(stand.services, archive, stand.lane)


def another(stand: Stand, path: Path, network: nn.Module, **options: Any) -> Network:
    script = save_script(network, path / f"{len(list(path.iterdir()))}.pt")
    model = _core.TorchModel.load(str(script), stand.lane.network.example, **options)
    return replace(stand.lane.network, torch_model=model, findings={})


def quick(stand: Stand, path: Path, network: nn.Module) -> Network:
    """Beside plain TorchScript, which takes its input times 2."""
    plain = save_script(Times(2.0), path / f"{len(list(path.iterdir()))}.pt")
    return another(stand, path, network, plain=(str(plain), 0, -1))


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
        ({"tried": [Tried("openvino", 3.0, 3.0)]}, "openvino is not quicker"),
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
            choice_of(stand, backend_trial_s=0).start()
            assert "backendTrialSeconds: 0" in (await settled(stand))["reason"]
            stand.lane.network.findings.clear()
            monkeypatch.setattr(engine_choice, "TRIAL_MIN_MS", 1e9)
            choice_of(stand).start()
            assert "one item takes" in (await settled(stand))["reason"]
            assert not surroundings.makings and not surroundings.kept

    run(test())


def test_what_was_settled_when_it_was_loaded_stays(tmp_path: Path, surroundings: Surroundings) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            settled = backend_shown("torchscript", "as 'backend: torchscript' says")
            stand.lane.network.findings["backend"] = settled
            choice = choice_of(stand, backend="torchscript")
            choice.start()
            await choice.stop()
            assert shown(stand) is settled and not surroundings.makings

    run(test())


# --- several, the quick one first -------------------------------------------------------------------------------------

BOTH = [Made("openvino", "fp32"), Made("aotinductor", "fp32")]


async def asked(stand: Stand, while_: Callable[[], bool], allowed: set[float]) -> None:
    """Keeps requests in flight as long as that is so; each has the answer of one of ``allowed``."""
    posted: dict[str, float] = {}
    while while_() or len(posted) < 50:
        if stand.lane.in_flight_count < 16:
            number = float(len(posted) % 7 + 1)
            posted[stand.post(number).request.id] = number
        await asyncio.sleep(0)
    await stand.until(lambda: posted.keys() <= stand.answers.keys())
    for id, number in posted.items():
        assert stand.answers[id].status == 200
        assert float(json.loads(bytes(stand.answers[id].body))[0]) / number in allowed


def test_the_quick_one_serves_while_the_slow_one_is_made(tmp_path: Path, surroundings: Surroundings) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0), workers=2, batch_size=4) as stand:
            surroundings.made = BOTH
            surroundings.tried = [Tried("openvino", 1.0, 1.0), Tried("aotinductor", 0.5, 0.5)]
            surroundings.networks = {
                "openvino": quick(stand, tmp_path, Times(3.0)), "aotinductor": quick(stand, tmp_path, Times(5.0)),
            }  # fmt: skip
            may_make = {each.backend: threading.Event() for each in BOTH}
            surroundings.held = may_make
            choice = choice_of(stand)
            choice.start()
            await stand.until(lambda: "for openvino" in shown(stand)["reason"])
            asking = asyncio.create_task(asked(stand, lambda: shown(stand)["chosen"] == "torchscript", {2.0, 3.0}))
            may_make["openvino"].set()
            await asking
            await stand.until(lambda: "for aotinductor" in shown(stand)["reason"])
            found = shown(stand)
            assert (found["chosen"], found["state"]) == ("openvino", "making")
            assert {each["backend"] for each in found["tried"]} == {"torchscript", "openvino"}
            assert "1 ms for one item; torchscript: 2 ms for one item" in found["reason"]
            assert await served(stand) == 3.0
            asking = asyncio.create_task(asked(stand, lambda: shown(stand)["chosen"] == "openvino", {3.0, 5.0}))
            may_make["aotinductor"].set()
            await asking
            found = await settled(stand)
            assert (found["chosen"], found["reason"]) == (
                "aotinductor", "0.5 ms for one item; openvino: 1 ms for one item"
            )  # fmt: skip
            assert await served(stand) == 5.0
            assert surroundings.order == [
                "openvino made", "openvino against torchscript", "exchanged", "openvino kept so far",
                "aotinductor made", "aotinductor against openvino", "exchanged", "aotinductor kept",
            ]  # fmt: skip
            assert len(surroundings.makings) == 1
            await choice.stop()

    run(test())


@pytest.mark.parametrize(
    ("made", "tried", "reason"),
    [
        (Made("aotinductor", "fp32"), Tried("aotinductor", 0.97, 0.97), "aotinductor is not quicker"),
        (Made("aotinductor", "fp32", error="no rule"), Tried("aotinductor"), "aotinductor is left out: no rule"),
        (Made("aotinductor", "fp32", error="killed", lasts=False), Tried("aotinductor"), "left out: killed"),
        (Made("aotinductor", "fp32"), Tried("aotinductor", refused=NO_TIME), NO_TIME),
    ],
    ids=["within noise", "not made", "crashed", "no time"],
)
def test_the_slow_one_has_to_beat_what_runs(
    tmp_path: Path, surroundings: Surroundings, made: Made, tried: Tried, reason: str
) -> None:
    is_lasting = made.lasts and tried.refused != NO_TIME

    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            surroundings.made = [BOTH[0], made]
            surroundings.tried = [Tried("openvino", 1.0, 1.0), tried]
            surroundings.networks = {
                "openvino": quick(stand, tmp_path, Times(3.0)), "aotinductor": quick(stand, tmp_path, Times(5.0)),
            }  # fmt: skip
            choice = choice_of(stand)
            choice.start()
            found = await settled(stand)
            assert found["chosen"] == "openvino" and await served(stand) == 3.0
            assert "torchscript: 2 ms" in found["reason"] and reason in found["reason"]
            last = surroundings.kept[-1]
            assert (last.backend, last.is_final) == ("openvino", is_lasting)
            # What another start may find otherwise is tried again then.
            assert ("aotinductor" in {each["backend"] for each in last.tried}) == is_lasting
            await choice.stop()

    run(test())


def test_a_start_in_the_middle_continues_with_what_is_left(tmp_path: Path, surroundings: Surroundings) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(3.0)) as stand:
            surroundings.made = BOTH
            surroundings.tried = [Tried("openvino", 1.0, 1.0), Tried("aotinductor", 0.5, 0.5)]
            surroundings.networks = {"aotinductor": another(stand, tmp_path, Times(5.0))}
            stand.lane.network.torch_model = quick(stand, tmp_path, Times(3.0)).torch_model
            tried = [asdict(Tried("torchscript", 2.0, 2.0)), asdict(surroundings.tried[0])]
            stand.lane.network.findings["backend"] = backend_shown("openvino", "1 ms", tried, state="making")
            choice = choice_of(stand)
            choice.start()
            found = await settled(stand)
            assert found["chosen"] == "aotinductor" and await served(stand) == 5.0
            assert [each["backend"] for each in found["tried"]] == ["torchscript", "openvino", "aotinductor"]
            assert [each.backends for each in surroundings.makings] == [["aotinductor"]]
            assert [(each.backend, each.is_final) for each in surroundings.kept] == [("aotinductor", True)]
            await choice.stop()

    run(test())


# --- one that is named, and was not made in time ----------------------------------------------------------------------


@pytest.mark.parametrize(("error", "is_begun"), [("", False), ("", True), ("no rule for Spline", True)])
def test_one_that_is_named_is_made_behind_the_requests(
    tmp_path: Path, surroundings: Surroundings, monkeypatch: pytest.MonkeyPatch, error: str, is_begun: bool
) -> None:
    def load_named(archive: Any, network: Network, made: Made, **_: Any) -> tuple[Network, Agreement]:
        return surroundings.load(archive, network, made, Split()), Agreement(1e-6, 9)

    monkeypatch.setattr(engine_choice, "load_named", load_named)

    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            surroundings.made = [Made("aotinductor", "fp32", error=error)]
            surroundings.networks = {"aotinductor": another(stand, tmp_path, Times(5.0))}
            surroundings.may_end.clear()
            stand.lane.network.findings["backend"] = backend_shown("torchscript", "it takes long", state="making")
            if is_begun:
                stand.lane.network.making = Making(None, ["aotinductor"], "fp32", 1)
            choice = choice_of(stand, backend="aotinductor")
            choice.start()
            await stand.until(lambda: shown(stand)["reason"] == "it takes long; compiling it")
            assert len(surroundings.makings) == 1, "what was begun is not begun again"
            assert (shown(stand)["chosen"], shown(stand)["state"]) == ("torchscript", "making")
            assert await served(stand) == 2.0
            surroundings.may_end.set()
            found = await settled(stand)
            if error:
                assert found["reason"] == f"'backend: aotinductor' cannot be followed: {error}"
            else:
                assert (found["chosen"], found["reason"]) == ("aotinductor", "as 'backend: aotinductor' says")
            assert await served(stand) == (2.0 if error else 5.0)
            assert not surroundings.kept, "it is no choice"
            await choice.stop()

    run(test())


def test_what_was_begun_ends_with_the_model(tmp_path: Path, surroundings: Surroundings) -> None:
    async def test() -> None:
        async with standing(tmp_path, Times(2.0)) as stand:
            stand.lane.network.findings["backend"] = backend_shown("torchscript", "it takes long", state="making")
            stand.lane.network.making = begun = Making(None, ["aotinductor"], "fp32", 1)
            choice = choice_of(stand, backend="aotinductor")
            async with stand.services.choosing:  # another model's turn
                choice.start()
                await stand.until(lambda: "its turn" in shown(stand)["reason"])
                await choice.stop()
            assert begun.is_stopped

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
            surroundings.may_leave.clear()
            asyncio.get_running_loop().call_later(0.1, surroundings.may_leave.set)
            await choice.stop()
            assert surroundings.makings[0].is_stopped
            assert surroundings.makings[0].is_over  # with its files removed: the process may end now
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
        ((Choice("torchscript", "openvino is not quicker"), None, ""), "torchscript"),
        ((Choice("openvino", "1 ms"), Made("openvino", "fp32"), ""), "openvino"),
        ((Choice("openvino", "1 ms", is_final=False), Made("openvino", "fp32"), ""), "openvino"),
        ((Choice("openvino", "1 ms"), None, ""), None),
        ((Choice("openvino", "1 ms"), Made("openvino", "fp32", error="damaged"), ""), None),
        ((Choice("openvino", "1 ms"), Made("openvino", "fp32"), "other answers"), None),
    ],
    ids=["none", "stays", "used", "in the middle", "files gone", "damaged", "differs"],
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
            if choice is not None and chosen is not None:
                assert found.findings["backend"]["state"] == ("settled" if choice.is_final else "making")
            assert (before.torch_model is None) == (chosen == "openvino")

    run(test())
