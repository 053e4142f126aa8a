"""Streams the text of several sequences that a transformers model generates at once."""

from __future__ import annotations

from queue import Queue
from typing import Any

try:
    from transformers.generation.streamers import BaseStreamer
except ImportError as error:
    raise ImportError("hf_batch_streamer needs the package transformers: pip install transformers") from error


class TextIteratorStreamerBatch(BaseStreamer):
    """An iterator over lists of new text, one element per sequence of the batch.

    Args:
        tokenizer: decodes the tokens.
        batch_size: sequences that are generated at once.
        skip_prompt: whether the first call of ``put``, the prompts, is left out.
        timeout: s to wait for the next piece; None for ever.
        decode_kwargs: for the tokenizer.
    """

    def __init__(
        self, tokenizer: Any, batch_size: int, skip_prompt: bool = False, timeout: float | None = None,
        **decode_kwargs: Any,
    ):  # fmt: skip
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.skip_prompt = skip_prompt
        self.timeout = timeout
        self.decode_kwargs = decode_kwargs
        self._tokens: list[list[int]] = [[] for _ in range(batch_size)]
        self._shown = [0] * batch_size
        self._is_prompt = True
        self._queue: Queue[list[str] | None] = Queue()

    def put(self, value: Any) -> None:
        """New tokens, one or more per sequence."""
        if value.dim() == 1:
            value = value.reshape(-1, 1)
        if value.shape[0] != self.batch_size:
            raise ValueError(f"tokens of {value.shape[0]} sequences came, {self.batch_size} were announced")
        if self._is_prompt:
            self._is_prompt = False
            if self.skip_prompt:
                return
        pieces = []
        for index, row in enumerate(value.tolist()):
            self._tokens[index] += row
            text = self.tokenizer.decode(self._tokens[index], **self.decode_kwargs)
            # The last word may still grow, and a character of several tokens shows as U+FFFD until it is whole.
            end = len(text) if text.endswith("\n") else text.rfind(" ") + 1
            piece = text[self._shown[index] : end] if end > self._shown[index] else ""
            self._shown[index] += len(piece)
            pieces.append(piece)
        self._queue.put(pieces)

    def end(self) -> None:
        """No more tokens come."""
        rest = []
        for index, tokens in enumerate(self._tokens):
            rest.append(self.tokenizer.decode(tokens, **self.decode_kwargs)[self._shown[index] :])
        self._queue.put(rest)
        self._queue.put(None)

    def __iter__(self) -> TextIteratorStreamerBatch:
        return self

    def __next__(self) -> list[str]:
        piece = self._queue.get(timeout=self.timeout)
        if piece is None:
            raise StopIteration
        return piece
