"""Folders of models for tests of handlers."""

from __future__ import annotations

import shutil
import urllib.request
from collections.abc import Mapping
from pathlib import Path

REPO_DIR = Path.cwd()


def copy_files(src_dir: Path, dst_dir: Path, files: Mapping[str, str]) -> None:
    """Copies files, under the names that ``files`` maps theirs to."""
    for name, new_name in files.items():
        shutil.copy(Path(src_dir, name), Path(dst_dir, new_name))


def download_model(model_url: str, model_dir: Path) -> None:
    """Fetches weights into a folder, as ``model.pt``."""
    urllib.request.urlretrieve(model_url, Path(model_dir, "model.pt"))
