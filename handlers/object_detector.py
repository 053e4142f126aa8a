"""Pictures in, the things in them out: their labels, boxes and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyserve.handler import HandlerError
from pyserve.handlers.image import RgbTransform
from pyserve.handlers.vision_handler import VisionHandler


class ObjectDetector(VisionHandler):
    """Any model from pictures to one dict of ``boxes`` [k, 4], ``labels`` [k] and ``scores`` [k] per picture.

    Such are the detection models of torchvision, eager or TorchScript. They take pictures of different sizes, as a
    list; pictures of one size go as one tensor [n, 3, height, width], to a TorchScript model that wants a list as list.

    Attributes:
        threshold: what scores less is left out.
    """

    image_processing = RgbTransform()
    threshold = 0.5

    def preprocess(self, data: Sequence[Any]) -> Any:
        """Rows -> float32 tensor [n, 3, height, width], or a list of tensors if their sizes differ.

        Raises:
            InputError: a row is no picture.
        """
        pictures = [self._uploaded(picture.unsqueeze(0))[0] for picture in self._pictures(data)]
        return torch.stack(pictures) if len({picture.shape for picture in pictures}) == 1 else pictures

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's output for what `preprocess` made."""
        if isinstance(data, torch.Tensor) and not _takes_list(self.model):
            return super().inference(data, *args, **kwargs)
        with torch.inference_mode():
            return self.model([picture.to(self.device) for picture in data], *args, **kwargs)

    def postprocess(self, data: Any) -> list[Any]:
        """Per picture a list of ``{label: [x1, y1, x2, y2], "score": p}``, in the model's order.

        Raises:
            HandlerError: the model's output is of another form.
        """
        if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], (list, tuple)):
            data = data[1]  # a scripted model of torchvision answers (losses, detections)
        if not isinstance(data, (list, tuple)):
            raise HandlerError(f"object_detector needs a list with a dict per picture, got a {type(data).__name__}")
        return [self._detections(each) for each in data]

    def _detections(self, found: Any) -> list[dict[str, Any]]:
        if not isinstance(found, Mapping) or not {"boxes", "labels", "scores"} <= set(found):
            kind = f"keys {', '.join(map(str, found))}" if isinstance(found, Mapping) else f"a {type(found).__name__}"
            raise HandlerError(f"object_detector needs a dict with boxes, labels and scores per picture, got {kind}")
        chosen = found["scores"] >= self.threshold
        rows = zip(
            self.json_values(found["boxes"][chosen]),
            found["labels"][chosen].tolist(),
            self.json_values(found["scores"][chosen]),
            strict=True,
        )
        mapping = self.mapping or {}
        return [{mapping.get(str(label), str(label)): box, "score": score} for box, label, score in rows]

    def get_insights(self, tensor_data: Any, raw_data: Any, target: int = 0) -> list[Any]:
        """Refuses: a detection has a score per thing found, so there is no one score to explain."""
        return super(VisionHandler, self).get_insights(tensor_data, raw_data, target)


def _takes_list(model: Any) -> bool:
    """Whether a TorchScript model declares that it takes a list; of an eager model nobody knows."""
    if not isinstance(model, torch.jit.ScriptModule):
        return False
    forward: Any = model.forward
    arguments = forward.schema.arguments
    return len(arguments) > 1 and bool(arguments[1].type.kind() == "ListType")
