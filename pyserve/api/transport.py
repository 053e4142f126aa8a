"""How a request of the Open Inference Protocol came, and how its answer leaves.

`RestTransport` (open_inference_rest.py) is that of HTTP, `GrpcTransport` (grpc_api/open_inference.py) that of gRPC.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from pyserve.api.open_inference import InferOutput, InferRequest, InferResponse, quoted
from pyserve.errors import InputError
from pyserve.lanes.audit import Repetition
from pyserve.lanes.lane import Lane
from pyserve.lanes.pending import Pending
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request, Response


class Transport(ABC):
    """That of one request.

    Attributes:
        passes_others: whether an answer of a handler that is not of the protocol leaves as it is; else it becomes an
            output of BYTES.
        bytes_as_base64: whether a handler of its own is given BYTES as base64 even if they are text.
    """

    __slots__ = ()
    passes_others = False
    bytes_as_base64 = False

    @property
    @abstractmethod
    def is_read_quick(self) -> bool:
        """Whether `read` takes under 50 us."""

    @abstractmethod
    def read(self) -> InferRequest:
        """The request. Any thread.

        Raises:
            InputError: it is not of the protocol; the text says what is wrong.
        """

    @abstractmethod
    def is_encode_quick(self, request: InferRequest, outputs: list[InferOutput]) -> bool:
        """Whether `encode` takes under 100 us, apart from copying."""

    @abstractmethod
    def encode(self, request: InferRequest, response: InferResponse) -> Response:
        """The answer, of the form that the request's exchange delivers. Any thread.

        Raises:
            InputError: an output has no form in which the request asks for it.
            HandlerError: the answer is too large.
        """

    @abstractmethod
    def of_copy(self, request: Request) -> Transport:
        """That of a copy of the request, which the audit makes."""

    def repetition(self, again: Callable[[Lane, Exchange], Pending]) -> Repetition:
        """How the audit runs the request again."""
        return Repetition(again)

    def answer(self, pending: Pending, request: InferRequest, outputs: list[InferOutput]) -> Response:
        """The answer with those of ``outputs``, all that there are, that the request asks for. Raises as `encode`."""
        selected = _selected(request, outputs)
        return self.encode(request, InferResponse(pending.lane.name, pending.version, selected, request.id))


def _selected(request: InferRequest, outputs: list[InferOutput]) -> list[InferOutput]:
    if not request.outputs:
        return outputs
    # What is None is not among them: the protocol has no word for it, and its clients read a missing output as None.
    by_name = {output.name: output for output in outputs}
    names = [wanted.name for wanted in request.outputs]
    for name in names:
        if name not in by_name:
            known = ", ".join(map(repr, by_name))
            raise InputError(f"the model has no output {quoted(name)}, or it is None here; its outputs are {known}")
        if names.count(name) > 1:
            raise InputError(f"output {quoted(name)} is asked for twice; name each output once")
    return [by_name[wanted.name] for wanted in request.outputs]
