"""On the path of every Python of `make sanitize`, child processes too: there ``pyserve._core`` is the sanitized build.

The file to load is named by ``PYSERVE_SANITIZED_CORE``.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys


class _SanitizedCore(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname != "pyserve._core":
            return None
        return importlib.util.spec_from_file_location(fullname, os.environ["PYSERVE_SANITIZED_CORE"])


if "PYSERVE_SANITIZED_CORE" in os.environ:
    sys.meta_path.insert(0, _SanitizedCore())
