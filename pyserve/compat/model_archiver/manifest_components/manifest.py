"""The manifest of an archive."""

from __future__ import annotations

import json
import time
from enum import Enum
from typing import Any

from model_archiver.manifest_components.model import Model
from model_archiver.version import __version__

__all__ = ["Manifest", "RuntimeType", "__version__"]


class RuntimeType(Enum):
    """What runs the handler."""

    PYTHON = "python"
    PYTHON3 = "python3"
    LSP = "LSP"


class Manifest:
    """What MANIFEST.json says; its text is that file's.

    Args:
        runtime: what runs the handler.
        model: the part about the model.
    """

    def __init__(self, runtime: str, model: Model):
        self.creation_time = time.strftime("%d/%m/%Y %H:%M:%S")
        self.runtime = runtime
        self.model = model
        self.archiver_version = __version__
        self.manifest_dict: dict[str, Any] = {
            "createdOn": self.creation_time,
            "runtime": runtime,
            "model": json.loads(str(model)),
            "archiverVersion": __version__,
        }

    def __str__(self) -> str:
        return json.dumps(self.manifest_dict)
