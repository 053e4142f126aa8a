"""Handlers for pictures beyond image_classifier, the one for saved tensors, and explanations of pictures."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyserve.context import Context
from pyserve.handler import HandlerError, InputError, PredictionException
from pyserve.handlers import explanation
from pyserve.handlers.base_handler import BaseHandler
from pyserve.handlers.densenet_handler import DenseNetHandler
from pyserve.handlers.image import RgbTransform
from pyserve.handlers.image_classifier import ImageClassifier
from pyserve.handlers.image_segmenter import ImageSegmenter
from pyserve.handlers.object_detector import ObjectDetector
from pyserve.handlers.vision_handler import VisionHandler

SEED = int(os.environ.get("PYSERVE_TEST_SEED", "21"))
needs_captum = pytest.mark.skipif(importlib.util.find_spec("captum") is None, reason="captum is not installed")


def context_for(folder: Path, model: Mapping[str, str] | None = None, **config: Any) -> Context:
    return Context("m", str(folder), {"model": dict(model or {})}, model_yaml_config=config)


def batch_of(context: Context, *headers: Mapping[str, str]) -> Context:
    return context.for_batch([f"id-{i}" for i in range(len(headers))], [list(each.items()) for each in headers])


def ready(handler: BaseHandler, folder: Path, model: torch.nn.Module) -> Any:
    """The handler with ``model``, as `initialize` leaves it, and its context."""
    context = context_for(folder)
    handler.prepare(context)
    handler.model = model.eval()
    return handler, context


def photo(width: int, height: int, mode: str = "RGB") -> bytes:
    print(f"PYSERVE_TEST_SEED={SEED}")
    random = np.random.default_rng(SEED + width * 10_000 + height)
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "PNG")
    return file.getvalue()


def close(left: Any, right: Any) -> bool:
    """Whether two answers have the same structure and nearly the same numbers."""
    if isinstance(left, dict):
        return list(left) == list(right) and all(close(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(close, left, right))
    return left == pytest.approx(right, abs=1e-5)


# --- what they have in common -----------------------------------------------------------------------------------------


def test_all_are_vision_handlers_and_base_handlers() -> None:
    for cls in (ImageClassifier, ImageSegmenter, ObjectDetector):
        assert isinstance(cls(), VisionHandler) and isinstance(cls(), BaseHandler)


def test_transform_of_a_subclass_is_given_a_picture_as_it_is(tmp_path: Path) -> None:
    class Grey(ImageClassifier):
        image_processing = staticmethod(lambda picture: torch.from_numpy(np.array(picture))[None].float() / 255)

    handler, context = ready(Grey(), tmp_path, torch.nn.Flatten())
    batch = handler.preprocess([{"body": photo(8, 8, "L")}, {"data": base64.b64encode(photo(8, 8, "L")).decode()}])
    assert batch.shape == (2, 1, 8, 8) and torch.equal(batch[0], batch[1])
    handler.topk = 2
    assert len(handler.handle([{"body": photo(8, 8, "L")}], batch_of(context, {}))[0]) == 2


def test_handler_that_was_never_prepared_still_reads_pictures() -> None:
    class Own(ImageClassifier):
        def __init__(self) -> None:  # without super().__init__()
            self.model = None

    assert Own().preprocess([{"body": photo(300, 260)}]).shape == (1, 3, 224, 224)


# --- object_detector --------------------------------------------------------------------------------------------------


class Detector(torch.nn.Module):
    """Finds its pictures' brightness: a box as large as the picture, and one with a low score."""

    def forward(self, pictures: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        found = []
        for picture in pictures:
            assert picture.dim() == 3
            box = torch.tensor([0.0, 0.0, float(picture.shape[2]), float(picture.shape[1])])
            scores = torch.stack([0.5 + picture.mean() / 2, picture.mean() / 4, torch.tensor(0.5)])
            found.append({"boxes": torch.stack([box, box / 2, box / 4]), "labels": torch.tensor([1, 2, 3]),
                          "scores": scores})  # fmt: skip
        return found


class ScriptedDetector(torch.nn.Module):
    """Takes a list and answers (losses, detections), as scripted models of torchvision do."""

    def forward(self, images: list[torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
        losses: dict[str, torch.Tensor] = {}
        found: list[dict[str, torch.Tensor]] = []
        for image in images:
            box = torch.tensor([[0.0, 0.0, float(image.shape[2]), float(image.shape[1])]])
            found.append({"boxes": box, "labels": torch.tensor([1]), "scores": 0.5 + image.mean().reshape(1) / 2})
        return losses, found


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("sizes", [[(20, 10)], [(20, 10)] * 3, [(20, 10), (8, 30), (20, 10)]])
def test_objects_of_a_batch_are_those_of_single_pictures(
    tmp_path: Path, sizes: list[tuple[int, int]], scripted: bool
) -> None:
    (tmp_path / "index_to_name.json").write_text(json.dumps({"1": "cat"}))
    model: Any = torch.jit.script(ScriptedDetector()) if scripted else Detector()
    handler, context = ready(ObjectDetector(), tmp_path, model)
    rows = [{"body": photo(*size, mode)} for size, mode in zip(sizes, ("RGB", "RGBA", "L"), strict=False)]
    together = handler.handle(rows, batch_of(context, *[{}] * len(rows)))
    assert close(together, [handler.handle([row], batch_of(context, {}))[0] for row in rows])
    for answer, (width, height) in zip(together, sizes, strict=True):
        assert answer[0] == {"cat": [0.0, 0.0, width, height], "score": pytest.approx(0.75, abs=0.1)}
        if not scripted:  # a score of exactly the threshold counts; a class without a label goes by its number
            assert answer[1:] == [{"3": [0.0, 0.0, width / 4, height / 4], "score": 0.5}]


def test_threshold_is_the_handlers(tmp_path: Path) -> None:
    class Generous(ObjectDetector):
        threshold = 0.0

    handler, context = ready(Generous(), tmp_path, Detector())
    assert len(handler.handle([{"body": photo(9, 9)}], batch_of(context, {}))[0]) == 3


def test_pictures_become_what_torchvisions_totensor_makes() -> None:
    picture = Image.open(io.BytesIO(photo(5, 4)))
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    assert torch.equal(RgbTransform()(picture), expected)
    assert RgbTransform()(picture).is_contiguous()


@pytest.mark.parametrize("output", [torch.zeros(2), [torch.zeros(2)], [{"boxes": torch.zeros(1, 4)}], {}])
def test_detector_says_what_it_needs_from_the_model(output: Any) -> None:
    with pytest.raises(HandlerError, match="object_detector needs"):
        ObjectDetector().postprocess(output)


# --- image_segmenter --------------------------------------------------------------------------------------------------


class Segments(torch.nn.Module):
    def __init__(self, named: bool = True) -> None:
        super().__init__()
        self.named = named
        torch.manual_seed(SEED)
        self.conv = torch.nn.Conv2d(3, 4, 1)

    def forward(self, pictures: torch.Tensor) -> Any:
        scores = torch.nn.functional.avg_pool2d(self.conv(pictures), 56)
        return {"out": scores, "aux": scores[:, :1]} if self.named else scores


@pytest.mark.parametrize("named", [True, False])
def test_segments_of_a_batch_are_those_of_single_pictures(tmp_path: Path, named: bool) -> None:
    handler, context = ready(ImageSegmenter(), tmp_path, Segments(named))
    rows = [{"body": photo(300, 260)}, {"data": photo(256, 400)}]
    together = handler.handle(rows, batch_of(context, {}, {}))
    assert close(together, [handler.handle([row], batch_of(context, {}))[0] for row in rows])
    scores = Segments(named=False)(handler.preprocess(rows)).softmax(1)
    for n, y, x in np.ndindex(2, 4, 4):
        index, probability = together[n][y][x]
        assert index == scores[n, :, y, x].argmax().item()
        assert probability == pytest.approx(scores[n, :, y, x].max().item(), abs=1e-5)


@pytest.mark.parametrize("output", [{"in": torch.zeros(1, 2, 3, 3)}, torch.zeros(1, 2), [1]])
def test_segmenter_says_what_it_needs_from_the_model(output: Any) -> None:
    with pytest.raises(HandlerError, match="image_segmenter needs"):
        ImageSegmenter().postprocess(output)


# --- densenet_handler -------------------------------------------------------------------------------------------------


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class Pool(torch.nn.Module):
    """[n, 3, h, w] or [3, h, w] in, as convolutions take them; remembers the sizes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 2, 1)
        self.batch_sizes: list[int] = []

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        self.batch_sizes.append(len(pictures))
        return self.conv(pictures).mean((-1, -2))


@pytest.mark.parametrize(
    ("shapes", "batch_sizes"),
    [
        ([(1, 3, 4, 4)], [1]),
        ([(1, 3, 4, 4), (2, 3, 4, 4), (1, 3, 4, 4)], [4]),
        ([(1, 3, 4, 4), (1, 3, 5, 5)], [1, 1]),
        ([(3, 4, 4), (3, 4, 4)], [3, 3]),
    ],
)
def test_saved_tensors_are_answered_one_for_one(
    tmp_path: Path, shapes: list[tuple[int, ...]], batch_sizes: list[int]
) -> None:
    torch.manual_seed(SEED)
    handler, context = ready(DenseNetHandler(), tmp_path, Pool())
    tensors = [torch.randn(shape) for shape in shapes]
    answers = handler.handle([{"body": saved(each)} for each in tensors], batch_of(context, *[{}] * len(tensors)))
    assert handler.model.batch_sizes == batch_sizes
    for answer, tensor in zip(answers, tensors, strict=True):
        assert torch.allclose(answer, handler.model(tensor), atol=1e-6)
        assert len(saved(answer)) < 3000 and not answer.requires_grad
        assert answer.untyped_storage().nbytes() == answer.nbytes


@pytest.mark.parametrize("body", [b"", b"hello", saved({"a": 1}), saved(torch.nn.Linear(2, 2)), "text", [1.0], None])
def test_what_is_no_saved_tensor_is_the_requests_fault(tmp_path: Path, body: Any) -> None:
    with pytest.raises(InputError, match=r"expected a tensor as torch\.save writes it"):
        DenseNetHandler().preprocess([{"body": body}])


# --- explanations -----------------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """Integrated gradients of a linear model are known: weight times input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.linear = torch.nn.Linear(3 * 4 * 4, 5)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.linear(pictures.flatten(1))


def explained(handler: Any, context: Context, pixels: torch.Tensor, target: Any) -> Any:
    rows = [{"data": each.tolist(), "target": target} for each in pixels]
    return handler.handle(rows, batch_of(context, *[{"explain": "True"}] * len(rows)))


@needs_captum
@pytest.mark.parametrize("scripted", [False, True])
def test_explanation_of_a_linear_model_is_weight_times_input(tmp_path: Path, scripted: bool) -> None:
    model = Linear()
    served: Any = torch.jit.script(model) if scripted else model
    if scripted:
        served.save(str(tmp_path / "m.pt"))
        served = torch.jit.load(str(tmp_path / "m.pt"))
    handler, context = ready(ImageClassifier(), tmp_path, served)
    pixels = torch.randn(3, 3, 4, 4)
    with torch.inference_mode():  # a caller's mode does not matter
        answers = explained(handler, context, pixels, "2")
    expected = pixels * model.linear.weight[2].reshape(3, 4, 4)
    assert torch.allclose(torch.tensor(answers), expected, atol=1e-5)
    assert close(explained(handler, context, pixels[1:2], 2), answers[1:2])


@needs_captum
def test_explanation_of_a_class_that_is_not_there_is_the_requests_fault(tmp_path: Path) -> None:
    handler, context = ready(ImageClassifier(), tmp_path, Linear())
    with pytest.raises(InputError, match="'target' is 7"):
        explained(handler, context, torch.zeros(1, 3, 4, 4), 7)


@needs_captum
def test_model_without_gradients_is_said_to_have_none(tmp_path: Path) -> None:
    class NoGradients(Linear):
        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            return super().forward(pictures).detach()

    handler, context = ready(ImageClassifier(), tmp_path, NoGradients())
    with pytest.raises(PredictionException, match="gradients, which this model does not give") as caught:
        explained(handler, context, torch.zeros(1, 3, 4, 4), 1)
    assert caught.value.error_code == 501


def test_explanation_without_captum_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explanation.importlib.util, "find_spec", lambda name: None)
    handler, context = ready(ImageClassifier(), tmp_path, Linear())
    with pytest.raises(PredictionException, match="pip install captum") as caught:
        explained(handler, context, torch.zeros(1, 3, 4, 4), 1)
    assert caught.value.error_code == 501


@pytest.mark.parametrize("handler", [ImageClassifier(), ObjectDetector(), ImageSegmenter()])
def test_handler_that_cannot_explain_says_so(handler: VisionHandler) -> None:
    handler.model = None
    with pytest.raises(PredictionException, match="explanations") as caught:
        handler.get_insights(torch.zeros(1, 3, 4, 4), [{}], 0)
    assert caught.value.error_code == 501
