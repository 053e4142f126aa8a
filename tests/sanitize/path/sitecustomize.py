"""On the path of every Python of `make sanitize`, child processes too: there its extensions are the sanitized build.

``PYSERVE_SANITIZED_CORE`` names the file of ``pyserve._core``; the other lies beside it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys


class _SanitizedCore(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        core = os.environ["PYSERVE_SANITIZED_CORE"]
        if fullname in ("pyserve._front", "pyserve._http"):
            name = fullname.rpartition(".")[2]
            return importlib.util.spec_from_file_location(fullname, core.replace("/_core.", f"/{name}."))
        if fullname != "pyserve._core":
            return None
        import torch  # noqa: F401 - whose libraries it needs; not every test that imports it has torch by then

        return importlib.util.spec_from_file_location(fullname, core)


if "PYSERVE_SANITIZED_CORE" in os.environ:
    sys.meta_path.insert(0, _SanitizedCore())
