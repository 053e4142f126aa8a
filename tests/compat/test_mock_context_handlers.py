"""The built-in handlers work with TorchServe's `MockContext`, which has less than a context of a server."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import pyserve

COMPAT = Path(pyserve.__file__).parent / "compat"


@pytest.fixture
def make_context(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`MockContext`, as tests of handlers import it."""
    monkeypatch.syspath_prepend(str(COMPAT))
    from ts.torch_handler.unit_tests.test_utils.mock_context import MockContext

    return MockContext


@pytest.mark.slow
def test_base_handler_with_a_model_file_and_a_profile(make_context: Any, tmp_path: Path) -> None:
    from ts.torch_handler.base_handler import BaseHandler

    (tmp_path / "model.py").write_text(
        "import torch\n\nclass Argmax(torch.nn.Module):\n    def forward(self, x):\n        return torch.argmax(x, 1)\n"
    )
    torch.save({}, tmp_path / "model.pt")
    (tmp_path / "config.yaml").write_text("handler: {profile: true}\n")
    context = make_context(model_dir=str(tmp_path), model_yaml_config_file="config.yaml")
    handler = BaseHandler()
    handler.initialize(context)
    assert handler.initialized
    assert handler.handle([[1.0, 2.0], [4.0, 3.0]], context) == [1, 0]
    names = [each.name for each in context.metrics.store]
    assert names == ["ts_handler_preprocess", "ts_handler_inference", "ts_handler_postprocess", "HandlerTime"]


@pytest.mark.slow
def test_image_classifier_alone_and_in_micro_batches(make_context: Any, tmp_path: Path) -> None:
    from ts.handler_utils.micro_batching import MicroBatching
    from ts.torch_handler.image_classifier import ImageClassifier

    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 8))
    torch.jit.script(network).save(str(tmp_path / "model.pt"))
    (tmp_path / "index_to_name.json").write_text(json.dumps({str(index): f"class {index}" for index in range(8)}))
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (9, 200, 30)).save(file, "PNG")
    context = make_context(model_dir=str(tmp_path), model_file=None)
    handler = ImageClassifier()
    handler.initialize(context)
    handler.set_max_result_classes(2)
    [alone] = handler.handle([{"data": file.getvalue()}], context)
    assert len(alone) == 2 and all(name.startswith("class ") for name in alone)
    batches = MicroBatching(handler, 2)
    answers = batches([{"body": file.getvalue()}] * 5, context)
    batches.shutdown()
    assert [list(answer) for answer in answers] == [list(alone)] * 5
