"""Builds the extensions; metadata is in pyproject.toml.

pyserve._core is made from csrc/ against the installed torch, pyserve._http from csrc/http/ and
pyserve._front, which front ends load, without it.

``PYSERVE_CXXFLAGS`` is added to the compiler's flags for the former. ``PYSERVE_SANITIZE=address,undefined`` compiles
for those sanitizers; pyserve._core then holds faults to be found as well (tests/sanitize/planted.cpp), and both are
only loaded by a Python with their libraries preloaded. Give it a folder of its own, as tests/sanitize/run.py does.
"""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from pathlib import Path

try:
    import torch
except ImportError:
    # pip builds in an environment of its own by default; the torch to build against is in the one around it.
    sys.path += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    try:
        import torch
    except ImportError as error:
        raise SystemExit(
            f"pyserve: its engine is built against the torch that it will run with, and there is none in {sys.prefix} "
            f"({error}). Type: pip install 'torch>=2.11,<2.14' numpy, and then the same command again; if it still "
            "fails: pip install 'setuptools>=77' ninja, and the same command with --no-build-isolation"
        ) from None
from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension

ROOT = Path(__file__).parent
SANITIZERS = os.environ.get("PYSERVE_SANITIZE", "")
# Of these, the first comes with torch's wheels; the second may have to be installed.
CUDA_HEADERS = ("cuda_runtime_api.h", "crt/host_defines.h")

# Written beside the extension, because an extension built for another torch may not even load, and then could
# not say what it was built for. That for sanitizers goes elsewhere, and leaves the one of this folder alone.
if not SANITIZERS:
    (ROOT / "pyserve" / "_build_info.py").write_text(
        f'"""Written by setup.py."""\n\nTORCH_VERSION = "{torch.__version__}"\n'
    )


def cuda_include_dirs() -> list[str]:
    """Where CUDA's headers are, if torch was built for CUDA; the first folder that has them, of a toolkit or of the
    packages that pip installs."""  # fmt: skip
    if getattr(torch.version, "cuda", None) is None:
        return []
    site = Path(torch.__file__).parents[1] / "nvidia"
    folders = [Path(CUDA_HOME, "include")] if CUDA_HOME else []
    for folder in [*folders, *sorted(site.glob("cu[0-9]*/include")), site / "cuda_runtime" / "include"]:
        # Packages of CUDA 12 and before have a folder each.
        parts = [folder, *(part for part in [site / "cuda_nvcc" / "include"] if folder.is_relative_to(site))]
        if all(any((part / name).is_file() for part in parts) for name in CUDA_HEADERS):
            return [str(part) for part in parts if part.is_dir()]
    print("pyserve: built without CUDA graphs, since CUDA's headers are not there "
          "(pip install nvidia-cuda-runtime nvidia-cuda-crt, of torch's CUDA version)")  # fmt: skip
    return []


def sources() -> list[str]:
    """All of csrc/ that this torch has headers for, and the planted faults if there is something to find them."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    files.remove(FRONT_SOURCE)
    if not CUDA_INCLUDE_DIRS:
        files.remove("csrc/graph_cuda.cpp")
    return [*files, "tests/sanitize/planted.cpp"] if SANITIZERS else files


def speed_or_sanitizers() -> list[str]:
    if not SANITIZERS:
        return ["-O2", "-g0"]
    return [
        f"-fsanitize={SANITIZERS}",
        "-fno-sanitize=vptr",  # asks for type information that libtorch hides
        # Its own library would write to stderr, of workers too; a trap is reported by AddressSanitizer, to a file.
        "-fsanitize-undefined-trap-on-error",
        "-fno-wrapv",  # Python's own flags have -fwrapv, with which no overflow is undefined
        "-D_GLIBCXX_ASSERTIONS",  # bounds within a container's capacity, which AddressSanitizer does not see
        "-fno-omit-frame-pointer",
        "-O1",  # keeps functions apart, so that reports name them
        "-g1",
    ]


CUDA_INCLUDE_DIRS = cuda_include_dirs()
COMPILE_ARGS = [
    "-std=c++20", *speed_or_sanitizers(), "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter",
]  # fmt: skip
LINK_ARGS = [f"-fsanitize={SANITIZERS}"] if SANITIZERS else []
FRONT_SOURCE = "csrc/bindings_front.cpp"
FRONT_HEADERS = [
    *("csrc/" + name for name in (
        "bindings_front.h", "bindings_fast_door.h", "bindings_fast_forms.h", "bindings_fast_path.h", "clock.h",
        "front_ledger.h", "front_ring.h", "json_item.h", "json_rows.h", "request_ids.h", "row_frame.h",
        "stage_counts.h",
    )),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "http").glob("*.h")),
]  # fmt: skip


class BuildEngine(BuildExtension):
    """Keeps the compiler's files of editable builds in the folder of other builds.

    pip has them work in a folder that it removes: all would be compiled for any change, and again for a wheel.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:
            self.build_temp = str(ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}")


class BuildPy(build_py):
    """Adds what makes `import ts` and `import model_archiver` find ours where TorchServe's are not installed.

    A .pth file puts its folder at the end of sys.path; packages of those names would overwrite TorchServe's files.
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, "pyserve-compat.pth").write_text("pyserve/compat\n")


setup(
    ext_modules=[
        CppExtension(
            "pyserve._core",
            sources(),
            include_dirs=[str(ROOT / "csrc"), *CUDA_INCLUDE_DIRS],
            libraries=["c10_cuda", "torch_cuda"] if CUDA_INCLUDE_DIRS else [],
            # With the second, torch's headers have only those operators that a file includes; see csrc/tensors.h.
            define_macros=[("PYSERVE_TORCH_VERSION", f'"{torch.__version__}"'), ("AT_PER_OPERATOR_HEADERS", None)],
            extra_compile_args=[*COMPILE_ARGS, *os.environ.get("PYSERVE_CXXFLAGS", "").split()],
            extra_link_args=LINK_ARGS,
        ),
        Extension(
            "pyserve._http",
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "http").glob("*.cpp")),
            include_dirs=[str(ROOT / "csrc")],
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "http").glob("*.h")),
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=LINK_ARGS,
        ),
        # Of torch it takes the headers of pybind11 only.
        Extension(
            "pyserve._front",
            [FRONT_SOURCE],
            include_dirs=[str(ROOT / "csrc"), str(Path(torch.__file__).parent / "include")],
            depends=FRONT_HEADERS,
            extra_compile_args=COMPILE_ARGS,
            extra_link_args=LINK_ARGS,
            language="c++",
        ),
    ],
    cmdclass={"build_ext": BuildEngine, "build_py": BuildPy},
)
