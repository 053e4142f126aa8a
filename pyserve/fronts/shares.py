"""What of the server's limits each front end has, so that all of them together keep to what one would.

Limits of a connection are each front end's as they are. How many connections there may be is divided: `Shares` has the
part of one. Memory for bodies is one budget for all and the engine (`shared_budget.py`). What is admitted is counted in
the engine, where the queues are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pyserve.config.config import Config
from pyserve.errors import ConfigError
from pyserve.http1.limits import Http1Limits

if TYPE_CHECKING:
    from pyserve.fronts.shared_budget import SharedBudget

_WAITING_SIZE_MIN = 64 << 20


class Shares(NamedTuple):
    """The part of one front end.

    Attributes:
        process_count: front ends, and the engine.
        body_budget_size: bytes of bodies in flight, of all together.
        connection_count_max: of one listener.
        in_flight_max: requests that are not answered.
        body_size_max: bytes of one body.
        answer_size_max: bytes of one answer.
        waiting_size_max: bytes of answers that may wait for it to read them.
    """

    process_count: int
    body_budget_size: int
    connection_count_max: int
    in_flight_max: int
    body_size_max: int
    answer_size_max: int
    waiting_size_max: int

    @classmethod
    def of(cls, config: Config) -> Shares:
        """Those that ``config`` leaves each of its front ends.

        Raises:
            ConfigError: it does not leave enough.
        """
        limits, count = Http1Limits(), config.front_ends
        if config.connection_count_max < count:
            raise ConfigError(
                f"connection_count_max={config.connection_count_max} cannot be divided among front_ends={count}; "
                "raise it, or have fewer front ends"
            )
        connections = config.connection_count_max // count
        return cls(
            process_count=count + 1,
            # A request of the size that is allowed is never one too many.
            body_budget_size=max(limits.body_budget_size, config.max_request_size),
            connection_count_max=connections,
            in_flight_max=len(config.addresses()) * connections * limits.pipeline_max,
            body_size_max=config.max_request_size,
            answer_size_max=2**31,
            waiting_size_max=_WAITING_SIZE_MIN + 2 * config.max_response_size,
        )

    def new_budget(self) -> SharedBudget:
        """What a process of them counts bodies with."""
        from pyserve.fronts.shared_budget import SharedBudget  # needs an extension that one front end does not

        return SharedBudget(self.body_budget_size, self.process_count)
