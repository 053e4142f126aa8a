"""A context to test handlers with."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from pyserve.context import Context
from pyserve.telemetry.custom_metrics import MetricsCache


class MockContext(Context):
    """A context of one request.

    Args:
        model_pt_file: name of the weights in ``model_dir``; None for none.
        model_dir: folder with the model's files.
        model_file: name of the model file; None for TorchScript.
        gpu_id: "0" or 0; None for the CPU.
        model_name, model_yaml_config: as contexts have them.
        mode: of ``MAR-INF``; not looked at.
    """

    def __init__(  # noqa: PLR0917 - TorchServe's signature
        self, model_pt_file: str | None = "model.pt", model_dir: str = "ts/torch_handler/unit_tests/models/tmp",
        model_file: str | None = None, gpu_id: int | str | None = None, model_name: str = "mnist",
        model_yaml_config: dict[str, Any] | None = None, mode: str = "",
    ):  # fmt: skip
        manifest: dict[str, Any] = {"model": {}}
        if model_pt_file:
            manifest["model"]["serializedFile"] = model_pt_file
        if model_file:
            manifest["model"]["modelFile"] = model_file
        super().__init__(
            model_name, str(Path(model_dir)), manifest, 1, None if gpu_id is None else int(gpu_id),
            metrics=MetricsCache(model_name), model_yaml_config=model_yaml_config,
        )  # fmt: skip
        bound = self.for_batch([str(uuid.uuid4())], [[("explain", "False")]])
        self.__dict__.update(bound.__dict__)
        self.explain = False
