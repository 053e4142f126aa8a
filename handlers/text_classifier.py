"""Text in, the probability of each label out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from pyserve.handler import HandlerError, InputError, PredictionException
from pyserve.handlers.explanation import integrated_gradients, require_gradients
from pyserve.handlers.labels import labelled
from pyserve.handlers.rows import found, row_value, unwrapped
from pyserve.handlers.text import ngrams_iterator
from pyserve.handlers.text_handler import TextHandler


class TextClassifier(TextHandler):
    """Any model that is called with the numbers of all words of a batch and the offset of each text among them, as an
    `torch.nn.EmbeddingBag` is, and gives scores [n, classes].

    Attributes:
        ngrams: words are followed by groups of up to so many neighbours.
    """  # fmt: skip

    ngrams = 2

    def preprocess(self, data: Sequence[Any]) -> Any:
        """Rows of text -> the numbers of all words, one after the other, and per row its list of words.

        A word that is not in the vocabulary, which has no entry for such words, is left out.

        Raises:
            InputError: a row is not text.
        """
        numbers: list[int] = []
        words: list[list[str]] = []
        for row in data:
            words.append([])
            for word in ngrams_iterator(self._tokenize(self._clean(_text(row_value(row)))), self.ngrams):
                try:
                    numbers.append(self.source_vocab[word])
                except KeyError:
                    continue
                words[-1].append(word)
        return torch.tensor(numbers, dtype=torch.int64, device=self.device), words

    def _clean(self, line: str) -> str:
        line = self._expand_contractions(self._remove_html_tags(line).lower())
        return self._remove_punctuation(self._remove_accented_characters(line))

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's scores for what `preprocess` made, all rows at once."""
        numbers, words = data
        counts = [len(numbers)] if not words or isinstance(words[0], str) else [len(row) for row in words]
        offsets = [0, *accumulate(counts[:-1])]
        output = super().inference(numbers, torch.tensor(offsets, device=self.device), *args, **kwargs)
        if len(counts) > 1 and isinstance(output, torch.Tensor) and (output.dim() < 2 or len(output) != len(counts)):
            # The model ignores the offsets: it knows one text only.
            start = torch.tensor([0], device=self.device)
            # Cloned: it may be memory of the model's own, which the next call changes.
            rows = [super(TextClassifier, self).inference(part, start, *args, **kwargs).clone()
                    for part in numbers.split(counts)]  # fmt: skip
            return torch.cat([row if row.dim() == 2 else row.unsqueeze(0) for row in rows])
        return output

    def postprocess(self, data: Any) -> list[Any]:
        """Scores [n, classes] -> per row a dict from label to probability, in the order of the classes.

        Raises:
            HandlerError: the model's output is not [n, classes].
        """
        if isinstance(data, torch.Tensor) and data.dim() == 1:
            data = data.unsqueeze(0)
        if not isinstance(data, torch.Tensor) or data.dim() != 2:
            shape = f"shape {list(data.shape)}" if isinstance(data, torch.Tensor) else f"a {type(data).__name__}"
            raise HandlerError(f"text_classifier needs scores [batch, classes] from the model, got {shape}")
        rows = self.json_values(torch.softmax(data.float(), dim=1))
        return [labelled(row, range(len(row)), self.mapping) for row in rows]

    def get_insights(self, tensor_data: Any, raw_data: Sequence[Any], target: int = 0) -> list[Any]:
        """Per row ``{"importances": [...], "words": [...]}``: how much each word speaks for class ``target``.

        Raises:
            PredictionException: captum is not installed, or the model is not eager (status 501).
        """
        numbers, words = tensor_data
        if isinstance(self.model, torch.jit.ScriptModule):
            raise PredictionException(
                "explanations of text need an eager model; pack the model's class with --model-file", 501
            )
        model = require_gradients(self.model)
        layers = [each for each in model.modules() if isinstance(each, (torch.nn.EmbeddingBag, torch.nn.Embedding))]
        if len(layers) != 1:
            raise PredictionException(
                f"explanations of text need a model with one embedding layer, this one has {len(layers)}; override "
                "get_insights",
                501,
            )
        answers = []
        for part, row_words in zip(numbers.split([len(row) for row in words]), words, strict=True):
            importances: list[Any] = []
            if len(part):
                vectors = torch.nn.functional.embedding(part, layers[0].weight.detach()).unsqueeze(0)
                attributions = integrated_gradients(_score_of_vectors(model, layers[0], part), vectors, target)
                importances = self.json_values(self.summarize_attributions(attributions))
            answers.append({"importances": importances, "words": row_words})
        return answers


def _score_of_vectors(
    model: torch.nn.Module, layer: torch.nn.Module, numbers: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """``model`` as a function of the vectors [n, words, dimensions] that its embedding looks up for one text."""

    def score(vectors: torch.Tensor) -> torch.Tensor:
        count = len(vectors)

        def substitute(*_: Any) -> torch.Tensor:
            if not isinstance(layer, torch.nn.EmbeddingBag):
                return vectors.flatten(0, 1)
            if layer.mode == "max":
                return vectors.amax(1)
            return vectors.mean(1) if layer.mode == "mean" else vectors.sum(1)

        hook = layer.register_forward_hook(substitute)
        try:
            offsets = torch.arange(count, device=numbers.device) * len(numbers)
            output: torch.Tensor = model(numbers.repeat(count), offsets)
        finally:
            hook.remove()
        return output

    return score


def _text(value: Any) -> str:
    value = unwrapped(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"expected text in UTF-8, got {found(value)}") from error
    if isinstance(value, str):
        return value
    raise InputError(f'expected text, as text/plain or as JSON: a string or {{"data": a string}}; got {found(value)}')
