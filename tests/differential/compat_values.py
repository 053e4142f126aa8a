"""Evaluates the snippets of `tests/compat/values/*.snippets` and prints what each comes to, as facts.

    python compat_values.py FOLDER [GROUP...] > compat_values.json

Runs in an environment of its own (TorchServe's, or one with the shims on its path) and needs nothing but
Python. A file is a group: what stands before the first line ``# -- name`` is run first, then each snippet under such a
line, all in one new folder. The last expression of a snippet is its value.
``file(name, text)`` writes a file and returns its path. Per case the output has the members that apply:

    value: repr of the value    raises: names of the error's class and its bases    text: of the error
    printed: text    logged: [[level, text]]    warned: [[type, text]]
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from public_names import StandIns, written


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[list[str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append([record.levelname, record.getMessage()])


def main() -> None:
    """Prints the facts of all groups, or of those named."""
    folder, *wanted = sys.argv[1:]
    sys.meta_path.append(StandIns())
    logging.getLogger().setLevel(logging.INFO)
    groups = {
        path.stem: path
        for path in sorted(Path(folder).resolve().glob("*.snippets"))
        if not wanted or path.stem in wanted
    }
    facts = {name: of_group(path.read_text()) for name, path in groups.items()}
    sys.stdout.write(written(facts) + "\n")
    sys.stdout.flush()
    os._exit(0)


def snippets(text: str) -> dict[str, str]:
    """Name -> code; what is run first has the name ``setup``."""
    setup, *rest = re.split(r"^# -- (.+)$", text, flags=re.MULTILINE)
    return {"setup": setup, **dict(zip(rest[::2], rest[1::2], strict=True))}


def of_group(text: str) -> dict[str, Any]:
    """Case -> what it comes to."""
    top = os.path.realpath(tempfile.mkdtemp(prefix="values-"))
    names: dict[str, Any] = {"file": _file, "re": re, "os": os, "json": json, "sys": sys, "__name__": "snippet"}
    facts = {}
    for name, code in snippets(text).items():
        os.chdir(top)
        facts[name] = observed(code, names, top)
    os.chdir("/")
    shutil.rmtree(top)
    return facts


def observed(code: str, names: dict[str, Any], top: str) -> dict[str, Any]:
    """Runs one snippet."""
    facts: dict[str, Any] = {}
    printed, records = io.StringIO(), Records()
    logging.getLogger().addHandler(records)
    with (
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        warnings.simplefilter("always")
        try:
            value = evaluate(code, names)
            if value is not None:
                facts["value"] = repr(value)
        except BaseException as error:  # a snippet may well end the process
            facts["raises"] = [each.__name__ for each in type(error).__mro__[:-2]]
            facts["text"] = str(error)
    logging.getLogger().removeHandler(records)
    facts |= {"printed": printed.getvalue(), "logged": records.texts}
    if "SystemExit" in facts.get("raises", ()):
        facts["printed"] = ""  # a parser's usage
    facts["warned"] = [
        [each.category.__name__, str(each.message)] for each in warned if each.category is not ResourceWarning
    ]
    text = json.dumps({key: value for key, value in facts.items() if value})
    text = re.sub(r" at 0x[0-9a-f]+", "", text).replace(json.dumps(top)[1:-1], "TOP")
    text = re.sub(rf"\b{re.escape(socket.gethostname())},\d{{10}}\b", "HOST,EPOCH", text)
    text = re.sub(r"(?<=: )\d{10}\b|\b\d+\.\d{2,}(?=\|#)", "N", text)  # times
    plain: dict[str, Any] = json.loads(text)
    return plain


def evaluate(code: str, names: dict[str, Any]) -> Any:
    """Executes ``code``; the value of its last statement, if that is an expression."""
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "snippet", "exec"), names)
    return eval(compile(ast.Expression(last.value), "snippet", "eval"), names) if isinstance(last, ast.Expr) else None


def _file(name: str, content: str | bytes = "") -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


if __name__ == "__main__":
    main()
