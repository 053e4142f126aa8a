"""What files import, and which of it is missing."""

from __future__ import annotations

from pathlib import Path

from pyserve.archive.import_scan import missing_imports, scan_folder

SOURCE = """
import os.path
import local_one
from typing import TYPE_CHECKING

import torch.nn.functional as F
import nothing_a.part
from ts.torch_handler.base_handler import BaseHandler
from ts.no_such_part import x
from . import beside

if TYPE_CHECKING:
    import nothing_b

try:
    import nothing_c
except ImportError:
    nothing_c = None

try:
    import nothing_d
except ValueError:
    pass


def handle(data, context):
    from nothing_e import f
    return f(data)
"""


def test_all_missing_modules_are_found_at_once_without_running_anything(tmp_path: Path) -> None:
    (tmp_path / "handler.py").write_text(SOURCE)
    (tmp_path / "local_one.py").write_text("import nothing_a\n")
    (tmp_path / "venv/lib/site-packages").mkdir(parents=True)
    (tmp_path / "venv/lib/site-packages/own.py").write_text("import nothing_of_mine\n")
    imports, broken = scan_folder(tmp_path)
    assert missing_imports(imports, tmp_path) == {
        "nothing_a": ["handler.py:7", "local_one.py:1"],
        "ts.no_such_part": ["handler.py:9"],
        "nothing_d": ["handler.py:21"],
        "nothing_e": ["handler.py:27"],
    }
    assert broken == []


def test_file_that_is_not_python_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "handler.py").write_text("import os\n\ndef handle(:\n")
    (tmp_path / "other.py").write_text("import os\n")
    imports, (broken,) = scan_folder(tmp_path)
    assert broken.place == "handler.py:3"
    assert [each.place for each in imports] == ["other.py:1"]
