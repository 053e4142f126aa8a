"""gRPC services as tables of methods, and what every call goes through before and after its method.

size ──> token ──> message ──> method ──> answer or status ──> metrics
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError

from pyserve.errors import BadRequestError, OverloadedError, ServeError, ServerError, TokenError, TooLargeError
from pyserve.grpc_api.call import REQUEST_ID_KEY, Call
from pyserve.grpc_api.messages import method_path
from pyserve.grpc_api.status import TOKEN_VERDICT, Judge, Verdict, status_text
from pyserve.grpc_api.streams import Streams
from pyserve.lanes.resources import Services
from pyserve.log import about
from pyserve.request.body_budget import QUICK_SIZE_MAX, Account, BodyBudget, body_budget_error
from pyserve.telemetry.request_log import AnswerLog

log = logging.getLogger(__name__)

# Where other gRPC stacks stop unless they are told otherwise.
CLIENT_SIZE_DEFAULT = 4 << 20
FIX_KEY = "x-pyserve-fix"


class Method(NamedTuple):
    """One method of a service.

    Attributes:
        run: ``async run(call, message) -> message``; with ``tells_many`` an async generator; with ``asks_many`` it gets
            an async iterator of messages.
        request: the class of its request.
        is_open: it needs no token, whatever its service's others need.
        scope: whose token its calls need, if not its service's.
    """

    name: str
    run: Callable[..., Any]
    request: Any
    tells_many: bool = False
    asks_many: bool = False
    is_open: bool = False
    scope: str | None = None


class Service(NamedTuple):
    """One service.

    Attributes:
        name: with its package.
        judge: how its errors become statuses.
        scope: whose token its calls need; None for none.
    """

    name: str
    methods: tuple[Method, ...]
    judge: Judge
    scope: str | None = None


class Dispatcher:
    """Takes the calls of one server process. Loop thread only.

    Attributes:
        streams: of the methods in which both sides stream.
    """

    def __init__(self, services: Services, budget: BodyBudget, access: AnswerLog):
        self._services = services
        self._access = access
        self._budget = budget
        self._size_max = services.config.max_request_size
        self._open_count = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._has_logged: set[str] = set()
        self.streams = Streams(budget)

    def handler(self, service: Service) -> Any:
        """What grpc's servers take."""
        handlers = {}
        for method in service.methods:
            path = method_path(service.name, method.name)
            if method.asks_many:
                handlers[method.name] = grpc.stream_stream_rpc_method_handler(self._many_to_many(service, method, path))
            elif method.tells_many:
                handlers[method.name] = grpc.unary_stream_rpc_method_handler(self._one_to_many(service, method, path))
            else:
                handlers[method.name] = grpc.unary_unary_rpc_method_handler(self._one_to_one(service, method, path))
        return grpc.method_handlers_generic_handler(service.name, handlers)

    async def drain(self) -> None:
        """Has streams of requests read no more; returns when no call is left. REQUIRES: the listeners take no more."""
        self.streams.drain()
        await self._idle.wait()

    # --- the kinds of methods -------------------------------------------------------------------------------------

    def _one_to_one(self, service: Service, method: Method, path: str) -> Any:
        async def run(raw: bytes, context: Any) -> bytes:
            call = Call(context, path)
            with _Observed(self, call, service, len(raw)) as observed:
                try:
                    message = self._read(call, service, method, raw)
                    answer: bytes = (await method.run(call, message)).SerializeToString()
                    if len(answer) > CLIENT_SIZE_DEFAULT:
                        await self._fix(call, len(answer))
                    context.set_trailing_metadata(((REQUEST_ID_KEY, call.id), *call.told))
                    return answer
                except Exception as error:
                    await observed.fail(error)
            raise AssertionError("a failed call was aborted")

        return run

    def _one_to_many(self, service: Service, method: Method, path: str) -> Any:
        async def run(raw: bytes, context: Any) -> AsyncIterator[bytes]:
            call = Call(context, path)
            with _Observed(self, call, service, len(raw)) as observed:
                try:
                    message = self._read(call, service, method, raw)
                    context.set_trailing_metadata(((REQUEST_ID_KEY, call.id),))
                    async for answer in method.run(call, message):
                        yield answer.SerializeToString()
                except Exception as error:
                    await observed.fail(error)

        return run

    def _many_to_many(self, service: Service, method: Method, path: str) -> Any:
        async def run(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            call = Call(context, path)
            with _Observed(self, call, service, 0) as observed:
                try:
                    self._check_token(call, service, method)
                    messages = self._read_all(call, method, requests)
                    async for answer in method.run(call, messages):
                        yield answer.SerializeToString()
                    if self.streams.is_draining:
                        raise _draining()
                except Exception as error:
                    await observed.fail(error)

        return run

    async def _read_all(self, call: Call, method: Method, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for raw in requests:
            self._check_size(len(raw))
            yield _parse(method, raw)

    # --- before ---------------------------------------------------------------------------------------------------

    def _read(self, call: Call, service: Service, method: Method, raw: bytes) -> Any:
        self._check_size(len(raw))
        self._check_room(call, service)
        self._check_token(call, service, method)
        return _parse(method, raw)

    def _check_room(self, call: Call, service: Service) -> None:
        """Of a message, which `begin` has counted. That the server is healthy is said however little room there is."""
        budget = self._budget
        if budget.size <= budget.quick_max or service.scope is None:
            return
        if not budget.has_room(budget.account(call.client), 0):
            raise body_budget_error(budget)

    def _check_size(self, size: int) -> None:
        if size > self._size_max:
            raise TooLargeError(
                f"Request of {size} bytes is over the limit: max_request_size is {self._size_max} bytes. "
                "Send less, or raise max_request_size in config.properties.",
                detail={"max_request_size": self._size_max, "request_size": size},
            )

    def _check_token(self, call: Call, service: Service, method: Method) -> None:
        tokens = self._services.tokens
        scope = method.scope or service.scope
        if tokens is not None and scope is not None and not method.is_open:
            tokens.check(scope, call.authorization)  # type: ignore[arg-type]

    # --- after ----------------------------------------------------------------------------------------------------

    async def _fix(self, call: Call, size: int) -> None:
        """Says what to do to users whose client refuses the answer."""
        text = (f"the answer has {size} bytes; many clients take {CLIENT_SIZE_DEFAULT} unless they are made with the "
                "channel option grpc.max_receive_message_length")  # fmt: skip
        if call.path not in self._has_logged:
            self._has_logged.add(call.path)
            log.info("%s, request %s: %s. Reported once", call.path, call.id, text, extra=about(request_id=call.id))
        await call.context.send_initial_metadata(((FIX_KEY, text),))

    def begin(self, call: Call, size: int) -> BodyBudget | Account:
        """A call has come. Returns who holds its bytes. REQUIRES: `end` is called with that and the same size."""
        self._open_count += 1
        self._idle.clear()
        holder = self._budget if size <= QUICK_SIZE_MAX else self._budget.account(call.client)
        holder.charge(size)
        return holder

    def end(self, holder: BodyBudget | Account, size: int) -> None:
        """It is over."""
        holder.release(size)
        self._open_count -= 1
        if not self._open_count:
            self._idle.set()

    def observe(self, call: Call, status: int, code: grpc.StatusCode) -> None:
        """Notes the answer, and counts it unless a model has. ``status`` is HTTP's."""
        self._access.observe(call.client, "gRPC", call.path[1:], "HTTP/2.0", code.value[0], call.arrived_at, call.id)
        if not call.is_counted:
            self._services.metrics.observe_answer(status, is_http=False)

    async def refuse(self, call: Call, error: ServeError, verdict: Verdict) -> None:
        """Ends the call with the status of ``error``. Always raises grpc's AbortError."""
        text = status_text(error, verdict, self._services.error_format, call.id)
        headers = [(name.lower(), value) for name, value in error.headers.items()]
        await call.context.abort(verdict.code, text, trailing_metadata=((REQUEST_ID_KEY, call.id), *headers))


class _Observed:
    """One call between its beginning and its end."""

    def __init__(self, dispatcher: Dispatcher, call: Call, service: Service, size: int):
        self._dispatcher = dispatcher
        self._call = call
        self._judge = service.judge
        self._size = size
        self._is_observed = False

    def __enter__(self) -> _Observed:
        self._holder = self._dispatcher.begin(self._call, self._size)
        return self

    async def fail(self, error: Exception) -> None:
        """Answers with the status of ``error``."""
        if not isinstance(error, ServeError):
            log.error("request %s %s failed", self._call.id, self._call.path, exc_info=error,
                      extra=about(request_id=self._call.id))  # fmt: skip
            error = ServerError("Internal error")
        verdict = TOKEN_VERDICT if isinstance(error, TokenError) else self._judge(error)
        if self._is_late():  # the client says the same, perhaps a moment later
            verdict = verdict._replace(code=grpc.StatusCode.DEADLINE_EXCEEDED)
        self._observe(error.status, verdict.code)
        await self._dispatcher.refuse(self._call, error, verdict)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._dispatcher.end(self._holder, self._size)
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            # It hung up, or its deadline has passed; a model that had the request has counted that.
            self._observe(499, grpc.StatusCode.DEADLINE_EXCEEDED if self._is_late() else grpc.StatusCode.CANCELLED)
        else:
            self._observe(200, grpc.StatusCode.OK)

    def _is_late(self) -> bool:
        remaining_s = self._call.context.time_remaining()
        return remaining_s is not None and remaining_s <= 0

    def _observe(self, status: int, code: grpc.StatusCode) -> None:
        """Before the client knows: a client that has an answer finds it counted."""
        if not self._is_observed:
            self._is_observed = True
            self._dispatcher.observe(self._call, status, code)


def _draining() -> OverloadedError:
    return OverloadedError("The server is shutting down.", detail={"reason": "draining"}, headers={"Retry-After": "1"})


def _parse(method: Method, raw: bytes) -> Any:
    try:
        return method.request.FromString(raw)
    except DecodeError:
        name = method.request.DESCRIPTOR.full_name
        raise BadRequestError(f"The message is not a {name}.", detail={"request_size": len(raw)}) from None
