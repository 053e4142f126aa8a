"""text_classifier: what becomes of a sentence, batches, vocabularies of every form, and explanations."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from pyserve.context import Context
from pyserve.handler import HandlerError, InputError, ModelLoadError, PredictionException
from pyserve.handlers import text
from pyserve.handlers.text import Vocabulary, get_tokenizer, ngrams_iterator, read_vocabulary
from pyserve.handlers.text_classifier import TextClassifier

SEED = int(os.environ.get("PYSERVE_TEST_SEED", "22"))
needs_captum = pytest.mark.skipif(importlib.util.find_spec("captum") is None, reason="captum is not installed")

WORDS = ["<unk>", "the", "stock", "game", "fell", "won", "the stock", "game won", "it", "is", "not"]

MODEL_FILE = """
import torch

class Bag(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.EmbeddingBag(11, 4, mode="MODE")
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, numbers, offsets):
        return self.linear(self.embedding(numbers, offsets))
"""


def context_for(folder: Path, model: Mapping[str, str] | None = None, **config: Any) -> Context:
    return Context("m", str(folder), {"model": dict(model or {})}, model_yaml_config=config)


def batch_of(context: Context, *headers: Mapping[str, str]) -> Context:
    return context.for_batch([f"id-{i}" for i in range(len(headers))], [list(each.items()) for each in headers])


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return packed(tmp_path, "mean")


def packed(folder: Path, mode: str) -> Path:
    print(f"PYSERVE_TEST_SEED={SEED}")
    generator = torch.Generator().manual_seed(SEED)
    (folder / "model.py").write_text(MODEL_FILE.replace("MODE", mode))
    shapes = {"embedding.weight": (11, 4), "linear.weight": (3, 4), "linear.bias": (3,)}
    torch.save({key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}, folder / "weights.pth")
    torch.save({word: number for number, word in enumerate(WORDS)}, folder / "source_vocab.pt")
    (folder / "index_to_name.json").write_text(json.dumps({"0": "world", "1": "sports", "2": "business"}))
    return folder


def loaded(model_dir: Path) -> tuple[TextClassifier, Context]:
    handler = TextClassifier()
    context = context_for(model_dir, {"modelFile": "model.py", "serializedFile": "weights.pth"})
    handler.initialize(context)
    assert handler.initialized
    return handler, context


# --- words ------------------------------------------------------------------------------------------------------------


def test_tokens_and_ngrams_are_torchtexts() -> None:
    tokenize = get_tokenizer("basic_english")
    assert tokenize('You can\'t (really) "go"; now: yes!<br />No, sir. Why?') == [
        "you", "can", "'", "t", "(", "really", ")", "go", "now", "yes", "!", "no", ",", "sir", ".", "why", "?",
    ]  # fmt: skip
    assert list(ngrams_iterator(["here", "we", "are"], 1)) == ["here", "we", "are"]
    assert list(ngrams_iterator(["here", "we", "are"], 3)) == ["here", "we", "are", "here we", "we are", "here we are"]
    assert list(ngrams_iterator([], 2)) == []
    assert get_tokenizer(None)("a  b") == ["a", "b"]
    assert get_tokenizer(tokenize) is tokenize
    for name, language in (("spacy", "en"), ("basic_english", "de")):
        with pytest.raises(ValueError, match="basic_english"):
            get_tokenizer(name, language)


@pytest.mark.parametrize(
    ("clean", "line", "expected"),
    [
        (text.remove_html, "a<b>c</b><!-- x --> &amp; 1 < 2<script>x()</script>", "a c   & 1 < 2 "),
        (text.remove_html, "a <!-- never closed", "a  "),
        (text.expand_contractions, "it\u2019s not; don't, they've John's", "it is not; do not, they have John's"),
        (text.remove_accents, "café naïve Ω", "cafe naive "),
        (text.remove_punctuation, "a-b, c_d 'e' 1.5!", "a b  c d 'e' 1 5 "),
    ],
)
def test_text_is_cleaned(clean: Any, line: str, expected: str) -> None:
    assert clean(line) == expected


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_batched_answers_are_those_of_single_requests(tmp_path: Path, mode: str) -> None:
    handler, context = loaded(packed(tmp_path, mode))
    lines: list[Any] = ["The STOCK fell.", b"It isn't the game!", "", bytearray(b"unheard of words"), "game won"]
    rows = [{"data" if i % 2 else "body": line} for i, line in enumerate(lines)]
    together = handler.handle(rows, batch_of(context, *[{}] * len(rows)))
    for row, answer in zip(rows, together, strict=True):
        (alone,) = handler.handle([row], batch_of(context, {}))
        assert list(answer) == ["world", "sports", "business"]
        assert answer == pytest.approx(alone, abs=1e-6)
        assert sum(answer.values()) == pytest.approx(1, abs=1e-5)


def test_words_and_pairs_go_to_the_model_by_number(model_dir: Path) -> None:
    handler, _ = loaded(model_dir)
    numbers, words = handler.preprocess([{"data": "The stock fell"}, {"data": "game xyz"}])
    assert words == [["the", "stock", "fell", "the stock", "stock fell"], ["game", "xyz", "game xyz"]]
    assert numbers.tolist() == [1, 2, 4, 6, 0, 3, 0, 0]
    expected = handler.model(numbers, torch.tensor([0, 5]))
    assert torch.equal(handler.inference((numbers, words)), expected)
    # A preprocess of somebody else's, for one text: its numbers and one list of words.
    assert torch.equal(handler.inference((numbers[:5], words[0])), expected[:1])


def test_unknown_words_are_left_out_if_the_vocabulary_has_no_entry_for_them(model_dir: Path) -> None:
    handler, _ = loaded(model_dir)
    handler.source_vocab = Vocabulary({"game": 3})
    assert handler.preprocess([{"data": "new game"}])[1] == [["game"]]
    assert handler.preprocess([{"data": "nothing"}])[0].dtype == torch.int64


def test_model_that_knows_one_text_only_is_called_for_each(model_dir: Path) -> None:
    class One(torch.nn.Module):
        def forward(self, numbers: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            assert offsets.tolist()[0] == 0
            return torch.nn.functional.one_hot(numbers, 11).sum(0, keepdim=True)[:, :3].float()

    handler, context = loaded(model_dir)
    handler.model = One()
    rows = [{"data": "the the stock"}, {"data": "game"}]
    assert handler.handle(rows, batch_of(context, {}, {})) == [
        handler.handle([row], batch_of(context, {}))[0] for row in rows
    ]


@pytest.mark.parametrize("value", [b"\xff\xfe\xff", [1, 2], {"a": 1}, None, 3])
def test_what_is_no_text_is_the_requests_fault(model_dir: Path, value: Any) -> None:
    with pytest.raises(InputError, match="expected text"):
        loaded(model_dir)[0].preprocess([{"body": value}])


@pytest.mark.parametrize("output", [torch.zeros(1, 2, 3), [1], None])
def test_output_that_is_no_scores_is_the_models_fault(output: Any) -> None:
    with pytest.raises(HandlerError, match="text_classifier needs scores"):
        TextClassifier().postprocess(output)


# --- vocabularies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        ["<unk>", "a", "b"],
        {"a": 1, "b": 2, "<unk>": 0},
        OrderedDict(b=2, a=1, **{"<unk>": 0}),
        Counter({"a": 1, "b": 2, "<unk>": 0}),
    ],
)
def test_vocabulary_is_read_in_every_form(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "source_vocab.pt")
    vocabulary = read_vocabulary(tmp_path / "source_vocab.pt")
    assert [vocabulary[word] for word in ("a", "b", "c")] == [1, 2, 0]
    assert vocabulary.get_itos() == ["<unk>", "a", "b"] and vocabulary.get_stoi()["b"] == 2


def test_vocabulary_may_be_an_object_that_says_its_numbers() -> None:
    class Vocab:
        def get_stoi(self) -> dict[str, int]:
            return {"a": 0, "b": 1}

    vocabulary = Vocabulary.of(Vocab(), "source_vocab.pt")
    assert vocabulary["b"] == 1
    with pytest.raises(KeyError):
        vocabulary["c"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "source_vocab.pt is not in the archive"),
        (torch.nn.Linear(2, 2), r"torch.save\(dict\(vocab.get_stoi\(\)\)"),
        (3, "holds a int"),
        ([], "is empty"),
        ({1: 2}, "entry 1: 2"),
        ({"a": "b"}, "entry 'a': 'b'"),
        (b"damaged", "may be damaged|holds an object"),
    ],
)
def test_vocabulary_that_cannot_be_used_says_why(model_dir: Path, value: Any, expected: str) -> None:
    path = model_dir / "source_vocab.pt"
    path.unlink()
    if isinstance(value, bytes):
        path.write_bytes(value)
    elif value is not None:
        torch.save(value, path)
    handler = TextClassifier()
    with pytest.raises(ModelLoadError, match=expected):
        handler.initialize(context_for(model_dir, {"modelFile": "model.py", "serializedFile": "weights.pth"}))
    assert not handler.initialized


# --- explanations -----------------------------------------------------------------------------------------------------


@needs_captum
@pytest.mark.parametrize("mode", ["mean", "sum"])
def test_importances_of_a_linear_bag_are_each_words_part_of_the_score(tmp_path: Path, mode: str) -> None:
    handler, context = loaded(packed(tmp_path, mode))
    rows = [{"data": "the stock fell", "target": "1"}, {"data": ""}, {"data": "game won"}]
    answers = handler.handle(rows, batch_of(context, *[{"explain": "True"}] * 3))
    assert answers[1] == {"importances": [], "words": []}
    model = handler.model
    for answer in (answers[0], answers[2]):
        numbers = torch.tensor([handler.source_vocab[word] for word in answer["words"]])
        parts = model.embedding.weight[numbers] @ model.linear.weight[1]
        expected = parts / parts.norm()
        assert torch.allclose(torch.tensor(answer["importances"]), expected, atol=1e-4)
    assert answers[0]["words"] == ["the", "stock", "fell", "the stock", "stock fell"]
    assert not model.embedding._forward_hooks


def test_text_that_cannot_be_explained_says_why(model_dir: Path) -> None:
    handler, _ = loaded(model_dir)
    numbers = handler.preprocess([{"data": "game"}])
    for model, reason in ((torch.jit.script(handler.model), "eager model"), (torch.nn.Linear(1, 1), "one embedding")):
        handler.model = model
        with pytest.raises(PredictionException, match=reason) as caught:
            handler.get_insights(numbers, [{}], 0)
        assert caught.value.error_code == 501
