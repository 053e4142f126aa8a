"""Virtual environments beside the server's own: they see all that it sees, and have packages of their own before that.

What an interpreter sees is decided by its ``site`` module: folders, and the ``.pth`` files in them, which name more
folders or install import hooks (editable installs do). So nothing is copied from ``sys.path``: the system's packages
come through ``include-system-site-packages``, those of a virtual environment by ``site.addsitedir``, which reads their
``.pth`` files as if they were there from the start.
"""

from __future__ import annotations

import importlib.util
import os
import site
import subprocess
import sys
import venv
from pathlib import Path

from pyserve.errors import RequirementsError
from pyserve.launch import ROOT_DIR

# The last of the environment's own .pth files, so that what is installed in it comes first.
_PTH_NAME = "zz_server.pth"


def make_environment(folder: Path) -> None:
    """Makes a virtual environment of this interpreter's Python in ``folder``, without pip where the server has it.

    Raises:
        RequirementsError: there is no pip to install with.
        OSError: it cannot be written.
    """
    has_pip = importlib.util.find_spec("pip") is not None
    try:
        venv.create(folder, with_pip=not has_pip, symlinks=True, system_site_packages=sees_system())
    except subprocess.CalledProcessError as error:
        raise RequirementsError(
            "there is no pip to install requirements with",
            detail={"text": f"the server's Python has no pip, and ensurepip failed ({error}); install pip there"},
        ) from error
    packages = site_packages(folder)
    packages.mkdir(parents=True, exist_ok=True)
    (packages / _PTH_NAME).write_text(_server_lines(), encoding="utf-8")


def site_packages(folder: Path) -> Path:
    """Where packages of the environment in ``folder`` lie."""
    return folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def sees_system() -> bool:
    """Whether this interpreter sees the system's packages: it is in no virtual environment, or in one that has them."""
    return sys.prefix == sys.base_prefix or sys.base_prefix in site.PREFIXES


def _server_lines() -> str:
    """Lines of a ``.pth`` file that show what this interpreter's own environment has, and pyserve itself."""
    folders = site.getsitepackages([sys.prefix]) if sys.prefix != sys.base_prefix else []
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in folders]
    root = str(ROOT_DIR)
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if root in sys.path and root not in [*folders, *inherited]:
        lines.append(f"{root}\n")
    return "".join(lines)
