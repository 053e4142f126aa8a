"""Text: from a sentence to words and n-grams, and from those to the numbers of a vocabulary.

`get_tokenizer` and `ngrams_iterator` do what torchtext's functions of these names document, so that a model trained
with them gets the same tokens; torchtext itself, which is no longer developed, is not needed.
"""

from __future__ import annotations

import html
import pickle
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyserve.handler import ModelLoadError

# Of a vocabulary that says nothing else, the entry of a word it does not have.
UNKNOWN_TOKENS = ("<unk>", "<UNK>", "[UNK]", "unk")

_CONTRACTED_WORDS = {
    "won't": "will not", "can't": "cannot", "shan't": "shall not", "ain't": "is not", "let's": "let us",
    "y'all": "you all", "ma'am": "madam", "o'clock": "of the clock", "'cause": "because", "'tis": "it is",
    "it's": "it is", "he's": "he is", "she's": "she is", "that's": "that is", "there's": "there is",
    "what's": "what is", "who's": "who is", "where's": "where is", "how's": "how is",
}  # fmt: skip
_CONTRACTED_ENDINGS = {"n't": " not", "'ve": " have", "'re": " are", "'ll": " will", "'m": " am", "'d": " would"}
_CONTRACTION = re.compile(
    rf"(?<!\w)(?:{'|'.join(_CONTRACTED_WORDS)})(?!\w)|(?<=\w)(?:{'|'.join(_CONTRACTED_ENDINGS)})(?!\w)", re.IGNORECASE
)
# What is never closed goes to the end of the text, which also keeps these patterns linear in its length.
_SCRIPT = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|\Z)", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<!--.*?(?:-->|\Z)|</?[a-zA-Z!][^<>]*>", re.DOTALL)
_NOT_A_WORD = re.compile(r"[^\w\s']|_")

_BASIC_ENGLISH = (
    ("'", " '  "), ('"', ""), (".", " . "), ("<br />", " "), (",", " , "), ("(", " ( "), (")", " ) "),
    ("!", " ! "), ("?", " ? "), (";", " "), (":", " "),
)  # fmt: skip


def remove_html(text: str) -> str:
    """``text`` without tags, comments, scripts and style sheets; entities such as ``&amp;`` become characters."""
    return html.unescape(_TAG.sub(" ", _SCRIPT.sub(" ", text)))


def expand_contractions(text: str) -> str:
    """``"it's"`` becomes ``"it is"``, ``"don't"`` ``"do not"``; the typographic apostrophe counts as one."""
    text = text.replace("\u2019", "'")
    return _CONTRACTION.sub(_expanded, text)


def _expanded(match: re.Match[str]) -> str:
    form = match[0].lower()
    return _CONTRACTED_WORDS.get(form) or _CONTRACTED_ENDINGS[form]


def remove_accents(text: str) -> str:
    """``"café"`` becomes ``"cafe"``; characters beyond ASCII that have no plain form are dropped."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def remove_punctuation(text: str) -> str:
    """Everything but letters, digits, white space and apostrophes becomes a space."""
    return _NOT_A_WORD.sub(" ", text)


def basic_english(line: str) -> list[str]:
    """Lower-case words of ``line``; each of ``. , ( ) ! ?`` and the apostrophe is a word of its own."""
    line = line.lower()
    for old, new in _BASIC_ENGLISH:
        line = line.replace(old, new)
    return line.split()


def get_tokenizer(tokenizer: str | Callable[[str], list[str]] | None, language: str = "en") -> Callable[[str], Any]:
    """The function that splits a text into words.

    Args:
        tokenizer: ``"basic_english"``, None to split at white space, or a function, which is returned as it is.
        language: of ``"basic_english"``, only ``"en"``.

    Raises:
        ValueError: there is no tokenizer of that name.
    """
    if tokenizer is None:
        return str.split
    if callable(tokenizer):
        return tokenizer
    if tokenizer == "basic_english":
        if language != "en":
            raise ValueError(f"'basic_english' splits English text only, not language {language!r}; pass a function")
        return basic_english
    raise ValueError(
        f"there is no built-in tokenizer {tokenizer!r}, only 'basic_english'; install the package it is from and pass "
        "its function"
    )


def ngrams_iterator(token_list: Sequence[str], ngrams: int) -> Iterator[str]:
    """The tokens, then all pairs of neighbours joined by a space, and so on up to groups of ``ngrams``.

    ``list(ngrams_iterator(["here", "we", "are"], 2))`` is ``["here", "we", "are", "here we", "we are"]``.
    """
    yield from token_list
    for size in range(2, ngrams + 1):
        for start in range(len(token_list) - size + 1):
            yield " ".join(token_list[start : start + size])


class Vocabulary(dict[str, int]):
    """Word -> number. A word it does not have gets the number of ``<unk>`` if there is such an entry, else KeyError."""

    def __init__(self, numbers: Mapping[str, int] | Iterable[tuple[str, int]]):
        super().__init__(numbers)
        self.unknown = next((self[token] for token in UNKNOWN_TOKENS if token in self), None)

    def __missing__(self, word: str) -> int:
        if self.unknown is None:
            raise KeyError(word)
        return self.unknown

    def get_stoi(self) -> dict[str, int]:
        """All words with their numbers."""
        return dict(self)

    def get_itos(self) -> list[str]:
        """All words in the order of their numbers."""
        return sorted(self, key=self.__getitem__)

    @classmethod
    def of(cls, value: Any, name: str) -> Vocabulary:
        """The vocabulary in a dict (word -> number), a list of words, or an object with a ``get_stoi()`` such as
        torchtext's.

        Raises:
            ModelLoadError: it is none of these.
        """  # fmt: skip
        forms = "a dict from word to number, or a list of words"
        if callable(getattr(value, "get_stoi", None)):
            value = value.get_stoi()
        if isinstance(value, (list, tuple)):
            value = {word: number for number, word in enumerate(value)}
        if not isinstance(value, Mapping):
            raise ModelLoadError(f"{name} holds a {type(value).__name__}; expected {forms}")
        for word, number in value.items():
            if not isinstance(word, str) or not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise ModelLoadError(f"{name}: entry {word!r}: {number!r} is no word with its number; expected {forms}")
        if not value:
            raise ModelLoadError(f"{name} is empty; expected {forms}")
        return cls(value)


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary that ``torch.save`` wrote to ``path``; see `Vocabulary.of` for its forms.

    Raises:
        ModelLoadError: the file is missing or damaged, or holds an object that only other code could make.
    """
    fix = "save it as a dict: torch.save(dict(vocab.get_stoi()), 'source_vocab.pt')"
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelLoadError(
            f"{path.name} is not in the archive; text handlers read the vocabulary from it. Pack it with --extra-files "
            f"{path.name}; {fix}"
        ) from error
    except pickle.UnpicklingError as error:
        raise ModelLoadError(
            f"{path.name} holds an object of a class of its own (torchtext's Vocab?), and reading it would run code; "
            f"where you made it, {fix}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        # torch's reader raises errors of many classes on damaged files; whatever it was, the file is at fault.
        raise ModelLoadError(f"{path.name} cannot be read, it may be damaged: {type(error).__name__}") from error
    return Vocabulary.of(value, path.name)
