"""From a JSON object with the measures of a flower to its species."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pyserve.handler import PredictionException
from pyserve.handlers.base_handler import BaseHandler

MEASURES = ("sepal_length", "sepal_width", "petal_length", "petal_width")
LARGEST_CM = 20.0


class IrisHandler(BaseHandler):
    """`initialize`, which loads the network, and `inference`, which calls it, are `BaseHandler`'s."""

    def preprocess(self, data: Sequence[Any]) -> torch.Tensor:
        """Requests of a batch -> float32 [n, 4].

        Raises:
            PredictionException: a request is not a flower; it is answered with status 422 and this text.
        """
        return torch.tensor([measures_of(row.get("body")) for row in data], device=self.device)

    def postprocess(self, data: torch.Tensor) -> list[dict[str, Any]]:
        """Scores [n, 3] -> an answer per request of the batch, in their order."""
        assert self.context is not None and self.mapping is not None  # the mapping is index_to_name.json
        probabilities, classes = torch.softmax(data, 1).max(1)
        answers = []
        for probability, number in zip(probabilities.tolist(), classes.tolist(), strict=True):
            species = self.mapping[str(number)]
            # By species, so that a chart shows when clients begin to send other flowers than they used to.
            self.context.metrics.add_metric_to_cache("IrisesNamed", "count", ["Species"]).add_or_update(1, [species])
            answers.append({"species": species, "probability": round(probability, 4)})
        return answers


def measures_of(flower: Any) -> list[float]:
    """The four measures of one request, in centimetres."""
    if not isinstance(flower, dict):
        raise PredictionException(f"send a JSON object with {', '.join(MEASURES)}", 422)
    for name in MEASURES:
        if name not in flower:
            raise PredictionException(f"{name} is missing", 422)
        value = flower[name]
        if not isinstance(value, (int, float)) or not 0 < value <= LARGEST_CM:
            raise PredictionException(f"{name} is {value!r}; it must be above 0 and at most {LARGEST_CM:g} cm", 422)
    return [float(flower[name]) for name in MEASURES]
