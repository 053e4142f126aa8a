"""Every limit of the HTTP/1.1 front end, by name. Sizes are bytes, times seconds."""

from __future__ import annotations

from dataclasses import dataclass, fields

from pyserve.errors import ConfigError


@dataclass(frozen=True)
class Http1Limits:
    """What one connection, and all of them together, may take.

    Attributes:
        line_size_max: request line, one chunk-size line or one trailer line, without its CRLF; beyond it 414 or 400.
        head_size_max: request line, header lines and the blank line together; beyond it 431.
        header_count_max: header lines of a head, and of the trailer of a chunked body; beyond it 431.
        body_size_max: body after dechunking (``max_request_size``); beyond it 413.
        chunk_overhead_size_max: framing of a chunked body (size lines, extensions, trailer) beyond
            ``chunk_overhead_ratio_max`` bytes for each byte of body; beyond it 400.
        chunk_overhead_ratio_max: see above.
        chunk_count_max: chunks of one body, or one for each KiB that the body may have; beyond both 400.
        head_timeout_s: from the first byte of a head to its last; then 408 and close.
        body_grace_s: from the first wait for a body until ``body_rate_min`` counts.
        body_rate_min: mean rate a body must arrive at, bytes per second; below it 408 and close.
        body_stall_s: longest pause within a body; then 408 and close.
        stream_backlog_max: bytes of a streamed answer that wait for its turn or for a slow reader; beyond it the
            connection is reset.
        write_stall_s: time in which a client must take ``body_rate_min`` bytes per second of a waiting answer.
        idle_timeout_s: a kept connection without a request is closed after this long.
        quiet_s: how long a connection must have been idle before it is closed because the server stops.
        pipeline_max: requests of one connection that may await their answers; reading stops there.
        linger_timeout_s: after an early close, how long input is read and thrown away so that the answer arrives.
        parting_linger_s: the same after the last answers of a server that stops, and for idle connections.
        linger_size_max: and how much of it; as much as a refused body has, if it was refused for its size.
        connection_count_max: open connections of one listener; one more is answered 503 and closed.
        body_budget_size: bodies in flight of all connections that share a ``BodyBudget``; beyond it 503.
    """

    line_size_max: int = 8 * 1024
    head_size_max: int = 64 * 1024
    header_count_max: int = 2000
    body_size_max: int = 6_553_500
    chunk_overhead_size_max: int = 64 * 1024
    chunk_overhead_ratio_max: int = 8
    chunk_count_max: int = 65_536
    head_timeout_s: float = 10.0
    body_grace_s: float = 10.0
    body_rate_min: int = 500
    body_stall_s: float = 30.0
    stream_backlog_max: int = 4 << 20
    write_stall_s: float = 30.0
    idle_timeout_s: float = 75.0
    quiet_s: float = 0.25
    pipeline_max: int = 32
    linger_timeout_s: float = 2.0
    parting_linger_s: float = 0.5
    linger_size_max: int = 256 * 1024
    connection_count_max: int = 10_000
    body_budget_size: int = 256 * 1024 * 1024

    def __post_init__(self) -> None:
        """Raises ``ConfigError`` for a limit that is not above zero."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value <= 0:
                raise ConfigError(f"{field.name} is {value}; it must be above 0.")
