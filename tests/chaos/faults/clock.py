"""Jumps of the wall clock, by a library that is loaded before libc's answers."""

from __future__ import annotations

from tests.chaos import clock_library
from tests.chaos.fault import Fault
from tests.chaos.site import Site

_DAY_S = 86_400


class ClockJump(Fault):
    """The wall clock jumps by up to a day, forwards or back, and back again."""

    name, weight, is_harmless = "clock-jump", 10, True

    @classmethod
    def left_out(cls, site: Site) -> str:
        return "" if clock_library.is_loaded(site) else "no compiler for the library that changes the clock"

    def prepare(self) -> None:
        self._jump_s = self.chance.choice((-_DAY_S, _DAY_S, self.chance.uniform(-5, 5)))
        self.provokes = f"{self._jump_s:+.1f} s"

    def inject(self) -> None:
        clock_library.shift(self.site, self._jump_s)

    def heal(self) -> None:
        clock_library.shift(self.site, 0)
