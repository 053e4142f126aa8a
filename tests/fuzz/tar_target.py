"""Tar files: read alike whether they are compressed or not."""

from __future__ import annotations

import gzip

from tests.fuzz.archive_files import unpacked


def check(data: bytes) -> None:
    plain = unpacked(data, ".tar")
    if data[257:262] == b"ustar":
        packed = unpacked(gzip.compress(data, 1, mtime=0), ".tar.gz")
        assert packed == plain, "read otherwise when it is compressed"
    else:
        # A compressed one needs no magic, an uncompressed one is known by it.
        unpacked(gzip.compress(data, 1, mtime=0), ".tar.gz")
