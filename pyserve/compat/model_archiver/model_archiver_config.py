"""What to pack."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from pyserve.archive.packing import ArchiverConfig


@dataclass
class ModelArchiverConfig(ArchiverConfig):
    """The flags of ``torch-model-archiver`` as fields."""

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> ModelArchiverConfig:
        """The fields that ``args`` has under the same names."""
        return cls(**{each.name: getattr(args, each.name) for each in fields(cls) if hasattr(args, each.name)})
