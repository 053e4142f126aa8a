"""What cannot be packed."""

from __future__ import annotations


class ModelArchiverError(Exception):
    """A model cannot be packed; the text says why."""

    def __init__(self, message: str):
        super().__init__(message)


class MissingFileError(ModelArchiverError, FileNotFoundError):
    """A file that the archive needs is not there."""
