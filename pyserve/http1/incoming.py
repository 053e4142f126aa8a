"""A request whose body is still on its way: what is kept of it, what it may cost, how long it may take."""

from __future__ import annotations

from collections.abc import Callable

from pyserve.errors import OverloadedError, ServeError
from pyserve.http1.body import FIRST_SIZE_MIN, ChunkedBody, SizedBody, UnframedBody
from pyserve.http1.errors import BodyTooLargeError, ExpectationError
from pyserve.http1.head import Head, asked_path
from pyserve.http1.limits import Http1Limits
from pyserve.request.body_budget import Account, body_budget_error
from pyserve.request.ids import new_id
from pyserve.request.messages import Request

# While no more bodies than this are on their way, they get more memory at first: to let them grow costs time.
FEW_COUNT = 64
FIRST_SIZE_OF_FEW = 1024 * 1024


class Incoming:
    """One request between its head and the end of its body.

    A body that is not wanted, though its framing is sound, is read to its end without being kept, so that the
    connection can go on after the refusal.

    Attributes:
        head: the request's head.
        body: the reader of the body; ``body.content`` is what is kept.
        refusal: why the body is not wanted; None if it is.
        wire_size: bytes read so far, head and framing with them.
        reserved: bytes of the body budget this request holds: those of its body that have come.
        continue_owed: whether the client waits for ``100 Continue``.
        on_release: called by ``release``, and when the body is not wanted any more.
    """

    __slots__ = (
        "_account", "_clock", "_limits", "_started_at", "body", "continue_owed", "head", "on_release", "refusal",
        "reserved", "wire_size",
    )  # fmt: skip

    def __init__(
        self, head: Head, head_size: int, limits: Http1Limits, account: Account, clock: Callable[[], float], *,
        is_unframed: bool = False,
    ):  # fmt: skip
        """Decides on the head alone whether the body is wanted.

        Args:
            clock: s, ``loop.time``.
            is_unframed: somebody else has taken the framing of a chunked body away; `end` says where it ends.

        Raises:
            ServeError: it is not, and the connection must end, since nobody can tell whether the body will follow.
        """
        if head.length > limits.body_size_max:
            raise BodyTooLargeError(head.length, limits.body_size_max, announced=head.length)
        if head.expect not in ("", "100-continue"):
            raise ExpectationError("Expect other than '100-continue' cannot be met.")
        self.head = head
        self.body: SizedBody | ChunkedBody | UnframedBody
        if head.chunked:
            self.body = UnframedBody(limits) if is_unframed else ChunkedBody(limits)
        else:
            are_few = account.budget.coming_count < FEW_COUNT
            self.body = SizedBody(head.length, FIRST_SIZE_OF_FEW if are_few else FIRST_SIZE_MIN)
        self.refusal: ServeError | None = None
        self.wire_size = head_size
        self.reserved = 0
        self.continue_owed = bool(head.expect) and not self.body.complete
        self.on_release: Callable[[], None] | None = None
        self._account = account
        self._clock = clock
        self._limits = limits
        self._started_at = -1.0
        if self.body.complete:
            return
        if head.length and not account.will_have_room(head.length):
            error = body_budget_error(account.budget)
            if self.continue_owed:
                raise error
            self._refuse(error)
            return
        account.begin(self)

    def feed(self, data: bytes, start: int) -> int:
        """Takes what belongs to the body from ``data[start:]``; returns where the rest begins.

        Raises:
            ServeError: the framing is broken or over a limit; the connection must end.
        """
        try:
            end = self.body.feed(data, start)
        except MemoryError:
            self._refuse(_memory_error())
            end = self.body.feed(data, start)
        self.wire_size += end - start
        self._take()
        return end

    def end(self) -> None:
        """Of an unframed body: all has come."""
        assert isinstance(self.body, UnframedBody)
        self.body.end()
        self._take()

    @property
    def direct_size(self) -> int:
        """Bytes that are missing, if it is known beforehand and they are wanted; else 0."""
        body = self.body
        return body.announced - body.size if isinstance(body, SizedBody) and self.refusal is None else 0

    def place(self) -> memoryview:
        """Where the next bytes belong; a caller that fills some of it calls ``took``.

        If there is no memory for them, the body is not wanted any more, and the place is one that nobody reads.
        """
        assert isinstance(self.body, SizedBody)
        try:
            return self.body.place()
        except MemoryError:
            missing = self.body.announced - self.body.size
            self._refuse(_memory_error())
            return _nowhere[:missing]

    def took(self, size: int) -> None:
        """So many bytes have come to their place."""
        assert isinstance(self.body, SizedBody)
        self.body.took(size)
        self.wire_size += size
        self._take()

    def deadline(self, now: float) -> float:
        """When the client is too slow, if nothing comes after ``now`` (s, ``loop.time()``)."""
        limits = self._limits
        if self._started_at < 0:
            self._started_at = now
        by_rate = self._started_at + limits.body_grace_s + self.body.size / limits.body_rate_min
        return min(by_rate, now + limits.body_stall_s)

    def release(self) -> None:
        """Gives the budget back; nothing of the body is wanted any more."""
        self._give_back()
        if self.on_release is not None:
            self.on_release()

    # of `body_budget.Coming`

    def pace(self) -> float:
        age_s = self._clock() - self._started_at if self._started_at >= 0 else 0.0
        return self.body.size / max(age_s, 1e-3)

    def give_up(self, error: OverloadedError) -> None:
        self._refuse(error)
        if self.on_release is not None:
            self.on_release()

    def _take(self) -> None:
        """Counts what has come."""
        if self.refusal is not None:
            return
        body = self.body
        missing = body.size - self.reserved
        if missing > 0:
            if not self._account.take(missing):
                self._refuse(body_budget_error(self._account.budget))
                return
            self.reserved = body.size
        if body.complete:
            self._account.end(self)

    def _give_back(self) -> None:
        self._account.end(self)
        if self.reserved:
            self._account.release(self.reserved)
            self.reserved = 0

    def _refuse(self, error: ServeError) -> None:
        self._give_back()
        self.refusal = error
        self.body.discard()


# Where bytes go for which there is no memory.
_nowhere = memoryview(bytearray(64 * 1024))


def _memory_error() -> OverloadedError:
    return OverloadedError(
        "There is no memory for the request's body; try again later.",
        detail={"reason": "memory"},
        headers={"Retry-After": "1"},
    )


def unread_request(head: Head | None, client: str, begin: bytes = b"") -> Request:
    """A request that is answered though its body was not read; one without a method if its head was not, either.

    Args:
        begin: with what the head began, if it was not read. Its path says in whose form the error is to be told.
    """
    if head is None:
        return Request("", asked_path(begin), client=client, id=new_id())
    return Request(head.method, head.path, query=head.query, fields=head, client=client, id=head.id or new_id())
