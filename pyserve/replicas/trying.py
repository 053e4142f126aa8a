"""A request to a version that nobody is sent to yet."""

from __future__ import annotations

from urllib.parse import quote

from pyserve.client_calls import AnswerError
from pyserve.embedding.local_call import LocalCalls
from pyserve.errors import JsonObject, ModelLoadError


async def try_sample(calls: LocalCalls, sample: JsonObject) -> None:
    """Sends a version the ``body`` of a ``sample``, whose ``name``, ``version`` and ``type`` say how.

    Raises:
        ModelLoadError: it answers with an error.
    """
    path = f"/predictions/{quote(sample['name'], safe='')}/{quote(sample['version'], safe='')}"
    headers = {"Content-Type": sample["type"]} if sample.get("type") else {}
    try:
        await calls.ask("POST", path, sample["body"], headers)
    except AnswerError as error:
        raise ModelLoadError(f"{sample['name']} {sample['version']} answers the sample with {error}") from None
