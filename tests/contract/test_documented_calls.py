"""The curl calls of TorchServe's documentation against a real server, by the script that users can run too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.serving import LIMIT_S, ROOT, Server

pytestmark = pytest.mark.server

SCRIPT = ROOT / "tests/golden/documented_calls.sh"


def run(server: Server, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), str(server.store)], capture_output=True, text=True, timeout=LIMIT_S, check=False,
        env={
            **server.environment,
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
            "ARCHIVER": f"{sys.executable} -m pyserve.commands.torch_model_archiver",
            **{name.upper(): server.url(name) for name in ("inference", "management", "metrics")},
            **environment,
        },
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [False, True])
def test_every_documented_call_has_its_documented_answer(tmp_path: Path, tokens: bool) -> None:
    server = Server(tmp_path)
    server.environment |= {"PYSERVE_DISABLE_TOKEN_AUTHORIZATION": str(not tokens).lower()}
    with server:
        server.start("--enable-model-api")
        done = run(server, **({"KEY_FILE": str(server.folder / "key_file.json")} if tokens else {}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    # None was skipped: the lines that call, those about keys, which are indented, only where there are some.
    text = SCRIPT.read_text().partition("# --- management API")[2]
    written = re.findall(r"^( *)(?:manage|inference|metrics|call) ", text, re.MULTILINE)
    calls = re.search(r"^(\d+) calls, 0 of them", done.stdout, re.MULTILINE)
    assert calls is not None and int(calls[1]) == sum(tokens or not indent for indent in written)


def test_an_answer_that_is_another_one_fails_the_script(tmp_path: Path) -> None:
    server = Server(tmp_path)
    with server:
        server.start("--disable-token-auth")
        # Management calls are sent to where the other ones belong.
        done = run(server, MANAGEMENT=server.url("inference"))
    assert done.returncode == 1 and "FAILED: expected status 202" in done.stdout
