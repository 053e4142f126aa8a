"""Builds the one extension, pyserve._core, from csrc/ against the installed torch. Metadata is in pyproject.toml."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent

# Written beside the extension, because an extension built for another torch may not even load, and then could
# not say what it was built for.
(ROOT / "pyserve" / "_build_info.py").write_text(
    f'"""Written by setup.py."""\n\nTORCH_VERSION = "{torch.__version__}"\n'
)

setup(
    ext_modules=[
        CppExtension(
            "pyserve._core",
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp")),
            include_dirs=[str(ROOT / "csrc")],
            define_macros=[("PYSERVE_TORCH_VERSION", f'"{torch.__version__}"')],
            extra_compile_args=[
                "-std=c++20", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter",
                *os.environ.get("PYSERVE_CXXFLAGS", "").split(),
            ],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
