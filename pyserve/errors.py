"""Every error a caller can meet, with the status and type it is answered with.

    ServeError
    ├── ClientError                 the caller can fix it; the text is safe to send
    │   ├── BadRequestError         400 BadRequestException
    │   │   └── InputError          400 BadRequestException   (raised by handlers for one item's input)
    │   ├── InvalidModelError       400 InvalidModelException
    │   ├── TokenError              401 InvalidKeyException          (400 under compat=strict)
    │   ├── RequirementsError       400 ModelException
    │   ├── DownloadError           400 DownloadArchiveException
    │   ├── ModelNotFoundError      404 ModelNotFoundException
    │   ├── VersionNotFoundError    404 ModelVersionNotFoundException
    │   ├── ResourceNotFoundError   404 ResourceNotFoundException
    │   ├── DefaultVersionError     403 InvalidModelVersionException
    │   ├── ForbiddenError          403 BadRequestException
    │   ├── MethodNotAllowedError   405 MethodNotAllowedException
    │   ├── ConflictError           409 ConflictStatusException
    │   ├── TooLargeError           413 BadRequestException
    │   └── UnsupportedMediaError   415 BadRequestException
    └── ServerError                 ours or the model's fault
        ├── HandlerError            503 InternalServerException
        ├── OverloadedError         503 ServiceUnavailableException  (queue full, no worker, draining)
        ├── DeadlineError           504 InternalServerException      (ran past response_timeout)
        ├── ExpiredError            503 ServiceUnavailableException  (waited past its time, never ran)
        ├── CleanupTimeoutError     408 RequestTimeoutException      (unregister took too long)
        ├── ModelLoadError          500 InternalServerException
        ├── OutOfMemoryError        507 InternalServerException
        └── ConfigError             (start-up only, never on the wire)

What HTTP itself can get wrong (408, 414, 417, 431, ...) is in `pyserve.http1.errors`.

Status codes, ``type`` strings and the three keys of the body are TorchServe's, so that clients
need not change; ``detail`` is pyserve's addition.
"""

from __future__ import annotations

import errno
import json
import re
import sys
from typing import Any

JsonObject = dict[str, Any]


class ServeError(Exception):
    """Base of all errors with an answer.

    Attributes:
        status: HTTP status code of the answer.
        type: TorchServe's exception class name, sent as ``type``.
        message: sent as ``message``; never holds a path, a traceback or another's data.
        detail: extra JSON members sent as ``detail``; empty means none.
        headers: extra response headers, such as ``Retry-After``.
    """

    status = 500
    type = "InternalServerException"

    def __init__(self, message: str, *, detail: JsonObject | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.message = message
        self.detail = detail or {}
        self.headers = headers or {}

    def body(self) -> JsonObject:
        """The JSON object of the answer: ``code``, ``type``, ``message`` and, if any, ``detail``."""
        answer: JsonObject = {"code": self.status, "type": self.type, "message": self.message}
        if self.detail:
            answer["detail"] = self.detail
        return answer

    def reason(self) -> str:
        """What went wrong in one line: the exception and its place if they are known, else the message."""
        text = str(self.detail.get("text") or "")
        if "exception" not in self.detail:
            text = text or self.message
        elif text or "text" in self.detail:  # an exception may have no text of its own
            text = f"{self.detail['exception']}: {text}" if text else str(self.detail["exception"])
        else:
            text = f"{self.detail['exception']}: {self.message}"
        if self.detail.get("where"):
            text += f" ({self.detail['where']})"
        if "exception" in self.detail and self.detail.get("fix"):
            text += f". {self.detail['fix']}"
        return text


class ClientError(ServeError):
    """The caller can fix it."""


class BadRequestError(ClientError):
    status = 400
    type = "BadRequestException"


class InputError(BadRequestError):
    """One item's input cannot be used. Handlers raise it from ``preprocess``."""


class InvalidModelError(ClientError):
    status = 400
    type = "InvalidModelException"


class TokenError(ClientError):
    """A call needs a key and came without the right one. The texts are TorchServe's."""

    status = 401
    type = "InvalidKeyException"

    AUTHORIZATION = "Token Authorization failed. Token either incorrect, expired, or not provided correctly"
    AUTHENTICATION = "Token Authentication failed. Token either incorrect, expired, or not provided correctly"

    def __init__(self, message: str = AUTHORIZATION, *, detail: JsonObject | None = None, is_strict: bool = False):
        super().__init__(message, detail=detail, headers=None if is_strict else {"WWW-Authenticate": "Bearer"})
        if is_strict:
            self.status = 400


class RequirementsError(ClientError):
    """What an archive's requirements name could not be installed."""

    status = 400
    type = "ModelException"


class DownloadError(ClientError):
    """An archive could not be fetched from its URL."""

    status = 400
    type = "DownloadArchiveException"


class ModelNotFoundError(ClientError):
    status = 404
    type = "ModelNotFoundException"


class VersionNotFoundError(ClientError):
    status = 404
    type = "ModelVersionNotFoundException"


class ResourceNotFoundError(ClientError):
    status = 404
    type = "ResourceNotFoundException"

    def __init__(self, *, detail: JsonObject | None = None) -> None:
        super().__init__("Requested resource is not found, please refer to API document.", detail=detail)


class DefaultVersionError(ClientError):
    status = 403
    type = "InvalidModelVersionException"


class ForbiddenError(ClientError):
    status = 403
    type = "BadRequestException"


class MethodNotAllowedError(ClientError):
    status = 405
    type = "MethodNotAllowedException"

    def __init__(self, allowed: str = "", *, detail: JsonObject | None = None):
        super().__init__(
            "Requested method is not allowed, please refer to API document.",
            detail=detail,
            headers={"Allow": allowed} if allowed else None,
        )


class ConflictError(ClientError):
    status = 409
    type = "ConflictStatusException"


class TooLargeError(ClientError):
    status = 413
    type = "BadRequestException"


class UnsupportedMediaError(ClientError):
    status = 415
    type = "BadRequestException"


class ServerError(ServeError):
    """Ours or the model's fault."""


class HandlerError(ServerError):
    status = 503


class OverloadedError(ServerError):
    status = 503
    type = "ServiceUnavailableException"


class ExpiredError(OverloadedError):
    """The request waited in the queue past its time and never ran."""


class DeadlineError(ServerError):
    status = 504


class CleanupTimeoutError(ServerError):
    """The model is not gone after ``unregister_model_timeout``; it continues to drain."""

    status = 408
    type = "RequestTimeoutException"


class ModelLoadError(ServerError, RuntimeError):
    """A model cannot be loaded. A RuntimeError, which handlers expect of TorchServe's base handler.

    Attributes:
        may_pass: whether loading may work later without anybody's help.
    """

    status = 500
    may_pass = False


class OutOfMemoryError(ServerError):
    """Attributes as of `ModelLoadError`."""

    status = 507
    may_pass = True


class ConfigError(ServerError):
    """The configuration cannot be used; start-up ends with this text."""


def shown(name: str) -> str:
    """A name fit for a message: quoted, ASCII, at most about 80 characters."""
    return json.dumps(name if len(name) <= 80 else name[:77] + "...")


TEXT_SIZE_MAX = 2000


# What torch's allocators, and the drivers and libraries of devices, say where the class is RuntimeError: also within
# TorchScript, which makes that of all exceptions.
_ALLOCATION = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory| out of memory\. Tried to allocate|error: out of memory"
    r"|_STATUS_ALLOC_FAILED|UR_RESULT_ERROR_OUT_OF"
)
# Of a driver: cudaErrorMemoryAllocation, hipErrorOutOfMemory.
_DRIVER_OUT_OF_MEMORY = 2


def is_memory_error(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU; recognised by type where there is one."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    of_torch = getattr(torch, "OutOfMemoryError", None) or torch.cuda.OutOfMemoryError
    if isinstance(error, of_torch):
        return True
    of_driver = getattr(torch, "AcceleratorError", None)
    if of_driver is not None and isinstance(error, of_driver):
        if getattr(error, "error_code", None) == _DRIVER_OUT_OF_MEMORY:
            return True
    elif type(error) is not RuntimeError:
        return False
    return _ALLOCATION.search(text_of(error)) is not None


# What the machine may lack for a while: descriptors, memory, processes, room on a disk.
_PASSING = frozenset({
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT, errno.ENOBUFS, errno.EIO,
    errno.ESTALE, errno.ETOOMANYREFS,
})  # fmt: skip


def is_of_machine(error: BaseException) -> bool:
    """Whether ``error``, or what it was raised from, is a fault of the machine: the same may work in a while."""
    cause: BaseException | None = error
    seen = set()
    while cause is not None and id(cause) not in seen:  # a handler can make a circle of them
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno in _PASSING:
            return True
        if is_memory_error(cause) or getattr(cause, "is_of_machine", False) is True:
            return True
        cause = cause.__cause__
    return False


def repr_of(value: object) -> str:
    """``repr(value)``, or its class where that raises."""
    try:
        return repr(value)
    except Exception:  # a class of the handler's may do anything here
        return f"<{type(value).__name__}>"


def text_of(error: BaseException) -> str:
    try:
        if isinstance(error, SyntaxError):
            text = str(error.msg)  # without the place, which is told beside it
        else:
            text = str(error.args[0]) if isinstance(error, SystemExit) and error.args else str(error)
    except BaseException:  # a class of the handler's may do anything here
        return f"<{type(error).__name__} whose text cannot be made>"
    return text if len(text) <= TEXT_SIZE_MAX else text[: TEXT_SIZE_MAX - 3] + "..."
