"""A model's file by itself, read as if it were an archive: ``net.pt`` with a manifest that is made up for it.

    BareReader(source, kind, given)   entries: MANIFEST.json, model-config.yaml, files that were given, the file itself

The file is mapped where it lies, like the weights in an archive. Its name there ends as its kind has it, whatever it is
called: the loaders go by that.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

import yaml

from pyserve.archive.entries import LIMITS, MANIFEST_NAME, Entry, Limits, SourceFile, refuse
from pyserve.archive.file_kind import SAFETENSORS, SUFFIXES, WEIGHTS, weights_alone
from pyserve.archive.given import Given
from pyserve.archive.manifest import DEFAULT_VERSION, nearest_handler, split_handler
from pyserve.errors import InvalidModelError, shown
from pyserve.handler import BUILT_IN
from pyserve.input_config import DTYPES, InputConfigError, read_inputs

CONFIG_NAME = "model-config.yaml"
LABELS_NAME = "index_to_name.json"
DEFAULT_HANDLER = "tensor"

_GIVEN_SIZE_MAX = 16 << 20
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9_.\-]+")
_INPUT = re.compile(r"(?:(?P<name>[^=:]+)=)?(?P<dtype>[a-z0-9.]+)(?::(?P<sizes>.*))?")
INPUT_FORM = "float32:3,224,224 (one item, without the batch; -1 for any size, 2..64 for a range; name=... for several)"


class BareReader:
    """The entries of an archive around one file of torch's.

    Attributes:
        key_part: what beside the file itself decides what the archive holds.
        said: what was taken for granted, in one line.

    Raises:
        InvalidModelError: what was given cannot be read, or does not go together.
    """

    def __init__(self, source: SourceFile, kind: str, given: Given, limits: Limits = LIMITS):
        self.label = source.label
        self.kind = kind
        self.file_size = source.size
        self._source = source
        self._limits = limits
        self._texts: dict[str, bytes] = {}
        weights = model_name_of(source.label) + SUFFIXES[kind]
        if kind in (WEIGHTS, SAFETENSORS) and not given.model_file:
            refuse(source.label, weights_alone(source.label))
        model = {"modelName": model_name_of(source.label), "modelVersion": DEFAULT_VERSION, "serializedFile": weights}
        model["handler"] = self._handler(given)
        if given.model_file and kind in (WEIGHTS, SAFETENSORS):  # a program has its code in it
            model["modelFile"] = self._take(given.model_file, "--model-file")
        if given.labels:
            self._texts[LABELS_NAME] = _content(given.labels, "--labels")
        config = config_text(given, self.label)
        if config:
            model["configFile"] = CONFIG_NAME
            self._texts[CONFIG_NAME] = config
        manifest = {"runtime": "python", "model": model, "archiverVersion": "1.0"}
        self._texts = {MANIFEST_NAME: json.dumps(manifest, indent=2).encode(), **self._texts}
        self._weights = Entry(weights, source.size, source.size, is_stored=True, offset=0)
        self.said = f"{self.label}: {kind}, served as {model['modelName']} with handler {model['handler']}"

    @property
    def entries(self) -> list[Entry]:
        texts = [Entry(name, len(text), len(text), is_stored=True, offset=0) for name, text in self._texts.items()]
        return [*texts, self._weights]

    @property
    def key_part(self) -> str:
        digest = hashlib.sha256()
        for name, text in self._texts.items():
            digest.update(f"{name}\0{len(text)}\0".encode() + text)
        return digest.hexdigest()

    def read(self, entry: Entry, size_max: int) -> bytes:
        if entry.size > size_max:
            refuse(self.label, f"{shown(entry.name)} has {entry.size} bytes, more than the {size_max} allowed")
        return b"".join(next(iter(self.contents([entry])))[1])

    def contents(self, entries: Iterable[Entry]) -> Iterator[tuple[Entry, Iterator[bytes]]]:
        for entry in entries:
            if entry.name in self._texts:
                yield entry, iter([self._texts[entry.name]])
            else:
                yield entry, self._source.chunks(0, entry.size)

    def _handler(self, given: Given) -> str:
        if not given.handler:
            if given.labels:
                raise InvalidModelError("--labels are for a handler that names classes: add --handler image_classifier")
            return DEFAULT_HANDLER
        if given.handler in BUILT_IN:
            return given.handler
        path, colon, function = given.handler.partition(":")
        for candidate in (path, f"{path}.py"):
            if candidate.endswith(".py") and Path(candidate).is_file():
                written = f"{self._take(candidate, '--handler')}{colon}{function}"
                split_handler(written)
                return written
        stem = PurePath(path).name
        raise InvalidModelError(
            f"--handler {shown(given.handler)} is neither a Python file nor built in{nearest_handler(stem)}"
        )

    def _take(self, path: str, flag: str) -> str:
        name = PurePath(path).name
        content = _content(path, flag)
        if self._texts.setdefault(name, content) != content:
            raise InvalidModelError(f"{flag} {path}: another file is called {name} already; rename one of them")
        return name


def input_unknown(file: str) -> str:
    """What to say of a file with a model that does not say what it takes; behind its name and a colon."""
    return (
        f"nothing in it says what one item of its input is; say it, as in `pyserve start {shlex.quote(file)} --input "
        "float32:3,224,224` (dtype and shape without the batch, -1 for any size; once for each input, then with "
        "name=...), or in input: of an archive's model-config.yaml, or save the model with torch.export.save, which "
        "keeps it"
    )


def model_name_of(file: str) -> str:
    """What a model is called whose only name is its file's."""
    return _NOT_IN_NAMES.sub("_", PurePath(file).stem).lstrip("_.-") or "model"


def config_text(given: Given, label: str) -> bytes:
    """model-config.yaml of what was given; empty if nothing was.

    Raises:
        InvalidModelError: it cannot be read, or the inputs are not of the form.
    """
    text = _content(given.config_file, "--config-file") if given.config_file else b""
    if not given.inputs:
        return text
    described = described_inputs(given.inputs)
    line = yaml.safe_dump({"input": described}, default_flow_style=None, sort_keys=False).encode()
    if not text.strip():
        return line
    try:
        before = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text  # which is refused, with the line
    if not isinstance(before, dict):
        return text
    before["input"] = described
    return yaml.safe_dump(before, sort_keys=False).encode()


def described_inputs(texts: Iterable[str]) -> Any:
    """The value of ``input`` in model-config.yaml that ``--input`` means.

    Raises:
        InvalidModelError: it is not of the form; the text says how to write it.
    """
    described = []
    for text in texts:
        found = _INPUT.fullmatch(text.strip())
        dtype = found["dtype"].removeprefix("torch.") if found else ""
        if found is None or dtype not in DTYPES:
            raise InvalidModelError(f"--input {shown(text)}: write dtype:shape, such as {INPUT_FORM}; dtypes: "
                                    f"{', '.join(DTYPES)}")  # fmt: skip
        sizes = [part.strip() for part in (found["sizes"] or "").strip("[]() ").split(",") if part.strip()]
        entry: dict[str, Any] = {
            "dtype": dtype, "shape": [int(part) if re.fullmatch(r"-?[0-9]{1,12}", part) else part for part in sizes]
        }  # fmt: skip
        if found["name"]:
            entry["name"] = found["name"].strip()
        described.append(entry)
    value: Any = described[0] if len(described) == 1 else described
    try:
        read_inputs(value, "--input")
    except InputConfigError as error:
        raise InvalidModelError(f"{error}; write it as {INPUT_FORM}") from None
    return value


def is_input(text: str) -> bool:
    """Whether ``text`` is of the form of ``--input``, and not a file's name."""
    found = _INPUT.fullmatch(text)
    return found is not None and ":" in text and found["dtype"].removeprefix("torch.") in DTYPES


def _content(path: str, flag: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(_GIVEN_SIZE_MAX + 1)
    except OSError as error:
        text = f"{flag} {path} cannot be read: {error.strerror}; check the path, it is relative to the current folder"
        raise InvalidModelError(text) from None
    if len(content) > _GIVEN_SIZE_MAX:
        raise InvalidModelError(f"{flag} {path} has more than {_GIVEN_SIZE_MAX} bytes; give a text file")
    return content
