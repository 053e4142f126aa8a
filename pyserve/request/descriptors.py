"""Which descriptors connections may take: all but those that workers, logs and the operator's calls will need.

The kernel gives each new connection the lowest number that is free. So a number says how many are in use, whoever uses
them, and comparing it is all that the check costs.
"""

from __future__ import annotations

import resource

# Of what opens files now and then: forks of workers, log files, snapshots, archives, what is read below /proc.
SPARE = 56
# What a worker process takes in the server.
PER_WORKER = 10
# Of connections to other listeners than the one for inference, so that an operator is never shut out.
MANAGEMENT = 16
# Of connections that are refused, until they have read why.
REFUSED = 16
UNLIMITED = 1 << 30


class DescriptorLimit:
    """Of one process. Loop thread only.

    Args:
        count: descriptors that the process may have (RLIMIT_NOFILE).

    Attributes:
        management, inference: connections of listeners of this kind have lower numbers than this.
    """

    def __init__(self, count: int = UNLIMITED):
        self.count = count
        self._workers: dict[object, int] = {}
        self.management = self.inference = count
        self._share()

    def reserve(self, owner: object, workers: int) -> None:
        """Keeps room for the worker processes that ``owner`` wants from now on."""
        if workers:
            self._workers[owner] = workers
        else:
            self._workers.pop(owner, None)
        self._share()

    def _share(self) -> None:
        reserved = SPARE + PER_WORKER * sum(self._workers.values())
        # Whoever allows fewer files than that wants to serve all the same.
        self.management = max(self.count - reserved, self.count // 2)
        self.inference = max(self.management - MANAGEMENT - REFUSED, self.count // 4)


def open_files_max() -> int:
    """RLIMIT_NOFILE of this process, the soft one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def raise_open_files_max() -> int:
    """Sets the soft limit of open files to the hard one; returns what it was, for processes that shall have it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # more than the system allows at all (fs.nr_open)
            pass
    return soft
