"""Requests made up for a built-in handler, from what it says of its input: to warm a model up, and to try batches.

    json             nested lists, or raw numbers where that is another way in     base_handler, tensor
    picture          a JPEG                                                         image_classifier, ...
    text             words of the vocabulary                                        text_classifier
    saved tensor     what torch.save writes                                         densenet_handler

The same ones every time.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pyserve.archive.samples import Sample
from pyserve.context import Context
from pyserve.proof.probe_inputs import ITEMS_MAX, InputDomain, probe_rows

PICTURE_SIZE = (400, 300)
VOCABULARY_MAX = 20_000
# More numbers than this go as bytes first: to write them down as JSON would take longer than to run the model.
JSON_COUNT_MAX = 20_000
OTHER_SIZES = (32, 64, 128, 224)
RAW, JSON = "application/octet-stream", "application/json"

Inputs = tuple[torch.Tensor, ...]


class MadeUp(NamedTuple):
    """A request that was made up.

    Attributes:
        example: the item in it, one tensor [1, ...] per input; None of pictures and texts.
    """

    sample: Sample
    example: Inputs | None = None


def makes_samples(handler: Any) -> bool:
    """Whether requests can be made up for ``handler``: it is derived from BaseHandler."""
    return callable(getattr(handler, "example_input", None)) and hasattr(handler, "sample_kind")


def made_up_requests(handler: Any, context: Context) -> Iterator[MadeUp]:
    """Ways to ask ``handler``, which is initialized, for the same kind of thing; the usual one first.

    Raises:
        whatever `example_input` raises where model-config.yaml does not describe the input.
    """
    kind = handler.sample_kind
    if kind == "picture" and not has_input(context):
        yield MadeUp(Sample("a made-up picture", picture(0), "image/jpeg"))
    elif kind == "text" and getattr(handler, "source_vocab", None):
        yield MadeUp(Sample("a made-up text", text(handler.source_vocab, 0).encode(), "text/plain"))
    else:
        example = example_of(handler, context)
        for each in (example, *_of_other_sizes(handler, example)):
            for sample in ways(handler, each):
                yield MadeUp(sample, each)


def ways(handler: Any, example: Inputs) -> list[Sample]:
    """Ways to send one item."""
    if handler.sample_kind == "saved tensor":
        return [Sample("a made-up tensor", saved(example[0]), RAW)]
    if handler.sample_kind == "picture":
        return [Sample("made-up pixels", nested(handler, example), JSON), *_picture_like(example)]
    shape = ", ".join(str(list(each.shape[1:])) for each in example)
    as_json = Sample(f"a made-up tensor {shape}", nested(handler, example), JSON)
    if not takes_raw(handler):
        return [as_json]
    as_bytes = Sample(f"a made-up tensor {shape} as bytes", raw(example), RAW)
    is_small = sum(each.numel() for each in example) <= JSON_COUNT_MAX
    return [as_json, as_bytes] if is_small else [as_bytes, as_json]


def _of_other_sizes(handler: Any, example: Inputs) -> Iterator[Inputs]:
    """Items whose free dimensions have sizes that networks like, for one that does not take the example's."""
    domains = InputDomain.of(handler, example)
    if not any(domain.free for domain in domains) or any(domain.pad_to for domain in domains):
        return
    for size in OTHER_SIZES:
        yield tuple(_resized(each, domain, size) for each, domain in zip(example, domains, strict=True))


def _resized(tensor: torch.Tensor, domain: InputDomain, size: int) -> torch.Tensor:
    shape = list(tensor.shape)
    for axis in domain.free:
        low, high = domain.sizes[axis]
        shape[axis + 1] = max(low, size if high is None else min(size, high))
    return tensor.flatten()[:1].expand(shape).clone()


def _picture_like(example: Inputs) -> list[Sample]:
    """A picture, if the input that model-config.yaml describes is what one becomes."""
    fits = tuple(example[0].shape[1:]) == (3, 224, 224)
    return [Sample("a made-up picture", picture(0), "image/jpeg")] if fits else []


def has_input(context: Context) -> bool:
    """Whether model-config.yaml describes the input."""
    return context.model_yaml_config.get("input") is not None


def example_of(handler: Any, context: Context) -> Inputs:
    """The handler's example, one tensor [1, ...] per input."""
    example = handler.example_input(context)
    return example if isinstance(example, tuple) else (example,)


class TrialRows(NamedTuple):
    """Rows for ``handler.preprocess``, of the kinds of `pyserve.proof.probe_inputs.ProbeRows`; one after the other."""

    unlike: list[dict[str, Any]]
    not_finite: list[dict[str, Any]]
    alike: list[dict[str, Any]]


def trial_rows(handler: Any, like: MadeUp) -> TrialRows:
    """Rows of the shape of ``like``, as unlike each other as requests may be, and others as like each other."""
    kind, example = handler.sample_kind, like.example
    if example is None:
        if kind == "picture":
            unlike = [{"body": bytearray(picture(number))} for number in range(ITEMS_MAX)]
            near = [{"body": bytearray(picture(0, quality))} for quality in (90, 89, 91)]
            return TrialRows(unlike, [], near)
        texts = [{"body": text(handler.source_vocab, number)} for number in range(ITEMS_MAX)]
        return TrialRows(texts, [], texts[:1])
    made = probe_rows(example, InputDomain.of(handler, example))
    return TrialRows(*([_row(handler, item) for item in items] for items in (made.unlike, made.not_finite, made.alike)))


def _row(handler: Any, item: Inputs) -> dict[str, Any]:
    if handler.sample_kind == "saved tensor":
        return {"body": bytearray(saved(item[0]))}
    return {"body": bytearray(raw(item)) if takes_raw(handler) else value(handler, item)}


# --- bodies -----------------------------------------------------------------------------------------------------------


def value(handler: Any, example: Inputs) -> Any:
    """One item as JSON: nested lists, or an object of them if the model has several inputs."""
    if len(example) == 1:
        return example[0][0].tolist()
    return {spec.name: each[0].tolist() for spec, each in zip(handler.specs, example, strict=True)}


def nested(handler: Any, example: Inputs) -> bytes:
    """`value` as a body."""
    return json.dumps(value(handler, example)).encode()


def takes_raw(handler: Any) -> bool:
    """Whether an item may come as bytes: its inputs are described and their sizes follow from their number."""
    specs: Sequence[Any] = getattr(handler, "specs", None) or ()
    free = [list(spec.shape).count(-1) for spec in specs]
    return bool(specs) and hasattr(handler, "takes_raw") and (free in ([0], [1]) or not any(free))


def raw(example: Inputs) -> bytes:
    """The numbers of one item, one input after the other, little-endian."""
    parts = []
    for each in example:
        flat = each.contiguous().flatten()
        parts.append(np.asarray(flat.view(torch.uint8) if flat.numel() else flat).tobytes())
    return b"".join(parts)


def saved(tensor: torch.Tensor) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(tensor, file)
    return file.getvalue()


def text(vocabulary: Any, number: int) -> str:
    """Words of ``vocabulary``, other ones and another number of them for each ``number``."""
    known = list(vocabulary)[:VOCABULARY_MAX]
    words = [word for word in known if word.isascii() and word.isalpha() and word.islower()]
    if not words:
        return "a text without a word that is known"
    count = 3 + 4 * (number % 3)
    return " ".join(words[(number * 7 + place * 3) % len(words)] for place in range(count))


def picture(number: int, quality: int = 90) -> bytes:
    """A JPEG of soft colours with grain, another one for each ``number``."""
    from PIL import Image

    generator = np.random.Generator(np.random.PCG64(number))
    colours = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    pixels = np.asarray(colours.resize(PICTURE_SIZE, Image.Resampling.BICUBIC)).astype(np.int16)
    pixels = pixels + generator.integers(-12, 13, pixels.shape, dtype=np.int16)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return file.getvalue()
