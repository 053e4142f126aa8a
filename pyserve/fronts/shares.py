"""What of the server's limits each front end has, so that all of them together keep to what one would.

Limits of a connection are each front end's as they are. Those of all connections together are divided: `Shares` is the
part of one. The engine has a part of the memory for bodies too, for those that come by gRPC or that grow when their
compression is undone. What is admitted is counted in the engine, where the queues are.
"""

from __future__ import annotations

from typing import NamedTuple

from pyserve.config.config import Config
from pyserve.errors import ConfigError
from pyserve.http1.limits import Http1Limits

_WAITING_SIZE_MIN = 64 << 20


class Shares(NamedTuple):
    """The part of one front end.

    Attributes:
        body_budget_size: bytes of bodies in flight; the engine's own part is as large.
        connection_count_max: of one listener.
        in_flight_max: requests that are not answered.
        body_size_max: bytes of one body.
        answer_size_max: bytes of one answer.
        waiting_size_max: bytes of answers that may wait for it to read them.
    """

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
        size = limits.body_budget_size // (count + 1)
        if config.max_request_size > size:
            place = config.origin.get("front_ends", "default")
            raise ConfigError(
                f"front_ends ({place}): {count} front ends and the engine divide {limits.body_budget_size} bytes of "
                f"memory for bodies, {size} each, which is less than max_request_size={config.max_request_size}; lower "
                "one of the two"
            )
        if config.connection_count_max < count:
            raise ConfigError(
                f"connection_count_max={config.connection_count_max} cannot be divided among front_ends={count}; "
                "raise it, or have fewer front ends"
            )
        connections = config.connection_count_max // count
        return cls(
            body_budget_size=size,
            connection_count_max=connections,
            in_flight_max=len(config.addresses()) * connections * limits.pipeline_max,
            body_size_max=config.max_request_size,
            answer_size_max=2**31,
            waiting_size_max=_WAITING_SIZE_MIN + 2 * config.max_response_size,
        )
