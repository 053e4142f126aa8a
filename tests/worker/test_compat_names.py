"""What `import ts...` finds in a worker process: every name that published handlers import (contract, 8.6 and 8.7)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pyserve

COMPAT = Path(pyserve.__file__).parent / "compat"

NAMES = """
ts __version__
ts.version __version__
ts.context Context RequestProcessor
ts.service Service PredictionException PREDICTION_METRIC emit_metrics
ts.launcher start stop register_model register_model_with_params
ts.torch_handler.base_handler BaseHandler
ts.torch_handler.vision_handler VisionHandler
ts.torch_handler.image_classifier ImageClassifier
ts.torch_handler.image_segmenter ImageSegmenter
ts.torch_handler.object_detector ObjectDetector
ts.torch_handler.text_handler TextHandler
ts.torch_handler.text_classifier TextClassifier
ts.torch_handler.densenet_handler DenseNetHandler
ts.torch_handler.request_envelope.base BaseEnvelope
ts.torch_handler.request_envelope.json JSONEnvelope
ts.torch_handler.request_envelope.body BodyEnvelope
ts.torch_handler.request_envelope.kserve KServeEnvelope
ts.torch_handler.request_envelope.kservev2 KServev2Envelope
ts.torch_handler.unit_tests.test_utils.mock_context MockContext
ts.handler_utils.utils send_intermediate_predict_response import_class create_predict_response
ts.handler_utils.timer timed
ts.handler_utils.micro_batching MicroBatching
ts.handler_utils.text_utils get_tokenizer ngrams_iterator
ts.protocol.otf_message_handler send_intermediate_predict_response create_predict_response
ts.utils.util PredictionException list_classes_from_module load_label_mapping map_class_to_label
ts.utils.util check_valid_pt2_backend PT2Backend get_yaml_config CLEANUP_REGEX deprecated
ts.metrics.dimension Dimension
ts.metrics.metric Metric
ts.metrics.metric_type_enum MetricTypes
ts.metrics.caching_metric CachingMetric
ts.metrics.metric_cache_yaml_impl MetricsCacheYamlImpl
ts.metrics.metrics_store MetricsStore
ts.metrics.unit Units
"""
# Covers of packages that are not installed here; the error names the package.
NEEDING = {
    "ts.handler_utils.hf_batch_streamer": "transformers",
    "ts.torch_handler.dali_handler": "dali",
    "ts.torch_handler.trt_llm_handler": "tensorrt",
}

CHILD = """
import importlib, json, sys, warnings
warnings.simplefilter("error")
sys.path.append(sys.argv[1])
wanted, needing = json.loads(sys.argv[2]), json.loads(sys.argv[3])
out = {"missing": [], "needing": {}, "same": []}
for line in wanted:
    module, *names = line.split()
    try:
        found = importlib.import_module(module)
    except Exception as error:
        out["missing"].append(f"{module}: {error!r}")
        continue
    out["missing"] += [f"{module}.{name}" for name in names if not hasattr(found, name)]
for module in needing:
    try:
        importlib.import_module(module)
        out["needing"][module] = "imported"
    except ImportError as error:
        out["needing"][module] = str(error)
from ts.context import Context
from ts.torch_handler.base_handler import BaseHandler
from ts.torch_handler.image_classifier import ImageClassifier
from ts.utils.util import PredictionException
from ts.service import PredictionException as OfService
import pyserve.context, pyserve.handler, pyserve.handlers.base_handler, pyserve.handlers.image_classifier
out["same"] = [
    Context is pyserve.context.Context,
    BaseHandler is pyserve.handlers.base_handler.BaseHandler,
    ImageClassifier is pyserve.handlers.image_classifier.ImageClassifier,
    PredictionException is pyserve.handler.PredictionException,
    OfService is PredictionException,
]
print(json.dumps(out))
"""


@pytest.mark.slow
def test_every_name_that_handlers_import_is_there_and_is_ours() -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(COMPAT), json.dumps(NAMES.strip().splitlines()), json.dumps(list(NEEDING))],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout)
    assert told["missing"] == []
    assert told["same"] == [True] * 5
    for module, package in NEEDING.items():
        assert package in told["needing"][module].lower() or told["needing"][module] == "imported", told["needing"]


@pytest.mark.slow
def test_the_server_process_imports_no_ts() -> None:
    code = "import sys, pyserve.server.server\nprint([name for name in sys.modules if name.split('.')[0] == 'ts'])"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout == "[]\n"
