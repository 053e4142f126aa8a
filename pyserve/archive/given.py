"""What a command line says about files that do not say it themselves, for all processes that open them.

It is kept in an environment variable, by path, so that the server, the processes that convert models and a server that
is started again after a crash open a file as the one who typed the command meant it. A snapshot has it too.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

_VARIABLE = "PYSERVE_GIVEN"


@dataclass(frozen=True)
class Given:
    """What was given; empty for what was not.

    Attributes:
        manifest: text of MANIFEST.json, for a folder without one.
        handler: a built-in one, or the path of a Python file, with or without ``:function``.
        inputs: as on the command line: ``float32:3,224,224`` or ``ids=int64:2..64``, one for each input.
        model_file, labels, config_file: paths.
    """

    manifest: str = ""
    handler: str = ""
    inputs: tuple[str, ...] = ()
    model_file: str = ""
    labels: str = ""
    config_file: str = ""

    def to_text(self) -> str:
        """JSON of what was given; ``""`` if nothing was."""
        said = {key: value for key, value in asdict(self).items() if value}
        return json.dumps(said) if said else ""

    @classmethod
    def from_text(cls, text: str) -> Given:
        """The inverse. Raises ValueError for what `to_text` did not write."""
        try:
            found = json.loads(text) if text else {}
        except RecursionError as error:
            raise ValueError(str(error)) from None
        inputs = found.pop("inputs", []) if isinstance(found, dict) else None
        if not (isinstance(inputs, list) and all(isinstance(value, str) for value in (*found.values(), *inputs))):
            raise ValueError("not an object of texts, with a list of them as inputs")
        known = {each.name for each in fields(cls)}
        return cls(**{key: value for key, value in found.items() if key in known}, inputs=tuple(inputs))


def give(path: Path, given: Given) -> None:
    """Has this process, and those that it starts from now on, open ``path`` with what was given."""
    table = json.loads(os.environ.get(_VARIABLE, "{}"))
    text = given.to_text()
    if text:
        table[str(path.resolve())] = text
    else:
        table.pop(str(path.resolve()), None)
    os.environ[_VARIABLE] = json.dumps(table)


def given_for(path: Path) -> Given:
    """What was given for ``path``; an empty one if nothing was."""
    text = os.environ.get(_VARIABLE)
    if not text:
        return Given()
    return Given.from_text(json.loads(text).get(str(path.resolve()), ""))
