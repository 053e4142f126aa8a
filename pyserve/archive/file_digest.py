"""By what a file is known wherever it lies: the digest of its bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pyserve.archive.entries import CHUNK_SIZE


def digest_of(path: Path) -> str:
    """SHA-256 of a file in hex; blocks.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK_SIZE):
            digest.update(data)
    return digest.hexdigest()
