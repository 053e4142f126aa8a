"""``pyserve init``: a folder to start from, with a handler of one's own, its settings, a test and a client."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from pyserve.archive.manifest import check_model_name
from pyserve.errors import ConfigError

HANDLER = '''"""The handler of {name}: what a request becomes, and what is answered.

    pyserve dev {name}          serves this folder, and reloads this file when it is saved
    pyserve debug {name}        calls it once in the terminal; breakpoint() works
    pyserve check {name}        tries batches, and reports what would fail in production
"""

from ts.torch_handler.base_handler import BaseHandler


class Handler(BaseHandler):
    """Sums of numbers. A batch of requests comes at once; each gets the answer at its place."""

    def initialize(self, context):
        """Called once in each worker. Load the model here: files lie in the current folder."""
        self.context = context
        self.scale = context.model_yaml_config.get("scale", 1.0)
        self.initialized = True

    def preprocess(self, data):
        """One row per request -> lists of numbers."""
        return [row.get("body") or row.get("data") for row in data]

    def inference(self, data):
        """With a model: self.model(torch.stack(...))."""
        return [sum(numbers) * self.scale for numbers in data]

    def postprocess(self, data):
        """One answer per request: anything that JSON holds, text or bytes."""
        return [{{"sum": value}} for value in data]
'''
CONFIG = """# The settings of {name}; all keys are in docs/reference/model-config.md.
minWorkers: 1
maxWorkers: 1
batchSize: 4
maxBatchDelay: 10          # ms, for which a batch waits for more requests when minBatch asks for them
responseTimeout: 30        # s

scale: 2.0                 # a key of the handler's own: context.model_yaml_config["scale"]
"""
SAMPLE = "[1, 2, 3]\n"
TEST = '''"""`python -m pytest` in this folder: the model as a server would load and call it."""

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_nothing_would_fail_in_production():
    command = [sys.executable, "-m", "pyserve", "check", str(HERE), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert report["was_called"] and not report["findings"], report


def test_the_sum_is_scaled():
    command = [sys.executable, "-m", "pyserve", "debug", str(HERE), "--json-body", "[1, 2, 3]"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"sum": 12.0' in done.stdout
'''
CLIENT = '''"""Asks a server of this model: `pyserve dev {name}` in another terminal, then `python client.py`."""

import pyserve

client = pyserve.Client("http://127.0.0.1:8080")
print(client.predict("{name}", [1, 2, 3]))
'''
FILES = {
    "handler.py": HANDLER, "model-config.yaml": CONFIG, "sample_input.json": SAMPLE, "test_handler.py": TEST,
    "client.py": CLIENT,
}  # fmt: skip


def add_init_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``pyserve init``."""
    parser.add_argument("name", metavar="NAME", help="of the model, and of the folder that is made")


def init_command(parsed: argparse.Namespace) -> int:
    """Makes the folder. Exit code 0.

    Raises:
        ConfigError: there is something of that name, or it cannot be made.
        InvalidModelError: no model can have that name.
    """
    folder = Path(parsed.name)
    check_model_name(folder.name)
    try:
        folder.mkdir(parents=True)
        for name, text in FILES.items():
            is_template = name in ("handler.py", "model-config.yaml", "client.py")
            (folder / name).write_text(text.format(name=folder.name) if is_template else text)
    except FileExistsError:
        raise ConfigError(f"{folder} is there already; give another name, or remove it") from None
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error.strerror or error}") from None
    print(f"{folder}: {', '.join(FILES)}")
    here, client = (shlex.quote(str(path)) for path in (folder, folder / "client.py"))
    print(f"next: pyserve dev {here}    and in another terminal: python {client}")
    return 0
