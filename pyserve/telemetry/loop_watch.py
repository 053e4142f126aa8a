"""How late the event loop turns, and what held it.

A timer of the loop, five times a second, sees how late it comes: of short delays a share, of those over 0.2 s each one.
A thread looks shortly after each of these times whether the timer has come, and if not, where the program stands. That
costs under 0.1 % of a core, and nothing per request.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from prometheus_client.metrics_core import Metric

from pyserve.telemetry.exposition import add_histogram

log = logging.getLogger(__name__)

BEAT_S = 0.2
# What counts as standing still.
LIMIT_S = 0.02
# What is worth a line in the log, and how often at most.
REPORTED_S = 0.1
REPORT_INTERVAL_S = 60.0
BOUNDS_S = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

_PACKAGE = Path(__file__).parents[1]
_LOOP = "pyserve/server/main.py"  # where it is when none of its callbacks run
_ELSEWHERE = "none of the server's code: the CPUs were busy with others, or the interpreter was"
_Frames = Callable[[], Mapping[int, FrameType]]


class LoopWatch:
    """Of the loop that runs when it is made. Loop thread only, but for what the thread does.

    Args:
        clock: seconds, monotonic.
        frames: by thread, what each runs.

    Attributes:
        stalls: how often it came more than LIMIT_S late.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, frames: _Frames = sys._current_frames):
        self._clock = clock
        self._frames = frames
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._has_ended = threading.Event()
        self._seen: tuple[float, str] = (0.0, "")  # when it was due, and what was found then; the thread's
        self.stalls = 0
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._total_s = 0.0
        self._longest: tuple[float, str] = (0.0, "")  # that was not reported yet
        self._reported_at = -REPORT_INTERVAL_S

    def start(self) -> None:
        """From now on."""
        self._set_next()
        threading.Thread(target=self._look_on, name="loop-watch", daemon=True).start()

    def stop(self) -> None:
        self._has_ended.set()
        if self._timer is not None:
            self._timer.cancel()

    def families(self) -> Iterator[Metric]:
        """For ``/metrics``."""
        lag, stalls = empty_families()
        add_histogram(lag, {}, BOUNDS_S, self._counts, self._total_s)
        stalls.add_sample("pyserve_event_loop_stalls_total", {}, self.stalls)
        yield from (lag, stalls)

    def _set_next(self) -> None:
        self._due = self._clock() + BEAT_S
        self._timer = self._loop.call_later(BEAT_S, self._beat)

    def _beat(self) -> None:
        late_s = max(0.0, self._clock() - self._due)
        self._counts[bisect_left(BOUNDS_S, late_s)] += 1
        self._total_s += late_s
        if late_s > LIMIT_S:
            self._note(late_s)
        elif self._longest[0]:
            self._report()
        self._set_next()

    def _note(self, late_s: float) -> None:
        self.stalls += 1
        due, holder = self._seen
        if late_s > self._longest[0]:
            self._longest = late_s, holder if due == self._due else _ELSEWHERE
        self._report()

    def _report(self) -> None:
        late_s, holder = self._longest
        now = self._clock()
        if late_s < REPORTED_S or now - self._reported_at < REPORT_INTERVAL_S:
            return
        self._reported_at = now
        self._longest = 0.0, ""
        log.warning("the event loop stood still for %.0f ms, and every request with it; it was in %s. Reported at most "
                    "once in %.0f s, the longest of them; all are counted in pyserve_event_loop_stalls_total",
                    late_s * 1000, holder, REPORT_INTERVAL_S)  # fmt: skip

    # --- the thread -----------------------------------------------------------------------------------------------

    def _look_on(self) -> None:
        due = self._due
        while not self._has_ended.wait(max(0.0, due + LIMIT_S - self._clock())):
            if self._due == due:  # the timer has not come
                self.look()
            while self._due == due and not self._has_ended.wait(LIMIT_S):
                pass
            due = self._due

    def look(self) -> None:
        """Notes what holds the loop now. Any thread."""
        due, frames = self._due, dict(self._frames())
        try:
            self._seen = due, self._holder(frames)
        finally:
            # This call's own is among them: that is a circle, which would keep what all threads had in hand, pictures
            # and bodies, until the collector of garbage comes.
            frames.clear()

    def _holder(self, frames: dict[int, FrameType]) -> str:
        place = _place(frames.get(self._loop_thread))
        # In the loop itself, or about to go on: somebody else has the interpreter, or had it just now.
        if not place or place.startswith(_LOOP):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            others = [
                f"thread {names.get(thread, '?')}, {found}"
                for thread, frame in frames.items()
                if thread not in (self._loop_thread, threading.get_ident()) and (found := _place(frame))
            ]
            place = "; ".join(sorted(others)) or _ELSEWHERE
        return place


def empty_families() -> tuple[Metric, Metric]:
    """Those of `LoopWatch.families`, without numbers."""
    about = f"How late the event loop came to what was due, looked at {1 / BEAT_S:.0f} times a second."
    lag = Metric("pyserve_event_loop_lag_seconds", about, "histogram")
    about = f"How often the event loop came more than {LIMIT_S * 1000:.0f} ms late."
    return lag, Metric("pyserve_event_loop_stalls", about, "counter")


def _place(frame: FrameType | None) -> str:
    """Where the innermost of the server's own functions stands; ``""`` for a thread that runs none, or waits."""
    innermost = frame
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGE):
            if innermost is not frame and innermost is not None and _waits(innermost):
                return ""
            return f"{path.relative_to(_PACKAGE.parent)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""


def _waits(frame: FrameType) -> bool:
    """Whether a thread is in one of the standard library's own ways to wait."""
    return Path(frame.f_code.co_filename).name in ("threading.py", "queue.py", "selectors.py", "thread.py")
