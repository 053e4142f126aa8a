"""Importing a Python file of an archive without leaving names behind that another archive could trip over."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType

# sys.path and sys.modules are the process's: one file is imported at a time.
_import_lock = threading.Lock()


def import_file(path: Path) -> ModuleType:
    """The module of ``path``, imported under a name of its own, with its folder importable meanwhile.

    Its neighbours are imported along with it and belong to it alone; it must import them when it is loaded, not later.
    Where the folder is importable anyway, as in a worker process that serves this one archive, it is imported
    under its plain name, so that whoever else imports it gets the same module.

    Raises:
        Exception: whatever the file raises.
    """
    folder = str(path.parent)
    with _import_lock:
        # A sibling file may be newer than the last look into the folder.
        importlib.invalidate_caches()
        if _is_found_by_name(path):
            return importlib.import_module(path.stem)
        before = set(sys.modules)
        name = f"pyserve_model_file_{abs(hash(str(path))):x}"
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path.name} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        sys.path.insert(0, folder)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(name, None)
            raise
        finally:
            sys.path.remove(folder)
            for other in set(sys.modules) - before - {name}:
                file = getattr(sys.modules[other], "__file__", None)
                if file is not None and Path(file).is_relative_to(folder):
                    del sys.modules[other]
    return module


def _is_found_by_name(path: Path) -> bool:
    if not any(entry and Path(entry) == path.parent for entry in sys.path):
        return False
    try:
        spec = importlib.util.find_spec(path.stem)
    except (ImportError, ValueError):  # e.g. a module in sys.modules without a spec
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin) == path
