"""Builds the one extension, pyserve._core, from csrc/ against the installed torch. Metadata is in pyproject.toml."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent

# Written beside the extension, because an extension built for another torch may not even load, and then could
# not say what it was built for.
(ROOT / "pyserve" / "_build_info.py").write_text(
    f'"""Written by setup.py."""\n\nTORCH_VERSION = "{torch.__version__}"\n'
)


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
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
            include_dirs=[str(ROOT / "csrc")],
            define_macros=[("PYSERVE_TORCH_VERSION", f'"{torch.__version__}"')],
            extra_compile_args=[
                "-std=c++20",
                "-O2",
                "-g0",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
                "-Wno-unused-parameter",
                *os.environ.get("PYSERVE_CXXFLAGS", "").split(),
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPy},
)
