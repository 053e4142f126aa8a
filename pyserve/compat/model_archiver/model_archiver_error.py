"""What cannot be packed."""

from __future__ import annotations


class ModelArchiverError(Exception):
    """A model cannot be packed; the text says why."""
