"""Models that disagree, served in every way: an answer is what plain torch computes for the item alone, or an error.

A run of all tests serves some of each kind; `pytest -m nightly tests/models/test_model_zoo.py` all cases in all
variants.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from tests.support.serving import Server, at_once
from tests.zoo import architectures, matrix
from tests.zoo.case import Case, Variant
from tests.zoo.catalogue import CASES
from tests.zoo.judging import difference, unreadable
from tests.zoo.matrix import Pair
from tests.zoo.packing import Packed
from tests.zoo.trial import Outcome

pytestmark = pytest.mark.server

EACH_RUN = matrix.in_each_run()
NIGHT = [pair for pair in matrix.at_night() if pair not in EACH_RUN]

# The error of lowered precision is measured on a few inputs when a model is loaded. On others it may be larger.
LOWERED = {
    "timm_efficientnet_lite0-eager-bf16": "5.5 % off on a picture of steep contrast, where 5 % are allowed",
}


def _key(pair: Pair) -> str:
    return f"{pair[0].name}-{pair[1]}"


def _lacking(case: Case, variant: Variant) -> str:
    """What this machine lacks for a trial."""
    if variant.backend == "compiled" and not shutil.which("g++"):
        return "needs a C++ compiler"
    absent = architectures.missing() if case in architectures.CASES else []
    return f"needs the packages of the extra nightly: {', '.join(absent)}" if absent else ""


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where packages of AOTInductor are kept: each takes many seconds to compile. Without pytest's cache, for once."""
    cache = getattr(request.config, "cache", None)
    return tmp_path_factory.mktemp("packages") if cache is None else cache.mkdir("zoo-packages")


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, compiled: Path
) -> Iterator[dict[str, Future[Outcome]]]:
    """Of all selected tests: they run two at once, on one server, while the first results are looked at."""
    chosen: list[Pair] = [
        item.callspec.params["pair"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == request.path and hasattr(item, "callspec")
        and "pair" in item.callspec.params
    ]  # fmt: skip
    with matrix.running(tmp_path_factory.mktemp("zoo"), compiled) as run:
        chosen = [pair for pair in chosen if not _lacking(*pair)]
        yield dict(zip(map(_key, chosen), run.begin(chosen), strict=True))


def _check(request: pytest.FixtureRequest, pair: Pair, outcomes: dict[str, Future[Outcome]]) -> None:
    case, variant = pair
    if _key(pair) not in outcomes:
        pytest.skip(_lacking(case, variant))
    if _key(pair) in LOWERED:
        request.applymarker(pytest.mark.xfail(reason=LOWERED[_key(pair)], strict=False))
    outcome = outcomes[_key(pair)].result()
    assert not outcome.wrong, "\n".join([case.trap, *outcome.wrong[:5], f"{len(outcome.wrong)} in all"])
    if not {variant.backend, variant.precision}.intersection(case.may_refuse):
        assert not outcome.refusal
        assert not outcome.errors, outcome.errors[:5]


@pytest.mark.parametrize("pair", EACH_RUN, ids=_key)
def test_answers_are_those_of_each_item_alone(
    request: pytest.FixtureRequest, pair: Pair, outcomes: dict[str, Future[Outcome]]
) -> None:
    _check(request, pair, outcomes)


@pytest.mark.nightly
@pytest.mark.parametrize("pair", NIGHT, ids=_key)
def test_answers_in_every_variant_are_those_of_each_item_alone(
    request: pytest.FixtureRequest, pair: Pair, outcomes: dict[str, Future[Outcome]]
) -> None:
    _check(request, pair, outcomes)


@pytest.mark.nightly
@pytest.mark.parametrize("pair", matrix.of_architectures(), ids=_key)
def test_architectures_answer_as_they_do_alone(
    request: pytest.FixtureRequest, pair: Pair, outcomes: dict[str, Future[Outcome]]
) -> None:
    _check(request, pair, outcomes)


@pytest.fixture(
    scope="module", params=[Variant("scripted"), Variant("eager"), Variant("eager", conversion="python")], ids=str
)
def counter(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose model ``counter`` counts its calls, with batches of up to 8; nobody has asked it yet."""
    folder = tmp_path_factory.mktemp("counter")
    packed = Packed(next(case for case in CASES if case.name == "counter"), folder, folder)
    with matrix.running(folder / "server", folder) as run:
        packed.archive(request.param, "counter", run.server.store)
        run.server.manage("POST", "/models?url=counter.mar&initial_workers=1&synchronous=true")
        yield run.server


def test_each_request_is_one_call_and_loading_is_none(counter: Server) -> None:
    alone = [counter.predict("counter", [1, 2, 3, 4]).json[1] for _ in range(3)]
    assert alone == [[1.0], [2.0], [3.0]]
    together = at_once([lambda: counter.predict("counter", [1, 2, 3, 4]).json[1][0]] * 16)
    assert sorted(together) == [float(count) for count in range(4, 20)]


def test_every_kind_of_fault_has_models() -> None:
    assert len(CASES) >= 100
    assert {case.name for case, _ in EACH_RUN}.issubset({case.name for case in CASES})
    assert len({case.name for case, _ in EACH_RUN}) >= 40


def test_judge_sees_what_is_not_rounding() -> None:
    one = torch.tensor([[1.0, -2.0]])
    assert difference(one, one.clone()) == 0
    assert difference(one, one + 0.002) == pytest.approx(1e-3, rel=1e-3)
    inf = float("inf")
    assert difference(one, torch.tensor([[1.0, inf]])) == inf
    assert difference(one, one.double()) == inf
    assert difference(one, torch.tensor([[1.0, -2.0, 3.0]])) == inf
    assert difference(torch.tensor([[3]]), torch.tensor([[4]])) == inf
    assert difference({"a": one, "b": None}, {"a": one, "b": None}) == 0
    assert difference({"a": one}, {"b": one}) == inf
    assert difference((one, None), [one]) == inf


def test_judge_sees_texts_that_are_for_nobody() -> None:
    assert unreadable("shape '[3, 4]' is invalid for input of size 5") == ""
    assert unreadable("Exception raised from check at /a/b/context.cpp:47 (most recent call first)") == ".cpp:47"
    assert unreadable("Traceback of TorchScript") == "Traceback"


def test_models_of_the_zoo_are_small_files() -> None:
    def lines(case: Case) -> int:
        return case.text.count("\n")

    assert max(map(lines, CASES)) < 40
