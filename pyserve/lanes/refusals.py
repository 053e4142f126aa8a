"""What a lane says when it cannot serve: TorchServe's texts, each for several causes that ``detail`` distinguishes."""

from __future__ import annotations

import re
import time

from pyserve.config.config import Config
from pyserve.errors import HandlerError, InputError, JsonObject, OutOfMemoryError, OverloadedError, ServeError
from pyserve.torch_error import cause_of
from pyserve.worker.failure import Failure

# What torch says of an index that a table does not have.
_INDEX = re.compile(r"\bindex(es)? (\S+ )?(is )?out of (range|bounds)|\bindex out of bounds", re.IGNORECASE)


def no_worker_subjects(name: str, url_version: str) -> tuple[str, str]:
    """How the text for "no worker" begins for a URL without a version and with one; the odd quote is TorchServe's."""
    return f'Model "{name}" has', f'Model "{name}" Version {url_version}" has'


def no_worker_error(
    name: str, detail: JsonObject, retry_after_s: int | None = None, url_version: str = "default"
) -> OverloadedError:
    """TorchServe's one text for every reason not to admit a request."""
    detail.setdefault("fix", f"PUT /models/{name}?min_worker=1 on the management address")
    subject = no_worker_subjects(name, url_version)[url_version != "default"]
    return OverloadedError(
        f"{subject} no worker to serve inference request. Please use scale workers API to add workers. If this is a "
        "sequence inference, please check if it is closed, or expired; or exceeds maxSequenceJobQueueSize",
        detail=detail,
        headers={"Retry-After": retry_after() if retry_after_s is None else str(retry_after_s)},
    )


def as_queue_full(error: OverloadedError, config: Config) -> OverloadedError:
    """``error``, of a full queue, with the status and the ``Retry-After`` that are configured for it."""
    error.status = config.queue_full_status
    if config.queue_full_retry_after:
        error.headers["Retry-After"] = str(config.queue_full_retry_after)
    return error


def down_error(name: str, text: str, failure: ServeError | None, retry_after_s: int | None) -> OverloadedError:
    """For a model whose workers ended, or cannot be loaded.

    Args:
        text: why.
        failure: the same, if it is the error of a load.
        retry_after_s: when another worker is started; None if none will be before somebody asks for it.
    """
    detail: JsonObject = {"reason": "no worker", "text": text}
    if failure is not None and failure.detail.get("exception"):
        detail["exception"] = failure.detail["exception"]
    if retry_after_s is None:
        detail["fix"] = f"fix the handler, then PUT /models/{name}?min_worker=1"
    else:
        detail["fix"] = "retry later: a worker is started again by itself, as soon as what the text says is over"
    return no_worker_error(name, detail, retry_after_s)


def device_lost_error(name: str, reason: str) -> OverloadedError:
    """For a request of a model whose device is lost, as `pyserve.lanes.lost_devices` has it.

    Args:
        reason: why, in the driver's words.
    """
    return OverloadedError(
        f'The device that model "{name}" runs on is lost; the server starts again by itself',
        detail={"reason": "device lost", "text": cause_of(reason) or "no text", "fix": "retry in a few seconds"},
        headers={"Retry-After": retry_after()},
    )


def handler_error(failure: Failure) -> HandlerError | OutOfMemoryError:
    """What an exception of a handler means for its client."""
    if failure.status == OutOfMemoryError.status:
        return OutOfMemoryError(failure.message, detail=failure.detail())
    error = HandlerError(failure.message, detail=failure.detail())
    error.status, error.type = failure.status, failure.type
    return error


def worker_died_error(detail: JsonObject | None = None) -> HandlerError:
    """TorchServe's text for a worker that is gone, with status 500."""
    error = HandlerError("Worker died.", detail=detail)
    error.status = 500
    return error


def failed_run_error(name: str, code: str, message: str, *, is_strict: bool) -> ServeError:
    """For a request that the network itself failed on, alone: what the engine says of it."""
    if code == "device_lost":
        return device_lost_error(name, message)
    cause = cause_of(message) or "no text"
    if code == "out_of_memory":
        return OutOfMemoryError("Out of resources", detail={"exception": "OutOfMemoryError", "text": cause})
    if _INDEX.search(cause) and not is_strict:
        # The model answers other inputs, and this one was alone when it failed.
        return InputError(
            f"a number in the input stands for nothing that the model has: {cause}; send those that it has "
            "('vocabulary' or 'values' under 'input' in model-config.yaml says which there are)"
        )
    detail = {"exception": "RuntimeError", "text": cause, "where": "the model's forward"}
    return HandlerError("Prediction failed", detail=detail)


def retry_after() -> str:
    """Seconds, spread over a few, so that refused clients do not come back together."""
    return str(1 + time.monotonic_ns() % 3)
