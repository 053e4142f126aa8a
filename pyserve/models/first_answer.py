"""The first answer of a model in the native lane, made at load in the way of a request: what cannot be answered fails
there, with the place, and not with every request."""  # fmt: skip

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from pyserve.archive.samples import Sample, archive_samples, warm_up_samples
from pyserve.context import Batch, Context
from pyserve.errors import HandlerError, ModelLoadError, ServeError
from pyserve.handler import Handler
from pyserve.request import codec
from pyserve.torch_error import cause_of
from pyserve.worker.failure import describe_failure
from pyserve.worker.rehearsal import KeptAttributes
from pyserve.worker.sample_requests import made_up_requests

log = logging.getLogger(__name__)

Run = Callable[[list[torch.Tensor]], Any]


def rehearse(
    label: str, handler: Handler, context: Context, example: Sequence[torch.Tensor], run: Run, *, is_built_in: bool
) -> dict[str, list[torch.Tensor]]:
    """Answers the example, a sample made of it, the samples that the archive brings along and those in its ``warmup/``.

    Args:
        label: the archive's name, for messages.
        example: one item [1, ...] per input.
        run: the network.
        is_built_in: the handler is one of pyserve's. Of others only the example's way out is tried, and what fails is
            a warning: they may want more than an example knows.

    Returns:
        the inputs, as the handler made them, of the samples that were answered, by the names of their files.

    Raises:
        ModelLoadError: a stage failed; the text says which and why.
    """
    kept = KeptAttributes(context, handler)
    try:
        return _rehearse(label, handler, context, example, run, is_built_in=is_built_in)
    finally:
        context.bind(None)
        kept.restore()


def _rehearse(
    label: str, handler: Handler, context: Context, example: Sequence[torch.Tensor], run: Run, *, is_built_in: bool
) -> dict[str, list[torch.Tensor]]:
    failures = []
    for attempt in _attempts(handler, context, example, run, is_built_in=is_built_in):
        try:
            attempt()
            break
        except _StageError as error:
            failures.append(error)
    else:
        if is_built_in:
            said = ", ".join(f"{str(each.dtype).removeprefix('torch.')} {list(each.shape[1:])}" for each in example)
            raise ModelLoadError(
                f"{label} cannot answer an example of its input ({said}): {failures[0]}"
            ) from failures[0]
        log.warning("%s: an example could not be answered: %s", label, failures[0])
    answered = {}
    model_dir = context.system_properties["model_dir"]
    for sample in (*archive_samples(model_dir), *warm_up_samples(model_dir)):
        try:
            answered[sample.name] = _from_body(handler, context, run, sample)
        except _StageError as error:
            log.warning("%s: its %s could not be answered: %s", label, sample.name, error)
    return answered


def _attempts(
    handler: Handler, context: Context, example: Sequence[torch.Tensor], run: Run, *, is_built_in: bool
) -> Iterator[Callable[[], object]]:
    """Ways to ask the model, the usual one first; one of them has to be answered."""
    if not is_built_in:
        _bind(context, "application/json")
        yield lambda: _answer(handler, context, _run(run, list(example)))
        return
    for made_up in made_up_requests(handler, context):
        yield functools.partial(_from_body, handler, context, run, made_up.sample)


class _StageError(Exception):
    pass


def _from_body(handler: Handler, context: Context, run: Run, sample: Sample) -> list[torch.Tensor]:
    """Returns the inputs that it became."""
    _bind(context, sample.content_type)
    prepared = _stage(f"preprocess of {sample.name}", lambda: handler.preprocess([_row(sample)]), context)
    inputs = list(prepared) if isinstance(prepared, (tuple, list)) else [prepared]
    _answer(handler, context, _run(run, inputs))
    return inputs


def _bind(context: Context, content_type: str) -> None:
    context.bind(Batch(["warm-up"], [(("content-type", content_type),)]))


def _row(sample: Sample) -> dict[str, Any]:
    body: Any = bytearray(sample.body)
    if sample.content_type == "application/json":
        body = json.loads(sample.body)
    elif sample.content_type == "text/plain":
        body = sample.body.decode()
    return {"body": body}


def _run(run: Run, inputs: list[torch.Tensor]) -> Any:
    try:
        return run([each.clone() for each in inputs])
    except MemoryError:
        raise
    except Exception as error:  # whatever the model raises
        raise _StageError(f"the model's forward: {cause_of(str(error)) or type(error).__name__}") from error


def _answer(handler: Handler, context: Context, output: Any) -> None:
    def answer() -> None:
        handler.context = context
        results = handler.postprocess(output)
        if not isinstance(results, list) or len(results) != 1:
            found = f"a list of {len(results)}" if isinstance(results, list) else f"a {type(results).__name__}"
            raise HandlerError(f"it returned {found} for a batch of 1")
        codec.encode_result(results[0], lambda: None)

    _stage("postprocess", answer, context)


def _stage(name: str, call: Callable[[], Any], context: Context) -> Any:
    try:
        return call()
    except ServeError as error:
        text = (error.detail or {}).get("text") if isinstance(error, HandlerError) else None
        raise _StageError(f"{name}: {text or error.message}") from error
    except Exception as error:
        failure = describe_failure(error, context.system_properties["model_dir"])
        raise _StageError(f"{name}: {failure.line()}") from error
