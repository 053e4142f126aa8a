"""``python -m tests.chaos.run``: a campaign by its seed. Exit status 1 on any violation."""

from __future__ import annotations

import argparse
import random
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos import namespaces

MODULE = "tests.chaos.run"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    add = parser.add_argument
    add("--seed", type=int, help="replays the faults of this seed in the same order; drawn when left out")
    add("--requests", type=int, default=20_000, help="how many requests the faults are spread over (20000)")
    add("--faults", type=int, default=100, help="how many faults (100)")
    add("--only", action="append", default=[], metavar="CLASS", help="only faults of this class; may be repeated")
    add("--except", action="append", default=[], metavar="CLASS", dest="without", help="no faults of this class")
    add("--tls", action="store_true", help="HTTPS on the inference and management ports")
    add("--rate", type=float, default=700, help="requests a second of all clients together, at most (700)")
    add("--clients", type=int, default=1, help="clients of each kind (1)")
    add("--recovery", type=float, default=70, metavar="SECONDS", help="a fault that is not forgiven by then is a "
        "violation (70: a model whose workers end too often waits for a minute)")  # fmt: skip
    add("--memory-growth", type=float, default=0.05, help="how much resident memory may have grown in the end (0.05)")
    add("--warm-up", type=int, default=15_000, help="requests before what is held is measured (15000)")
    add("--summary", type=Path, help="file for the report; its JSON and the log of steps are written beside it")
    add("--list", action="store_true", help="prints the classes of faults")
    add("--no-namespaces", action="store_true", help="stays in the namespaces that it was started in")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    asked = parse(arguments)
    if asked.seed is None:
        asked.seed = random.SystemRandom().randrange(1 << 31)
        arguments = [*arguments, "--seed", str(asked.seed)]
    if not asked.list and not asked.no_namespaces:
        namespaces.enter(MODULE, arguments)
    namespaces.become_init()
    from tests.chaos import campaign
    from tests.chaos.faults import ALL
    from tests.chaos.report import Report, commit
    from tests.chaos.site import DISKS

    if asked.list:
        for name, fault in sorted(ALL.items()):
            print(f"{name:<32}{(fault.__doc__ or '').splitlines()[0]}")
        return 0
    unknown = {*asked.only, *asked.without} - set(ALL)
    if unknown:
        print(f"no such class of faults: {', '.join(sorted(unknown))}; --list prints them", file=sys.stderr)
        return 2
    if namespaces.are_ours():
        namespaces.raise_loopback()
    report = Report(asked.seed, commit(), shlex.join(["python", "-m", MODULE, *arguments]), namespaces.are_ours())
    print(f"chaos: seed {report.seed}, commit {report.commit}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="pyserve-chaos-"))
    log = asked.summary.with_suffix(".steps") if asked.summary else folder / "steps.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    classes = tuple(name for name in asked.only or ALL if name not in asked.without)
    order = campaign.Order(
        asked.seed, asked.requests, asked.faults, classes, asked.rate, asked.clients, asked.warm_up, asked.recovery,
        asked.memory_growth, asked.tls, log,
    )  # fmt: skip
    try:
        campaign.run(order, report, folder)
    finally:
        print(report.text, flush=True)
        if asked.summary:
            report.write(asked.summary)
            shutil.copyfile(folder / "server.log", asked.summary.with_suffix(".server.log"))
        if namespaces.are_ours():
            for name in DISKS:
                namespaces.unmount_disk(folder / name)
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
