"""What happens when: a pure function of the seed, in counts of requests, so that a replay repeats the order."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

HOLD_MAX = 400


@dataclass(frozen=True)
class Step:
    """One fault.

    Attributes:
        number: from 1.
        at: after so many requests were sent.
        fault: its class's name.
        hold: the fault is taken back after so many more requests.
        seed: for whatever else the fault chooses.
    """

    number: int
    at: int
    fault: str
    hold: int
    seed: int


def make_plan(seed: int, *, requests: int, faults: int, weights: Mapping[str, int]) -> list[Step]:
    """``faults`` steps over ``requests`` requests: every class of ``weights`` once if there is room, then by weight."""
    chance = random.Random(f"chaos {seed}")
    names = sorted(weights)
    chosen = chance.sample(names, min(faults, len(names)))
    chosen += chance.choices(names, [weights[name] for name in names], k=faults - len(chosen))
    chance.shuffle(chosen)
    spacing = requests / (faults + 1)
    hold_max = max(2, min(HOLD_MAX, int(spacing)))
    return [
        Step(
            number,
            at=int(spacing * (number - chance.random() / 2)),
            fault=fault,
            hold=chance.randrange(1, hold_max),
            seed=chance.getrandbits(32),
        )
        for number, fault in enumerate(chosen, 1)
    ]
