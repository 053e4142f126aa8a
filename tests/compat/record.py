"""Records the names of TorchServe's packages, and what the snippets of `values` come to there.

    python -m tests.compat.record     TorchServe's environment is $TORCHSERVE_VENV, or is made in build/torchserve

Both go to tests/golden/torchserve. `requests` and `tqdm`, which TorchServe's modules import and do not ask for, are
stood in for.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.differential.run import torchserve_environment
from tests.differential.servers import ROOT

PACKAGES = ("ts", "model_archiver", "workflow_archiver")
GOLDEN = ROOT / "tests/golden/torchserve"


def main() -> None:
    """Writes both files."""
    python = torchserve_environment() / "python"
    scripts = ROOT / "tests/differential"
    for script, arguments, target in (
        ("public_names.py", PACKAGES, "public_names.json"),
        ("compat_values.py", (str(Path(__file__).parent / "values"),), "compat_values.json"),
    ):
        environment = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
        done = subprocess.run(
            [str(python), str(scripts / script), *arguments], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        (GOLDEN / target).write_bytes(done.stdout)
        print(target, done.stdout.count(b"\n"), "lines")


if __name__ == "__main__":
    main()
