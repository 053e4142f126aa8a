"""The rings between front ends and the engine process, see csrc/front_ring.h. Needs no torch."""

from collections.abc import Callable, Sequence
from typing import Any

Frame = tuple[int, int, int, bytes, bytes | bytearray]  # kind, flags, ticket, head, body

STATE_SIZE: int  # bytes of a ring's memory beside its own
HEAD_SIZE_MAX: int
MORE: int  # the kind of frames that go on with a body
ROW: int  # the kind of frames that the engine's `Reader` may take by itself
LEDGER_PAGE_SIZE: int  # bytes of a ledger's memory for each process

def may_be_read(content_type: str, body: bytes | bytearray | memoryview) -> bool:
    """As `tensor_types.may_be_read`, of any body; an empty one may be."""

def read_item(text: bytes | bytearray | memoryview, kind: str, shape: list[int]) -> bytes | None:
    """The numbers of nested lists as they lie in memory, None if the text is not exactly an item of that shape.

    Bit by bit what ``handlers.json_numbers`` makes of them. What is odd about a text is not told: ask the reader in
    Python.

    Args:
        kind: as in ``struct``: f d, b h i q, B H I.
        shape: sizes from 1 on.
    """

def read_item_at(
    text: bytes | bytearray | memoryview, begin: int, kind: str, shape: list[int]
) -> tuple[bytes, int] | None:
    """The same of an item that begins at ``begin``, with the place behind it, whatever stands there."""

class Writer:
    """Writes frames. One thread.

    Args:
        fd: of the memory; may be closed afterwards.
        offset: of this ring within it, a multiple of the page size.
        size: a power of two.

    Attributes:
        has_waiting: messages wait for room, which the engine's own are not to take from them.
    """

    has_waiting: bool

    def __init__(self, fd: int, offset: int, size: int) -> None: ...
    def put(
        self, kind: int, flags: int, ticket: int, head: bytes, body: bytes | bytearray | memoryview, total: int
    ) -> bool:
        """Whether there was room. ``total``: bytes of the body with what will follow. ValueError: of a wrong reader."""

    def reader_sleeps(self) -> bool:
        """To be asked once something was put: whether to wake the reader."""

    def wait_for_room(self) -> None:
        """To be said before another try: the reader will wake this end."""

class Reader:
    """Reads frames, and puts bodies together that come in several. One thread.

    Args:
        body_size_max: bytes of one body.
        coming_size_max: bytes of all bodies of which more is to come.
        keeps_bodies: bodies are bytearrays; else bytes.
    """

    def __init__(
        self, fd: int, offset: int, size: int, *, body_size_max: int, coming_size_max: int, keeps_bodies: bool
    ) -> None: ...
    def take(self, count_max: int) -> list[Frame]:
        """Complete ones, from at most so many frames of the ring, of which 16 that native code takes are as one.

        Raises:
            ValueError: what is there is none; read no more.
        """

    def sleep(self) -> bool:
        """Whether there is nothing, and the writer will wake this end."""

    def writer_waits(self) -> bool:
        """To be asked once something was taken: whether to wake the writer."""

class Ledger:
    """What each of several processes holds of a sum that they share, see csrc/front_ledger.h. One thread.

    Args:
        fd: of the memory, LEDGER_PAGE_SIZE for each process, all 0 at first; may be closed afterwards.
        count: of processes, up to 1024.
        number: which of them this is.
        size_max: of the sum, up to 2^48.

    Raises:
        ValueError: of numbers that cannot be, or too little memory.
        OSError: the memory cannot be mapped.
    """

    def __init__(self, fd: int, count: int, number: int, size_max: int) -> None: ...
    def hold(self, size: int) -> bool:
        """Holds ``size`` from now on; False, and what it held before, if that would be too much."""

    def charge(self, size: int) -> None:
        """Holds ``size`` from now on, however much that is."""

    def want(self, until: int) -> None:
        """Has others make room until then, ns of the monotonic clock; no more than 60 s from now."""

    def wanting_count(self, now: int) -> int:
        """Others that ask for room."""

    def busy_count(self, floor: int, now: int) -> int:
        """Others that hold more than ``floor``, or ask for room."""

    def held_by(self, number: int) -> int:
        """What is written there, whatever it is. IndexError if there is no such process."""

    @property
    def others(self) -> int:
        """What all others hold; each of them ``size_max`` at most."""

    @property
    def free(self) -> int:
        """What nobody holds."""

class FastDoor:
    """The link to the engine of those requests that native code sends and answers, see csrc/bindings_fast_door.h.

    Args:
        owner: a `fronts.door.Door`: has ``take_over_call(call)`` and ``send_cancel(ticket)``; kept until `close`.

    Attributes:
        count: of requests that were sent and not answered.
    """

    count: int

    def __init__(self, owner: object) -> None: ...
    def attach(self, writer: Writer, wake: int) -> None:
        """There is a link. ``wake``: the engine's eventfd."""

    def read_from(self, reader: Reader) -> None:
        """Takes answers to what it has sent from the ring, in place of Python."""

    def detach(self) -> None:
        """It is over: the owner takes over what was sent and not answered."""

    def close(self) -> None:
        """There will be no other."""

class FastRoute:
    """A path whose plain requests are sent as tensors natively.

    Args:
        place: of the model in the engine's table.
        size: bytes of an item.
        row_of: gives what `fronts.rows.Route.row_of` does, of requests that have to be taken over.
        bounds: of the durations of stages, s.
        describes_items, form_of, log_head, kind, shape, takes_json: as of `_core.FastRoute`.

    Attributes:
        under_way: how many of its requests are not over, of which something will be noted yet.
    """

    under_way: int

    def __init__(
        self, place: int, *, size: int, row_of: Callable[..., object], bounds: Sequence[float], describes_items: bool,
        form_of: Callable[..., object], log_head: str, kind: str, shape: Sequence[int], takes_json: bool,
    ) -> None: ...  # fmt: skip
    def take_stages(self) -> tuple[tuple[list[int], float], tuple[list[int], float]]:
        """Counts and the sum in s of what was decoded, and of what was encoded, since this was last asked."""

class FastPath:
    """The requests of one listener's connections that are answered without Python.

    Args:
        listener: its number.
        answer_size_max: bytes of an answer's body.
        budget, call_soon, log, coded_size_min: as of `_core.FastPath`.

    Attributes:
        request_count: of what was taken so far.
    """

    request_count: int

    def __init__(
        self, door: FastDoor, *, listener: int, answer_size_max: int, budget: object, call_soon: Callable[..., object],
        log: object, head_size_max: int, line_size_max: int, header_count_max: int, body_size_max: int, takes_ids: bool,
        coded_size_min: int, json_size_max: int,
    ) -> None: ...  # fmt: skip
    def set(
        self, generation: int, routes: dict[str, FastRoute], key_until: Callable[[str], float | None] | None
    ) -> None:
        """What the engine's table of that number has; ``key_until`` as of `_core.FastPath`."""

    def announce(self) -> None:
        """Wakes the engine for what was sent; the loop calls it."""

    def close(self) -> None:
        """Takes nothing any more."""

class FastConnection:
    """One connection's part; as `_core.FastConnection`."""

    is_ready: bool
    is_busy: bool
    arrived_at: int
    answered_at: int
    receive: Callable[[bytes], None]

    def __init__(self, path: FastPath) -> None: ...
    def open(self, protocol: object, write: Callable[[bytes], None], client: str) -> None: ...
    def close(self) -> None: ...
    def hand_over(self) -> tuple[Any, tuple[Any, int, bytes, str, int, Any]] | None: ...
