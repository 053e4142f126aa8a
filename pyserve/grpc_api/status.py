"""What went wrong, as a gRPC status: the one place where errors get their code and their text.

The text's first line is the message that HTTP has, the second is what TorchServe adds (the name of a Java class, by
which its clients tell errors apart), the third is the ``detail`` of HTTP's answer as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import NamedTuple

import grpc

from pyserve.errors import (
    BadRequestError,
    ConflictError,
    DefaultVersionError,
    ExpiredError,
    MethodNotAllowedError,
    ModelNotFoundError,
    OverloadedError,
    ServeError,
    VersionNotFoundError,
)
from pyserve.request.messages import ErrorFormat

Code = grpc.StatusCode

# A client's gRPC takes 8 KiB of metadata, in which every byte that is not plain ASCII counts three times.
TEXT_SIZE_MAX = 2048
MODEL_API_OFF = "Model API disabled"

_BY_HTTP_STATUS = {
    400: Code.INVALID_ARGUMENT,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    409: Code.ABORTED,
    413: Code.RESOURCE_EXHAUSTED,
    416: Code.OUT_OF_RANGE,
    429: Code.RESOURCE_EXHAUSTED,
    499: Code.CANCELLED,
    501: Code.UNIMPLEMENTED,
    503: Code.UNAVAILABLE,
    504: Code.DEADLINE_EXCEEDED,
}
# Of refusals that TorchServe does not have.
_OWN_REASONS = ("draining", "body budget")
_JAVA_NAMES = {
    "BadRequestException": "org.pytorch.serve.http.BadRequestException",
    "DownloadArchiveException": "org.pytorch.serve.archive.DownloadArchiveException",
    "InternalServerException": "org.pytorch.serve.http.InternalServerException",
    "InvalidModelException": "org.pytorch.serve.archive.model.InvalidModelException",
    "MethodNotAllowedException": "org.pytorch.serve.archive.model.ModelException",  # the model API is off
    "ModelException": "org.pytorch.serve.archive.model.ModelException",
    "ModelNotFoundException": "org.pytorch.serve.archive.model.ModelNotFoundException",
    "ModelVersionNotFoundException": "org.pytorch.serve.archive.model.ModelVersionNotFoundException",
}


class MissingParameterError(BadRequestError):
    """A call does not name what it is about."""

    def __init__(self, name: str):
        super().__init__(f"Parameter {name} is required.")


class Verdict(NamedTuple):
    """What becomes of an error.

    Attributes:
        augmentation: the second line of its text; ``""`` for none.
        text: in place of the error's message; None leaves that.
    """

    code: grpc.StatusCode
    augmentation: str = ""
    text: str | None = None


# Of a call without the right key, whatever the service.
TOKEN_VERDICT = Verdict(Code.PERMISSION_DENIED)

Judge = Callable[[ServeError], Verdict]


def code_of(status: int) -> grpc.StatusCode:
    """The code for an HTTP status, by TorchServe's table."""
    if 200 <= status < 300:
        return Code.OK
    if status in _BY_HTTP_STATUS:
        return _BY_HTTP_STATUS[status]
    return Code.FAILED_PRECONDITION if 400 <= status < 500 else Code.INTERNAL


def judge_prediction(error: ServeError) -> Verdict:
    """As TorchServe's inference service: what its frontend finds wrong is INTERNAL, the rest goes by HTTP status."""
    if isinstance(error, ModelNotFoundError | VersionNotFoundError):
        return Verdict(Code.INTERNAL, _JAVA_NAMES[error.type])
    if isinstance(error, MissingParameterError):
        return Verdict(Code.INTERNAL, "BadRequestException.()")
    if isinstance(error, OverloadedError) and not isinstance(error, ExpiredError):
        if error.detail.get("reason") not in _OWN_REASONS:
            return Verdict(Code.INTERNAL, "InternalServerException.()")
    elif error.type == "InternalServerException":
        return Verdict(code_of(error.status), _JAVA_NAMES[error.type])
    return Verdict(code_of(error.status), f"{error.type}.()")


def judge_management(error: ServeError) -> Verdict:
    """As TorchServe's management service."""
    if isinstance(error, MethodNotAllowedError):  # nothing but the model API is ever switched off
        return Verdict(Code.PERMISSION_DENIED, _JAVA_NAMES[error.type], MODEL_API_OFF)
    if isinstance(error, ConflictError | DefaultVersionError):
        return Verdict(Code.UNKNOWN, error.type)
    if isinstance(error, OverloadedError) and error.detail.get("reason") not in _OWN_REASONS:
        return Verdict(Code.INTERNAL, _JAVA_NAMES["InternalServerException"])
    return Verdict(code_of(error.status), _JAVA_NAMES.get(error.type, error.type))


def judge_management_strictly(error: ServeError) -> Verdict:
    """As `judge_management`, without the texts that TorchServe leaves out: of what it does not expect."""
    verdict = judge_management(error)
    if verdict.code == Code.UNKNOWN:
        return Verdict(Code.UNKNOWN, text="")
    return verdict._replace(text="InternalServerException.()") if isinstance(error, OverloadedError) else verdict


def judge_open_inference(error: ServeError) -> Verdict:
    """By HTTP status alone, but for a call without a name, which TorchServe answers so."""
    return Verdict(Code.INTERNAL if isinstance(error, MissingParameterError) else code_of(error.status))


def status_text(error: ServeError, verdict: Verdict, error_format: ErrorFormat, request_id: str) -> str:
    """The description that goes with ``verdict.code``; at most TEXT_SIZE_MAX bytes."""
    lines = [error.message if verdict.text is None else verdict.text]
    if verdict.augmentation:
        lines.append(verdict.augmentation)
    detail = error_format.detail(error, request_id)
    if detail:
        # Long texts are cut, so that what follows them is told too.
        lines.append(json.dumps({key: _short(value) for key, value in detail.items()}))
    return "\n".join(lines).encode()[:TEXT_SIZE_MAX].decode("utf-8", "ignore")


def _short(value: object) -> object:
    return value[:500] + "..." if isinstance(value, str) and len(value) > 500 else value
