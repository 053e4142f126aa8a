"""The rings between front ends and the engine process, see csrc/front_ring.h. Needs no torch."""

Frame = tuple[int, int, int, bytes, bytes | bytearray]  # kind, flags, ticket, head, body

STATE_SIZE: int  # bytes of a ring's memory beside its own
HEAD_SIZE_MAX: int
MORE: int  # the kind of frames that go on with a body

class Writer:
    """Writes frames. One thread.

    Args:
        fd: of the memory; may be closed afterwards.
        offset: of this ring within it, a multiple of the page size.
        size: a power of two.
    """

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
        """Complete ones, from at most so many frames of the ring. ValueError: what is there is none; read no more."""

    def sleep(self) -> bool:
        """Whether there is nothing, and the writer will wake this end."""

    def writer_waits(self) -> bool:
        """To be asked once something was taken: whether to wake the writer."""
