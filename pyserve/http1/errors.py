"""Errors that only the HTTP/1.1 front end raises. Each one ends the connection after its answer."""

from __future__ import annotations

from pyserve.errors import BadRequestError, ClientError, TooLargeError

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")


class InvalidHttpError(BadRequestError):
    """The bytes are not a request that RFC 9112 allows. The reason goes into ``detail``."""

    def __init__(self, reason: str):
        super().__init__("Invalid HTTP message.", detail={"reason": reason})


class SlowClientError(ClientError):
    """The request did not arrive in the time it is given."""

    status = 408
    type = "BadRequestException"


class TargetTooLongError(ClientError):
    """The request line is over its limit."""

    status = 414
    type = "BadRequestException"


class ExpectationError(ClientError):
    """``Expect`` asks for something other than ``100-continue``."""

    status = 417
    type = "BadRequestException"


class HeadTooLargeError(ClientError):
    """The request head is over its size or count of headers."""

    status = 431
    type = "BadRequestException"


class UnknownCodingError(ClientError):
    """A transfer coding other than ``chunked``."""

    status = 501
    type = "BadRequestException"


class VersionError(ClientError):
    """An HTTP version other than 1.0 and 1.1."""

    status = 505
    type = "BadRequestException"


class BodyTooLargeError(TooLargeError):
    """The body is over ``max_request_size``. ``announced`` is its Content-Length, 0 for a chunked body."""

    def __init__(self, size: int, size_max: int, *, announced: int = 0):
        shown = f"{size} bytes" if announced else f"at least {size} bytes"
        super().__init__(
            f"Request body of {shown} is over the limit: max_request_size is {size_max} bytes. "
            "Send less, or raise max_request_size in config.properties.",
            detail={"max_request_size": size_max, "request_size": size},
        )
        self.announced = announced
