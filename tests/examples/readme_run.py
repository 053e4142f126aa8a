"""Follows the README of an example as a reader would: in a folder of its own, each command, and what it prints.

Only the ports differ: the server of a test takes free ones, and commands and texts are changed to name them. Commands
are the lines in ```console fences that begin with ``$``; the lines below are what they print. Numbers differ from run
to run and from machine to machine, so only the words are compared; ``...`` stands for anything. What the numbers must
be is the business of the tests.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tests.support.serving import LIMIT_S, NAMES, ROOT, Server

# The ports in the texts.
PORTS = dict(zip(NAMES, (8080, 8081, 8082), strict=True))
# A reader's `python` and `pyserve`, wherever these tests run.
SHELL = """
set -eo pipefail
shopt -s nullglob
python() { "$TEST_PYTHON" "$@"; }
pyserve() { "$TEST_PYTHON" -m pyserve "$@"; }
"""
_FENCE = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_IN_BACKGROUND = re.compile(r"&$", re.MULTILINE)
_NUMBER = re.compile(r"\d[\d.,]*(?:e-\d+)?")


class Step(NamedTuple):
    """Commands that are run together, and what they print: one, or a block's from the one that ends with ``&`` on."""

    commands: str
    printed: str


def read_steps(readme: str) -> list[Step]:
    """The commands in the text of a README, in order.

    Raises:
        ValueError: a block does not begin with a command.
    """
    steps: list[Step] = []
    for fence in _FENCE.findall(readme):
        steps_before, continues = len(steps), False
        for line in fence.splitlines():
            is_joined = len(steps) > steps_before and _IN_BACKGROUND.search(steps[-1].commands) is not None
            if continues or (is_joined and line.startswith("$ ")):
                commands, printed = steps.pop()
                steps.append(Step(f"{commands}\n{line.removeprefix('$ ')}", printed))
            elif line.startswith("$ "):
                steps.append(Step(line.removeprefix("$ "), ""))
            elif len(steps) == steps_before:
                raise ValueError(f"a block begins with {line!r}, not with a command")
            else:
                commands, printed = steps.pop()
                steps.append(Step(commands, f"{printed}{line}\n"))
            continues = line.endswith("\\")
    return steps


def pattern_of(printed: str) -> re.Pattern[str]:
    """What matches an output, with a line break at its end, of the same words as ``printed``."""
    lines = []
    for line in printed.splitlines():
        if line.strip() == "...":
            lines.append(r"(?:[^\n]*\n)*?")
            continue
        words = []
        for word in line.split():
            parts = [_NUMBER.split(part) for part in word.split("...")]
            words.append(r"[^\n]*".join(_NUMBER.pattern.join(map(re.escape, part)) for part in parts))
        lines.append(r"[^\S\n]*" + r"[^\S\n]+".join(words) + r"[^\S\n]*\n")
    return re.compile("".join(lines))


class Example:
    """A copy of an example whose README is followed.

    Attributes:
        folder: the copy.
        server: what the README starts, once it has.
        printed: what each of its commands printed when it was run last, with the README's ports.
    """

    def __init__(self, name: str, temporary: Path):
        home = temporary / "home"
        home.mkdir()
        self.folder = home / name
        source = ROOT / "examples" / name
        tracked = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=source, capture_output=True, text=True, check=False
        ).stdout.split()  # not what somebody made there by hand
        for file in tracked or [str(each.relative_to(source)) for each in source.rglob("*") if each.is_file()]:
            (self.folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / file, self.folder / file)
        self.server = Server(temporary)
        self.server.pid_path = temporary / ".pyserve.pid"  # where it lies if nothing is said
        self.printed: dict[str, str] = {}
        self._steps = read_steps((self.folder / "README.md").read_text())

    def follow(self, until: str = "") -> None:
        """Runs what has not been run yet, up to the command that has the words ``until``, which is left."""
        while self._steps:
            step = self._steps[0]
            if until and until in step.commands:
                return
            del self._steps[0]
            printed = self.run(step.commands, with_errors="pyserve: error:" in step.printed)
            self.printed[step.commands] = printed
            is_as_written = pattern_of(step.printed).fullmatch(printed and printed.rstrip("\n") + "\n")
            assert is_as_written, f"{step.commands}\nprinted\n{printed}\nnot\n{step.printed}"
        assert not until, f"no command of the README has {until!r}"

    def printed_by(self, words: str) -> str:
        """What the first command printed that has these words."""
        return next(printed for commands, printed in self.printed.items() if words in commands)

    def run(self, commands: str, *, with_errors: bool = False) -> str:
        """Output of lines for a shell; the README's ports stand for those of the server, in both.

        Args:
            with_errors: standard error too, where progress is shown as well.
        """
        for shown, real in self._addresses().items():
            commands = commands.replace(shown, real)
        done = subprocess.run(
            ["bash", "-c", SHELL + commands], cwd=self.folder, env=self._environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT if with_errors else subprocess.PIPE,
            timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{commands}\nended with {done.returncode}:\n{done.stdout}{done.stderr or ''}"
        printed = done.stdout
        for shown, real in self._addresses().items():  # asked again: this may have started it
            printed = printed.replace(real, shown)
        return printed

    def _addresses(self) -> dict[str, str]:
        """What the README says -> what it is, while a server runs. A client is given what it would take by itself."""
        if not self.server.pid_path.exists():
            return {}
        addresses = {f"127.0.0.1:{port}": "{}:{}".format(*self.server.address(name)) for name, port in PORTS.items()}
        return {**addresses, "python client.py": f"python client.py --url {self.server.url()}"}

    def module(self, name: str) -> ModuleType:
        """A Python file of the example, imported under a name that no other example has."""
        path = self.folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"{self.folder.name}_{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def _environment(self) -> dict[str, str]:
        anywhere = {f"PYSERVE_{name.upper()}_ADDRESS": "http://127.0.0.1:0" for name in NAMES}
        environment = {
            **os.environ, **self.server.environment, **anywhere, "PYSERVE_ENABLE_GRPC": "false",
            "TEST_PYTHON": sys.executable,
        }  # fmt: skip
        environment.pop("LOG_LOCATION")  # a reader finds the logs in the folder
        return environment


@contextmanager
def example(name: str, temporary: Path) -> Iterator[Example]:
    """A copy of the example ``name`` below ``temporary``; whatever it starts ends with the context."""
    made = Example(name, temporary)
    try:
        yield made
    finally:
        made.server.kill()
