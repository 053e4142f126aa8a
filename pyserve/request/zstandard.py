"""Zstandard, where Python has it: from 3.14 on, or by the package backports.zstd."""

from __future__ import annotations

import importlib
from typing import Any


def _find() -> Any:
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


zstd: Any = _find()
# What RFC 9659 lets a body ask of its reader: 8 MiB. Else a few bytes could ask for gigabytes.
_WINDOW_LOG_MAX = 23


def decompressor() -> Any:
    """One that refuses larger windows. REQUIRES: `zstd` is there."""
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX})


def compressor(level: int) -> Any:
    """One with ``compress`` and ``flush``. REQUIRES: `zstd` is there."""
    return zstd.ZstdCompressor(level=level)
