"""The packages that one archive wants: installed once, in a virtual environment of their own beside the server's.

The environment sees what the server has, its own packages first, so that torch need not be installed again. It lies
under a key of the requirements, the Python and the torch; the next start finds it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections import deque
from importlib.metadata import version
from pathlib import Path

from pyserve.archive.archive import Archive
from pyserve.archive.cache import open_cache
from pyserve.conversion.torchscript import Progress
from pyserve.errors import RequirementsError
from pyserve.launch import ROOT_DIR

log = logging.getLogger(__name__)

WHEELHOUSE = "wheels"  # a folder of the archive: nothing is fetched then
INSTALL_TIMEOUT_S = 1800
_COMPLETE = "complete"
_LINES_KEPT = 20


def prepare_environment(archive: Archive, name: str, progress: Progress) -> str:
    """The interpreter that has what the archive's requirements ask for; installs it if it is not there yet.

    Takes as long as pip does. Any thread.

    Raises:
        RequirementsError: pip failed, or a requirement wants another torch than the one that runs.
    """
    assert archive.manifest.requirements_file is not None
    requirements = archive.model_dir / archive.manifest.requirements_file
    key = hashlib.sha256(
        json.dumps([requirements.read_text("utf-8", "replace"), sys.version, version("torch"), sys.prefix]).encode()
    ).hexdigest()[:32]
    root = open_cache().root / "environments"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / key
    interpreter = folder / "bin" / "python"
    with open(root / f"{key}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be installing the same
        if (folder / _COMPLETE).exists():
            log.info("[deps %s] cached in %s", name, folder)
            return str(interpreter)
        shutil.rmtree(folder, ignore_errors=True)
        progress("installing its requirements")
        try:
            _make(folder)
            _install(archive, requirements, interpreter, name, progress)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        (folder / _COMPLETE).touch()
    return str(interpreter)


def _make(folder: Path) -> None:
    venv.create(folder, with_pip=False, symlinks=True)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    site.mkdir(parents=True, exist_ok=True)
    # Behind the environment's own folder on sys.path, so that its packages come first.
    ours = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(ROOT_DIR)])
    (site / "zz_server.pth").write_text("".join(f"{path}\n" for path in ours))


def _install(archive: Archive, requirements: Path, interpreter: Path, name: str, progress: Progress) -> None:
    constraints = interpreter.parents[1] / "constraints.txt"
    constraints.write_text(f"torch=={version('torch')}\n")
    command = [
        str(interpreter), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off",
        "-r", str(requirements), "-c", str(constraints),
    ]  # fmt: skip
    wheels = archive.model_dir / WHEELHOUSE
    flat = list(archive.model_dir.glob("*.whl"))
    if wheels.is_dir() or flat:
        command += ["--no-index", "--find-links", str(wheels if wheels.is_dir() else archive.model_dir)]
    last: deque[str] = deque(maxlen=_LINES_KEPT)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", cwd=archive.model_dir, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as pip:  # fmt: skip
        assert pip.stdout is not None
        for line in pip.stdout:
            text = line.rstrip()
            if text:
                last.append(text)
                log.info("[deps %s] %s", name, text)
                progress(f"installing its requirements: {text[:80]}")
        status = pip.wait(INSTALL_TIMEOUT_S)
    if status != 0:
        said = next((text for text in reversed(last) if text.startswith("ERROR")), last[-1] if last else "")
        raise RequirementsError(
            f"Custom pip package installation failed for model {name}", detail={"text": f"pip: {said}"}
        )
