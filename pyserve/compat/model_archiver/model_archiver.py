"""Packs a model from Python."""

from __future__ import annotations

from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging import generate_model_archive


class ModelArchiver:
    """Packs models; a name for one function."""

    @staticmethod
    def generate_model_archive(config: ModelArchiverConfig) -> None:
        """Writes the archive, as ``torch-model-archiver`` does.

        Raises:
            ModelArchiverError: it cannot be packed; the text says why.
        """
        generate_model_archive(config)
