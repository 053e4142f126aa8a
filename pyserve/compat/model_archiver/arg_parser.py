"""The flags of ``torch-model-archiver``."""

from __future__ import annotations

import argparse

from model_archiver.manifest_components.manifest import RuntimeType
from model_archiver.model_archiver_config import ModelArchiverConfig
from pyserve.commands.archive import add_archiver_arguments

__all__ = ["ArgParser", "ModelArchiverConfig", "RuntimeType"]


class ArgParser:
    """Reads the command line."""

    @staticmethod
    def export_model_args_parser() -> ModelArchiverConfig:
        """What the command line of this process says.

        Raises:
            SystemExit: it says what there is not, or not enough.
        """
        parser = argparse.ArgumentParser(prog="torch-model-archiver", description="Packs a model into an archive.")
        add_archiver_arguments(parser)
        return ModelArchiverConfig.from_args(parser.parse_args())
