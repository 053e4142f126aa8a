"""Replays the corpora, and inputs made of them by a seed: what `make fuzz` found stays found, with or without atheris.

``PYSERVE_TEST_SEED`` chooses the mutations. A failure names the file with the input and the command that replays it.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.fuzz import run
from tests.fuzz.mutate import mutations
from tests.fuzz.targets import CORPUS, TARGETS, Target

NAMES = sorted(TARGETS)


@pytest.fixture(autouse=True)
def failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where inputs that fail are put."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "WORK", tmp_path)
    return tmp_path / "failures"


@pytest.mark.parametrize("name", NAMES)
def test_each_input_of_the_corpus_holds(name: str) -> None:
    target = TARGETS[name]
    check = target.load()
    inputs = target.corpus
    assert len(inputs) > 8, "a corpus that is not found would pass"
    for path in inputs:
        assert path.stat().st_size <= target.size_max, f"{path} is longer than what is tried"
        try:
            check(path.read_bytes())
        except Exception as error:
            raise AssertionError(f"{path}: {type(error).__name__}: {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_mutations_of_the_corpus_hold(name: str, seed: int) -> None:
    target = TARGETS[name]
    check = target.load()
    inputs = [path.read_bytes() for path in target.corpus]
    made = mutations(inputs, target.words, target.size_max, seed)
    for data in itertools.islice(made, target.mutation_count):
        run.run_input(name, check, data)


def test_each_folder_of_the_corpus_belongs_to_a_target() -> None:
    assert {folder.name for folder in CORPUS.iterdir()} == {*TARGETS, run.NATIVE}


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> str:
    """A target that fails at some inputs: those with a Z."""
    target = Target("json", 100, 0)

    def check(data: bytes) -> None:
        assert b"Z" not in data, "a planted fault"

    monkeypatch.setattr(Target, "load", lambda self: check)
    monkeypatch.setitem(TARGETS, "planted", target)
    return "planted"


def test_a_fault_is_found_and_its_input_is_kept_and_replays(planted: str, failures: Path) -> None:
    with pytest.raises(AssertionError, match="a planted fault") as raised:
        run.run_plain(planted, seconds=3600, seed=1)
    (kept,) = (failures / planted).iterdir()
    assert b"Z" in kept.read_bytes()
    assert f"-m tests.fuzz.run {planted} --replay failures/{planted}/{kept.name}" in str(raised.value)
    with pytest.raises(AssertionError, match="a planted fault"):
        run._replay(planted, kept)


def test_mutations_are_the_same_for_the_same_seed_and_within_their_size() -> None:
    corpus, words = [b"abc", b"0123456789" * 10], [b"word"]
    first = list(itertools.islice(mutations(corpus, words, 64, 3), 500))
    assert first == list(itertools.islice(mutations(corpus, words, 64, 3), 500))
    assert first != list(itertools.islice(mutations(corpus, words, 64, 4), 500))
    assert max(map(len, first)) == 64
    assert len(set(first)) > 400
