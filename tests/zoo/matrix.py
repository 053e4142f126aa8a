"""Which cases are served in which variants: some in each run of the tests, all of them at night."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.support.serving import Server

from . import architectures
from .architectures import STAND_INS
from .case import Case, Variant
from .catalogue import CASES
from .packing import Packed, Untrue
from .trial import Outcome, Trial

Pair = tuple[Case, Variant]

PARALLEL = 2  # trials at once: loading an eager model is a process of its own


def of_a_case(case: Case) -> list[Variant]:
    """Every lane, backend and precision of a case; batches of up to 8, and one without."""
    variants = [Variant(backend) for backend in case.backends]
    if "eager" in case.backends:
        variants.append(Variant(conversion="python"))
        variants.append(Variant(batch_size=1))
    backends = [each for each in ("eager", "scripted", "traced") if each in case.backends]
    lowered = [precision for precision in case.precisions if precision != "fp32"]
    return variants + [Variant(each, precision=precision) for precision in lowered for each in backends]


def at_night() -> list[Pair]:
    return [(case, variant) for case in CASES for variant in of_a_case(case)]


# These are compiled, which takes seconds; from the second run on they are kept.
COMPILED_IN_EACH_RUN = ("fixed_batch_1", "declared_length", "undeclared_length")
# Loading a class takes seconds, so that a run of all tests has only some.
CLASSES_IN_EACH_RUN = (
    "odd_size_padding", "counter", "mask_branch", "length_without_padding", "long_branch", "plain_loop",
    "read_through_numpy", "numbers_through_numpy", "experts", "seeded_features", "tied_in_a_list", "tied_by_a_view",
    "initial_weights_matter", "weight_norm", "extra_state", "tuple_with_none", "dict_in_dict", "text_beside", "no_rows",
    "rare_leak", "seeded_noise", "attention",
)  # fmt: skip


def of_architectures() -> list[Pair]:
    """In the order of their worth, should the time not suffice."""
    variants = [Variant(), Variant(precision="bf16"), Variant(conversion="python")]
    return [(case, variant) for variant in variants for case in architectures.CASES]


def in_each_run() -> list[Pair]:
    """TorchScript of each case that has it, which loads at once, in every precision; some classes."""
    pairs = []
    for case in CASES:
        script = next((each for each in ("scripted", "traced") if each in case.backends), "")
        if script:
            pairs += [(case, Variant(script, precision=precision)) for precision in case.precisions]
        if case.name in CLASSES_IN_EACH_RUN:
            pairs.append((case, Variant()))
        if case.name in COMPILED_IN_EACH_RUN:
            pairs.append((case, Variant("compiled")))
    return pairs


class Run:
    """Trials on one server, some at once, each case packed once."""

    def __init__(self, server: Server, folder: Path, compiled: Path):
        self.server, self._folder, self._compiled = server, folder, compiled
        self._pool = ThreadPoolExecutor(PARALLEL)
        self._packed: dict[str, Packed] = {}

    def begin(self, pairs: Sequence[Pair], done: Callable[[Outcome], None] = lambda _: None) -> list[Future[Outcome]]:
        """The outcomes to be, in order."""

        def trial(case: Case, variant: Variant) -> Outcome:
            outcome = self._try(case, variant)
            done(outcome)
            return outcome

        for case, _ in pairs:  # here and not in the pool: seeds and imports are the process's
            if case.name not in self._packed:
                self._packed[case.name] = Packed(case, self._folder, self._compiled)
        return [self._pool.submit(trial, case, variant) for case, variant in pairs]

    def _try(self, case: Case, variant: Variant) -> Outcome:
        try:
            return Trial(self.server, self._packed[case.name], variant).run()
        except Untrue as error:
            return Outcome(case, variant, wrong=[str(error)])

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def running(folder: Path, compiled: Path) -> Iterator[Run]:
    """A server with a store of its own in ``folder``; its models import what this process can import."""
    folder.mkdir(exist_ok=True)
    server = Server(folder)
    paths = [server.environment["PYTHONPATH"], str(STAND_INS), os.environ.get("PYTHONPATH", "")]
    server.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    server.start()
    run = Run(server, folder / "packed", compiled)
    try:
        yield run
    finally:
        run.close()
        server.kill()
