"""The packages that one archive wants: installed once, in a virtual environment of their own beside the server's.

The environment sees what the server has, its own packages first, so that torch need not be installed again. It lies
under a key of everything that decides what is in it, and the next start finds it: the requirements with all files that
they name, the Python and its packages, and what pip's configuration says. What an index offers is not part of
the key: a requirement without a version stays what it was when it was installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections import deque
from importlib.metadata import distributions, version
from pathlib import Path
from typing import NoReturn

from pyserve.archive.archive import Archive
from pyserve.archive.cache import open_cache
from pyserve.conversion.torchscript import Progress
from pyserve.errors import RequirementsError, shown
from pyserve.launch import SAFE_PATH
from pyserve.models.environments import make_environment
from pyserve.models.requirement_files import (
    Requirements,
    input_digest,
    read_requirements,
    torch_conflict,
    wheels_of,
)

log = logging.getLogger(__name__)

INSTALL_TIMEOUT_S = 1800
_FORMAT = 2
_COMPLETE = "complete"
_LINES_KEPT = 200
# Of pip's variables those that change how it works or what it says, not what it installs.
_WITHOUT_EFFECT = frozenset(
    f"PIP_{name}"
    for name in (
        "CACHE_DIR", "CERT", "CLIENT_CERT", "DEFAULT_TIMEOUT", "DISABLE_PIP_VERSION_CHECK", "LOG", "NO_CACHE_DIR",
        "NO_COLOR", "NO_INPUT", "PROGRESS_BAR", "PROXY", "QUIET", "RETRIES", "TIMEOUT", "VERBOSE",
    )
)  # fmt: skip
# They would have pip install elsewhere than into the environment.
_ELSEWHERE = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
_PIP_ERROR = re.compile(r"\s*(ERROR|error): ")
_BUILD_ERROR = re.compile(r"\s+[\w.]+(Error|Exception)\b")  # of a package's own code, indented
_WANTS_TORCH = re.compile(r"^\s*(?P<who>\S+ \S+) depends on (?P<what>torch(?![\w.-])[^;]*)")


def prepare_environment(archive: Archive, name: str, progress: Progress) -> str:
    """The interpreter that has what the archive's requirements ask for; installs it if it is not there yet.

    The server's own, where they ask for nothing. Takes as long as pip does. Any thread.

    Raises:
        RequirementsError: pip failed, or a requirement wants another torch than the one that runs.
    """
    try:
        found = read_requirements(archive)
    except OSError as error:
        file = archive.manifest.requirements_file or ""
        _refuse(name, f"requirementsFile {shown(file)} cannot be read: {error.strerror}; pack it, or leave it out")
    if not found.lines:
        return sys.executable
    running = version("torch")
    conflict = torch_conflict(found, running)
    if conflict is not None:
        _refuse(name, _torch_text(str(conflict), running))
    root = open_cache().root / "environments"
    root.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(root)
    key = _key(archive, found, running)
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
            make_environment(folder)
            _Installation(archive, interpreter, name, progress, running).run()
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        # An environment with packages in the model's folder is of no use without that folder.
        (folder / _COMPLETE).write_text(str(archive.model_dir) if found.is_editable else "")
    return str(interpreter)


def _key(archive: Archive, found: Requirements, running: str) -> str:
    inputs = {
        "format": _FORMAT,
        "python": [sys.version, sys.prefix, sys.base_prefix, sysconfig.get_platform(), platform.libc_ver()],
        "torch": running,
        "packages": sorted({f"{each.name}=={each.version}" for each in distributions() if each.name}),
        "pip": _pip_settings(),
        "lines": [[line.file, line.text, line.is_constraint] for line in found.lines],
        "files": sorted(found.inputs.items()),
        "folder": str(archive.model_dir) if found.is_editable else "",
    }
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]


def _pip_settings() -> list[str]:
    """What pip reads beside the requirements: its variables, its files, and the files that the variables name."""
    settings = [
        f"{name}={value}\0" + "\0".join(input_digest(Path(word)) for word in value.split() if "/" in word)
        for name, value in sorted(os.environ.items())
        if name.upper().startswith("PIP_") and name not in _WITHOUT_EFFECT
    ]
    home = Path(os.path.expanduser("~"))
    shared = os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg"
    files = [*(Path(each, "pip/pip.conf") for each in shared.split(os.pathsep) if each), Path("/etc/pip.conf")]
    files += [home / ".pip/pip.conf", Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config", "pip/pip.conf")]
    for file in [*files, Path(sys.prefix, "pip.conf")]:
        digest = input_digest(file)
        if not digest:
            continue
        settings.append(f"{file}={digest}")
        words = file.read_text("utf-8", "replace").replace("=", " ").split()
        settings += [f"{word}={input_digest(Path(word))}" for word in words if word.startswith("/")]
    return settings


def _remove_abandoned(root: Path) -> None:
    """Removes environments with packages in folders of models that are gone."""
    for complete in root.glob(f"*/{_COMPLETE}"):
        try:
            wanted = complete.read_text()
            if wanted and not Path(wanted).exists():
                shutil.rmtree(complete.parent, ignore_errors=True)
        except OSError:
            continue


class _Installation:
    """Runs pip in an environment."""

    def __init__(self, archive: Archive, interpreter: Path, name: str, progress: Progress, running: str):
        self._archive = archive
        self._interpreter = interpreter
        self._name = name
        self._progress = progress
        self._running = running
        self._constraints = interpreter.parents[1] / "constraints.txt"

    def run(self) -> None:
        """Installs the archive's requirements; wheels that it brings along are taken before an index is asked.

        Raises:
            RequirementsError: pip failed.
        """
        self._constraints.write_text(f"torch=={self._running}\n")
        wheels = wheels_of(self._archive)
        options = [option for place in sorted({wheel.parent for wheel in wheels}) for option in ("--find-links", place)]
        if wheels and self._pip([*options, "--no-index"])[0] == 0:
            return
        status, last = self._pip(options)
        if status != 0:
            self._fail(last)

    def _pip(self, options: list[str | Path]) -> tuple[int, list[str]]:
        """Its exit status and its last lines."""
        requirements = self._archive.model_dir / str(self._archive.manifest.requirements_file)
        command = [
            str(self._interpreter), *SAFE_PATH, "-m", "pip", "install", "--disable-pip-version-check", "--no-input",
            "--progress-bar", "off", "-r", str(requirements), "-c", str(self._constraints), *map(str, options),
        ]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
        last: deque[str] = deque(maxlen=_LINES_KEPT)
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", cwd=self._archive.model_dir,
            env={**environment, "PYTHONUNBUFFERED": "1", "PIP_USER": "0"},
        ) as pip:  # fmt: skip
            assert pip.stdout is not None
            timer = threading.Timer(INSTALL_TIMEOUT_S, pip.kill)
            timer.start()
            try:
                for line in pip.stdout:
                    text = line.rstrip()
                    if text:
                        last.append(text)
                        log.info("[deps %s] %s", self._name, text)
                        self._progress(f"installing its requirements: {text[:80]}")
                return pip.wait(), list(last)
            finally:
                timer.cancel()

    def _fail(self, last: list[str]) -> NoReturn:
        wants_torch = [match for match in map(_WANTS_TORCH.match, last) if match]
        if wants_torch and any("(constraint) torch" in text for text in last):
            wanted = "; ".join(dict.fromkeys(f"{each['who']} wants {each['what'].strip()}" for each in wants_torch))
            _refuse(self._name, _torch_text(wanted, self._running))
        said = next((text for text in reversed(last) if _PIP_ERROR.match(text)), "")
        if not said or said == "ERROR: Exception:":  # a traceback follows
            said = last[-1] if last else "no word"
        cause = next((text.strip() for text in reversed(last) if _BUILD_ERROR.match(text)), "")
        if cause and said.startswith("error: "):
            said += f" ({cause})"
        fix = f"; save {self._archive.manifest.requirements_file} as UTF-8" if "UnicodeDecodeError" in said else ""
        _refuse(self._name, f"pip: {said.strip()}{fix}")


def _torch_text(wanted: str, running: str) -> str:
    return (
        f"{wanted}: that is not the torch {running} that the server runs, which its workers share; ask for a version "
        "that it satisfies, leave torch out, or start pyserve with the torch that is wanted"
    )


def _refuse(name: str, text: str) -> NoReturn:
    log.error("[deps %s] %s", name, text)
    raise RequirementsError(f"Custom pip package installation failed for model {name}", detail={"text": text})
