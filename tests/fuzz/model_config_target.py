"""model-config.yaml and MANIFEST.json, which come out of an archive."""

from __future__ import annotations

from pyserve.archive.manifest import Manifest
from pyserve.archive.model_config import ModelConfig
from pyserve.errors import InvalidModelError


def check(data: bytes) -> None:
    for parse in (ModelConfig.parse, Manifest.parse):
        try:
            parse(data, "m.mar")
        except InvalidModelError as error:
            assert len(error.message) < 4000, f"a text of {len(error.message)} characters"
