"""Builds the simulated accelerator, if its sources or torch have changed: python -m tests.simdev.build

Its folder, build/simdev, also holds what makes torch load the device by itself: a process with the folder on its
PYTHONPATH and with SIMDEV=1 in its environment has it. Prints the folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

SOURCES = Path(__file__).parent
FOLDER = SOURCES.parents[1] / "build" / "simdev"
EXTENSION = "simdev" + sysconfig.get_config_var("EXT_SUFFIX")
FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-interference-size"]
MACROS = ["-DTORCH_EXTENSION_NAME=simdev", "-DTORCH_API_INCLUDE_EXTENSION_H"]


def built() -> Path:
    """The folder, after building if need be. Processes that ask meanwhile wait."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        key = _key()
        mark = FOLDER / "built-from"
        if not mark.exists() or mark.read_text() != key or not (FOLDER / EXTENSION).exists():
            mark.unlink(missing_ok=True)
            _compile()
            _write_entry_point()
            mark.write_text(key)
    return FOLDER


def environment() -> dict[str, str]:
    """What a child process needs to have the device, to be added to its environment."""
    paths = [str(built()), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "SIMDEV": "1"}


def _key() -> str:
    text = hashlib.sha256()
    for path in [*sorted(SOURCES.glob("*.h")), *sorted(SOURCES.glob("*.cpp")), SOURCES / "autoload.py", Path(__file__)]:
        text.update(path.read_bytes())
    return f"{text.hexdigest()} torch {metadata.version('torch')} {EXTENSION}"


def _compile() -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [argument for path in include_paths() for argument in ("-isystem", path)]
    libraries = [argument for path in library_paths() for argument in (f"-L{path}", f"-Wl,-rpath,{path}")]
    unlinked, fresh = FOLDER / "simdev.o", FOLDER / (EXTENSION + ".new")
    compiler = os.environ.get("CXX", "g++")
    python = "-I" + sysconfig.get_path("include")
    source = str(SOURCES / "simdev.cpp")
    _run([compiler, *FLAGS, *MACROS, *includes, python, "-c", source, "-o", str(unlinked)])
    names = ["-lc10", "-ltorch", "-ltorch_cpu"]
    _run([compiler, "-shared", str(unlinked), "-o", str(fresh), *libraries, *names])
    unlinked.unlink()
    fresh.rename(FOLDER / EXTENSION)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def _write_entry_point() -> None:
    shutil.copyfile(SOURCES / "autoload.py", FOLDER / "simdev_autoload.py")
    about = FOLDER / "simdev-0.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: simdev\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[torch.backends]\nsimdev = simdev_autoload:load\n")


if __name__ == "__main__":
    print(built())
