"""The standing of a site: all its processes and all its folders."""

from __future__ import annotations

import contextlib
import time
from collections import Counter

import psutil

from tests.chaos.site import DISKS, Site
from tests.chaos.standing import ProcessStanding, Standing, differences, files_in, shared_memory

SETTLE_S = 35.0
_LOOK_S = 0.5


def standing_of(site: Site) -> Standing:
    """Raises `psutil.Error`, `LookupError`: a process ended meanwhile."""
    server, zygote = site.process, site.zygote
    parts = {"supervisor": [site.supervisor], "server": [server], "zygote": [zygote], "worker": site.workers()}
    known = {process.pid for each in parts.values() for process in each}
    others: Counter[str] = Counter()
    for process in site.tree():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.pid not in known:
                others[" ".join(process.cmdline()[:4])] += 1
    return Standing(
        {part: _together(processes) for part, processes in parts.items()},
        _files(site),
        shared_memory(),
        others,
    )


def _files(site: Site) -> Counter[str]:
    """But logs, and what the cache notes of each file that it has seen, which is a hundred bytes."""
    found = files_in(site.folder / name for name in (*DISKS, "run", "store") if name != "logs")
    return Counter({name: count for name, count in found.items() if "/digests/" not in name})


def _together(processes: list[psutil.Process]) -> ProcessStanding:
    total = ProcessStanding()
    for process in processes:
        one = ProcessStanding.of(process)
        total.descriptors += one.descriptors
        total.threads += one.threads
        total.children += one.children
        total.rss += one.rss
    return total


def settled(site: Site) -> Standing:
    """The standing once nothing of it changes any more."""
    deadline = time.monotonic() + SETTLE_S
    last = standing_of(site)
    while time.monotonic() < deadline:
        time.sleep(_LOOK_S)
        now = standing_of(site)
        if not differences(last, now) and not differences(now, last):
            return now
        last = now
    return last


def left_behind(site: Site, before: Standing, memory_growth: float) -> list[str]:
    """What the site holds more, or less, than ``before``, once it has come to rest."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        try:
            found = differences(before, standing_of(site), memory_growth)
        except (LookupError, OSError, psutil.Error) as error:
            found = [f"the processes cannot be looked at: {error!r}"]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(_LOOK_S)
