"""A context to test handlers with."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from ts.metrics.metrics_store import MetricsStore
from ts.utils.util import get_yaml_config

__all__ = ["MetricsStore", "MockContext", "get_yaml_config"]


class MockContext:
    """A model's part of a context.

    Args:
        model_pt_file: name of the weights in ``model_dir``; None for none.
        model_dir: folder with the model's files.
        model_file: name of the model file; None for TorchScript.
        gpu_id: index; in ``system_properties`` only where there is a GPU.
        model_name: label of the metrics.
        model_yaml_config_file: name of a YAML file in ``model_dir``.

    Attributes:
        manifest: as an archive has it, of ``model_pt_file`` and ``model_file``.
        system_properties: ``model_dir``, perhaps ``gpu_id``.
        explain: to be set; request 1 and those after it say so then.
        metrics: a `MetricsStore`.
        model_yaml_config: a dict.
    """

    def __init__(  # noqa: PLR0917 - TorchServe's signature
        self, model_pt_file: str | None = "model.pt", model_dir: str = "ts/torch_handler/unit_tests/models/tmp",
        model_file: str | None = "model.py", gpu_id: str | int | None = "0", model_name: str = "mnist",
        model_yaml_config_file: str | None = None,
    ):  # fmt: skip
        model: dict[str, str] = {}
        if model_pt_file:
            model["serializedFile"] = model_pt_file
        if model_file:
            model["modelFile"] = model_file
        self.manifest: dict[str, Any] = {"model": model}
        self.system_properties: dict[str, Any] = {"model_dir": model_dir}
        if gpu_id is not None and _has_gpu():
            self.system_properties["gpu_id"] = gpu_id
        self.explain = False
        self.metrics = MetricsStore(uuid.uuid4(), model_name)
        self.model_yaml_config: dict[str, Any] = {}
        if model_yaml_config_file:
            self.model_yaml_config = get_yaml_config(Path(model_dir, model_yaml_config_file))

    def get_request_header(self, idx: Any, exp: Any) -> bool:
        """Whether a request other than the first asks for an explanation."""
        return bool(idx and exp and self.explain)


def _has_gpu() -> bool:
    from pyserve import devices

    return devices.count() > 0
