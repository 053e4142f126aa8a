"""One version of a model as the console shows it: what anybody may know who may ask it, and what management may."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyserve.api.kserve_requests import names_of_inputs
from pyserve.api.management import describe
from pyserve.api.open_inference_models import specs_of
from pyserve.errors import JsonObject
from pyserve.request.datatypes import datatype_of
from pyserve.telemetry.metrics import REQUEST_BOUNDS_S, Metrics

if TYPE_CHECKING:
    from pyserve.models.model import Model

# What the page lets people drop, type or fill in, by the built-in handler; of an archive's own nothing is known.
_KINDS = {
    "image_classifier": "picture", "image_segmenter": "picture", "object_detector": "picture",
    "densenet_handler": "picture", "text_classifier": "text", "tensor": "tensor", "base_handler": "tensor",
}  # fmt: skip
_HISTOGRAMS = ("preprocess", "queue", "staging", "inference", "postprocess", "batch_size")
_STAGES = {"queue": "queue", "staging": "staging", "inference": "inference", "postprocess": "postprocess"}


def public_row(model: Model, metrics: Metrics, *, is_default: bool, tells_errors: bool) -> JsonObject:
    """What ``/ready``, ``/v2/models/m/config`` and ``/v2/models/m/stats`` say."""
    succeeded, failed = metrics.request_totals(model.name, model.version)
    return {
        "name": model.name,
        "version": model.version,
        "default": is_default,
        "state": model.state,
        "answers": model.has_ready_worker,
        "reason": model.error if tells_errors else "",
        "lane": model.lane,
        "device_kind": model.device_type,
        "wanted_workers": model.wanted_workers,
        "batch_size": model.batch_size,
        "succeeded": succeeded,
        "failed": failed,
    }


def full_row(model: Model) -> JsonObject:
    """What management may know beside it."""
    rows = model.worker_rows()
    chosen = model.checks().get("backend")
    backend = chosen.get("chosen") if isinstance(chosen, dict) else chosen
    # Threads are all in one process, which is counted once.
    memory = {row.pid: row.memory_usage for row in rows} if model.lane == "python" else {}
    return {
        "ready_workers": sum(1 for row in rows if row.status == "READY"),
        "workers": {"min": model.workers_min, "max": model.workers_max},
        "device": model.device,
        "backend": backend or ("torchscript" if model.lane == "native" else "python"),
        "precision": model.precision,
        "weights_size": model.weights_size,
        "memory": sum(memory.values()),
        "in_flight": model.requests_in_flight,
        "queue_size": model.queue_status()[1],
        "max_batch_delay": model.max_batch_delay_ms,
        "url": model.url,
    }


def public_detail(model: Model) -> JsonObject:
    """Its inputs, and counts and times as the statistics of the Open Inference Protocol have them."""
    specs = specs_of(model)
    stats = model.stats()
    detail: JsonObject = {
        "kind": _KINDS.get(model.built_in_handler or "", "own"),
        "inputs": [
            {"name": name, "datatype": datatype_of(spec.torch_dtype), "shape": list(spec.shape),
             "sizes": [list(each) for each in spec.sizes], "values": list(spec.values) if spec.values else None}
            for name, spec in zip(names_of_inputs(specs), specs, strict=True)
        ] if specs else [],
        "has_names": len(specs or ()) > 1,
        "batches": int(stats.get("batches", 0)),
        "items": int(stats["batch_size"][2]) if "batch_size" in stats else 0,
    }  # fmt: skip
    detail["stages"] = {
        name: {"count": sum(stats[key][1]), "ns": int(stats[key][2] * 1e9)}
        for name, key in _STAGES.items() if key in stats
    }  # fmt: skip
    return detail


def full_detail(model: Model, metrics: Metrics, *, tells_errors: bool) -> JsonObject:
    """Its description as the management API has it, and histograms as (bounds, counts that are not cumulative, sum)."""
    stats = model.stats()
    histograms = {key: stats[key] for key in _HISTOGRAMS if key in stats}
    series = metrics.duration_histogram(model.name, model.version)
    histograms["request"] = (REQUEST_BOUNDS_S, *series)
    computed_s = stats["compute"][2] if "compute" in stats else 0.0
    busy_s = computed_s or sum(stats[key][2] for key in ("staging", "inference") if key in stats)
    return {
        "histograms": histograms,
        "busy_s": busy_s,
        "running": stats.get("running", 0),
        "running_max": stats.get("running_max", 0),
        "description": describe(model, tells_errors=tells_errors),
    }
