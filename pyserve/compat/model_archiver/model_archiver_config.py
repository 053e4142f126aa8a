"""What to pack."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from model_archiver.manifest_components.manifest import RuntimeType
from pyserve.archive.packing import ArchiverConfig

__all__ = ["ModelArchiverConfig", "RuntimeType"]


@dataclass
class ModelArchiverConfig(ArchiverConfig):
    """The flags of ``torch-model-archiver`` as fields."""

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ModelArchiverConfig:
        """The fields that ``args`` has under the same names; ``model_version`` is another one for ``version``."""
        given = {each.name: getattr(args, each.name) for each in fields(cls) if hasattr(args, each.name)}
        if "version" not in given and hasattr(args, "model_version"):
            given["version"] = args.model_version
        return cls(**given)
