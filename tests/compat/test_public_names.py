"""Every public name of TorchServe's packages, with its signature, is in the shims; but for those that stand here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import pyserve

ROOT = Path(__file__).parent.parent.parent
RECORD = ROOT / "tests/golden/torchserve/public_names.json"
COMPAT = Path(pyserve.__file__).parent / "compat"

DISTRIBUTED = "a model over several processes is not in this version"
COVER = "a cover of a package that is not built in; importing it says so, or it is not there"
WORKER = "TorchServe's own worker process: it speaks to the Java server"
WORKFLOW = "workflows are not in this version"
INNER = "a step of a function of the same class, called by nothing else"
HOST = "what TorchServe's server runs to measure the host; pyserve's measures it itself"
POSITION = "called by position"
# Prefix of dotted names -> why it is not there, or other.
ABSENT = {
    "workflow_archiver": WORKFLOW,
    "ts.async_service": WORKER,
    "ts.model_service_worker": WORKER,
    "ts.utils.setup_model_venv": WORKER,
    "ts.llm_launcher": COVER,
    "ts.utils.hf_utils": COVER,
    "ts.torch_handler.vllm_handler": COVER,
    "ts.torch_handler.trt_llm_handler": COVER,
    "ts.torch_handler.dali_handler": COVER,
    "ts.torch_handler.dali_image_classifier": COVER,
    "ts.handler_utils.preprocess": COVER,
    "ts.handler_utils.distributed": DISTRIBUTED,
    "ts.torch_handler.distributed": DISTRIBUTED,
    "ts.metrics.metric_collector": HOST,
    "ts.metrics.system_metrics": HOST,
    "ts.torch_handler.contractions": "a table; `pyserve.handlers.text` expands by rules",
    "ts.torch_handler.text_handler.CONTRACTION": "a table; `pyserve.handlers.text` expands by rules",
    "ts.torch_handler.unit_tests.models": "TorchServe's own test data",
    "ts.handler_utils.micro_batching.execute_call": INNER,
    "ts.handler_utils.micro_batching.WorkerThread": INNER,
    "ts.handler_utils.micro_batching.MicroBatching._": INNER,
    "ts.metrics.caching_metric.CachingMetric._validate": INNER,
    "ts.metrics.caching_metric.CachingMetric.emit_metrics": INNER,
    "ts.metrics.metric_cache_abstract.MetricCacheAbstract._": INNER,
    "ts.context.Context.__eq__": "each worker has one, which is equal to itself only",
    "ts.context.Context.metrics": "an attribute of the object rather than a property",
    "ts.context.Context.system_properties": "an attribute of the object rather than a property",
    "ts.torch_handler.base_handler.BaseHandler._use_torch_export_aot_compile": INNER,
    "ts.torch_handler.request_envelope.json.JSONEnvelope._": INNER,
    "ts.torch_handler.request_envelope.kserve.KServeEnvelope._": INNER,
    "ts.torch_handler.request_envelope.kservev2.KServev2Envelope._": INNER,
    "ts.torch_handler.text_handler.TextHandler._remove_puncutation": "an old name with a slip of the pen",
    "ts.torch_handler.text_classifier.TextClassifier().initialized": "False rather than None",
    "ts.torch_handler.text_handler.TextHandler().initialized": "False rather than None",
    "ts.torch_handler.text_classifier.TextClassifier().input_text": INNER,
    "ts.torch_handler.text_handler.TextHandler().input_text": INNER,
    "ts.torch_handler.text_classifier.TextClassifier().lig": INNER,
    "ts.torch_handler.text_handler.TextHandler().lig": INNER,
    "ts.torch_handler.text_classifier.TextClassifier().tokenizer": INNER,
    "ts.torch_handler.text_handler.TextHandler().tokenizer": INNER,
    "ts.torch_handler.text_classifier.TextClassifier.get_insights": POSITION,
    "ts.version.version_path": "where a package keeps its number is its own business",
    "model_archiver.version.version_path": "where a package keeps its number is its own business",
}
if importlib.util.find_spec("onnxruntime") is not None:  # which it was not where the names were recorded
    ABSENT["ts.torch_handler.base_handler.ONNX_AVAILABLE"] = "whether onnxruntime is installed"


@pytest.mark.slow
def test_every_public_name_is_there_and_can_be_called_as_it_can_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.name_differences", str(RECORD), str(COMPAT)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [(name, text) for name, text in json.loads(done.stdout)]
    assert [pair for pair in found if not pair[0].startswith(tuple(ABSENT))] == []
    unused = [prefix for prefix in ABSENT if not any(name.startswith(prefix) for name, _ in found)]
    assert unused == [], "these are there by now"


def test_the_record_is_of_every_module() -> None:
    names = json.loads(RECORD.read_text())
    assert {"ts", "model_archiver", "workflow_archiver"} <= names.keys()
    assert len(names) > 80
    broken = [name for name, facts in names.items() if "import_error" in facts]
    assert broken == ["ts.torch_handler.unit_tests.conftest"], "TorchServe's own pytest fixtures only"
