"""A model without a server: what `pyserve debug` and `pyserve check` have in common.

An archive or folder is opened, its handler loaded and called through the same code as in a worker process.
"""

from __future__ import annotations

import argparse
import json
import mimetypes
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from pyserve.archive.archive import Archive, open_archive
from pyserve.archive.bare_file import is_input
from pyserve.archive.cache import open_cache
from pyserve.archive.given import Given
from pyserve.archive.limits import use_limits
from pyserve.archive.manifest import missing_handler, missing_manifest, name_of_file
from pyserve.archive.samples import archive_samples
from pyserve.commands.model_arguments import MODEL_HELP, UsageError, add_given_arguments, prepare
from pyserve.config.config import Config, load_config
from pyserve.errors import ModelNotFoundError
from pyserve.models.requirements import prepare_environment
from pyserve.regular_file import read_whole
from pyserve.worker.handler_choice import built_in_name
from pyserve.worker.spec import WorkerSpec

if TYPE_CHECKING:
    from pyserve.worker.request import Item

Headers = list[tuple[str, str]]
Say = Callable[[str], None]

# Of files whose content type is guessed by their name; others are sent without one, as `curl -T` does.
_TEXT_TYPES = {".json": "application/json", ".txt": "text/plain"}
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t]*:[ \t]*(.*)")


@dataclass
class Subject:
    """An opened model that is to be called.

    Attributes:
        notes: what was taken for granted, a line each.
    """

    archive: Archive
    config: Config
    spec: WorkerSpec
    startup_timeout_s: float = 120.0
    response_timeout_s: float = 120.0
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """``m 1.0``."""
        return f"{self.spec.name} {self.spec.version}"


@dataclass(frozen=True)
class Input:
    """One request.

    Attributes:
        query: of requests whose parameters become inputs; else empty.
        label: for people: ``kitten.jpg``.
    """

    body: bytes
    headers: Headers
    label: str
    query: str = ""

    def item(self, number: int) -> Item:
        """As it comes over the wire to a worker."""
        names = {name.lower() for name, _ in self.headers}
        added = [pair for pair in (("explain", "False"), ("url_path", "")) if pair[0] not in names]
        headers = "\n".join(text for pair in [*self.headers, *added] for text in pair)
        head = f"request-{number}\0{headers}\0{self.query}".encode()
        return number, 0, head, bytearray(self.body)

    @property
    def content_type(self) -> str:
        """Empty if none is sent."""
        return next((value for name, value in self.headers if name.lower() == "content-type"), "")


# --- the command line -------------------------------------------------------------------------------------------------


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The archive and the configuration."""
    parser.add_argument("archive", metavar="MODEL", type=Path, help=MODEL_HELP)
    parser.add_argument("--ts-config", metavar="FILE", help="a config.properties, as for `pyserve start`")
    add_given_arguments(parser, takes_bodies=True)


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """What is sent."""
    add = parser.add_argument
    add("-i", "--input", action="append", default=[], type=Path, metavar="FILE", help="body of a request; repeatable. "
        "Or, as float32:3,224,224, what one item of a model's file by itself is")  # fmt: skip
    add("--json-body", action="append", default=[], metavar="JSON", help="body of a request, sent as JSON; repeatable")
    add("--request", action="append", default=[], type=Path, metavar="FILE",
        help="a whole HTTP request: request line, headers, blank line, body; repeatable")  # fmt: skip
    add("--content-type", metavar="TYPE", help="of all bodies; default: JSON for .json and --json-body, text for .txt")
    add("--header", action="append", default=[], metavar="'NAME: VALUE'", help="sent with all requests; repeatable")


def read_inputs(parsed: argparse.Namespace) -> list[Input]:
    """The requests that the command line asks for, in the order files, JSON bodies, whole requests.

    Raises:
        UsageError: a file cannot be read, or is not what it should be.
    """
    headers = [_header(text) for text in parsed.header]
    inputs = []
    for path in parsed.input:
        if is_input(str(path)) and not path.exists():
            continue  # what the model takes
        guessed = _TEXT_TYPES.get(path.suffix.lower()) or mimetypes.guess_type(path.name)[0]
        inputs.append(_input(_content(path), path.name, headers, parsed.content_type or guessed))
    for text in parsed.json_body:
        try:
            json.loads(text)
        except ValueError as error:
            raise UsageError(f"--json-body {text!r} is not JSON: {error}") from None
        content_type = parsed.content_type or "application/json"
        inputs.append(_input(text.encode(), f"{text[:40]}{'...' * (len(text) > 40)}", headers, content_type))
    for path in parsed.request:
        inputs.append(_whole_request(path, headers))
    return inputs


def _content(path: Path) -> bytes:
    try:
        return read_whole(path)
    except OSError as error:
        raise UsageError(f"the input {path} cannot be read: {error.strerror}") from error


def _header(text: str) -> tuple[str, str]:
    match = _HEADER.fullmatch(text)
    if match is None:
        raise UsageError(f"--header {text!r} is no header; write 'name: value'")
    return match[1], match[2].strip()


def _input(body: bytes, label: str, headers: Headers, content_type: str | None) -> Input:
    named = any(name.lower() == "content-type" for name, _ in headers)
    added = [("content-type", content_type)] if content_type and not named else []
    return Input(body, [*headers, *added], label)


def _whole_request(path: Path, more: Headers) -> Input:
    """A request as it was on the wire, line ends of either kind."""
    content = _content(path)
    match = re.search(rb"\r?\n\r?\n", content)
    head = content[: match.start() if match else len(content)].decode("latin-1").splitlines()
    words = head[0].split() if head else []
    if len(words) != 3 or not words[2].startswith("HTTP/"):
        raise UsageError(f"{path.name} is no HTTP request: its first line must be like POST /predictions/m HTTP/1.1")
    headers = []
    for line in head[1:]:
        header = _HEADER.fullmatch(line)
        if header is None:
            raise UsageError(f"{path.name} is no HTTP request: {line[:80]!r} is no header")
        headers.append((header[1], header[2].strip()))
    target, _, query = words[1].partition("?")
    segments = [unquote(part) for part in target.split("/")[1:]]
    if segments[:1] == ["explanations"]:
        headers.append(("explain", "True"))
    elif segments[:1] == ["predictions"] and len(segments) > 3:
        headers.append(("url_path", "/".join(segments[3:])))
    # Parameters become inputs only where TorchServe makes them so.
    as_input = segments[:1] == ["invocations"] or segments[-1:] in (["invoke"], ["predict"])
    return Input(content[match.end() :] if match else b"", [*headers, *more], path.name, query if as_input else "")


# --- the model --------------------------------------------------------------------------------------------------------


def open_subject(path: Path, *, ts_config: str | None = None, given: Given | None = None) -> Subject:
    """Opens an archive, a folder with or without a manifest, or a model's file by itself, with the configuration that
    it would be served with.

    Args:
        given: what the command line says of a file that does not say it itself.

    Raises:
        ServeError: it cannot be opened; the text says why.
    """
    if path.suffix == ".py" and path.exists():
        raise ModelNotFoundError(f"{path} is a Python file; give the folder that it is in, or an archive")
    notes = prepare(path, given or Given(), needs_input=False)
    path = path.absolute()
    # Where the server's own models lie is of no matter here.
    overrides = {"model_store": (str(path.parent), "the archive's folder"), "load_models": ("", "the command line")}
    config = load_config(overrides, ts_config=ts_config)
    use_limits(config)
    archive = open_archive(path)
    archive.use_handler(archive.manifest.handler or config.default_service_handler)
    if not archive.manifest.handler:
        raise missing_manifest(archive.name) if archive.manifest.raw is None else missing_handler(archive.name)
    if built_in_name(archive) is not None:
        archive.check_complete()
    return _subject(archive, config, notes)


def _subject(archive: Archive, config: Config, notes: list[str]) -> Subject:
    from pyserve.lanes.settings import first_settings

    manifest = archive.manifest
    block = config.models.get(manifest.model_name, {}).get(manifest.model_version, {})
    settings = first_settings(config, archive.config, block, {}, archive.name)
    spec = WorkerSpec.of(
        archive,
        name=manifest.model_name or name_of_file(archive.name),
        batch_size=settings.batch_size,
        decode_input=config.decode_input_request,
        envelope=config.service_envelope or None,
        limit_max_image_pixels=config.limit_max_image_pixels,
        # A batch that fails is not tried again item by item: what is wrong with it is to be seen.
        isolate_errors=False,
        max_response_size=config.max_response_size,
        header_keys=(
            config.ts_header_key_sequence_id,
            config.ts_header_key_sequence_start,
            config.ts_header_key_sequence_end,
        ),
        metrics_config=config.metrics_file(),
    )
    return Subject(archive, config, spec, settings.startup_timeout_s, settings.response_timeout_s, notes)


def interpreter_for(subject: Subject, say: Say) -> str:
    """The Python that a worker of this model runs in, with what the archive requires; installed if it is not yet.

    Raises:
        InvalidModelError: pip failed.
    """
    archive = subject.archive
    if archive.manifest.requirements_file is None:
        return sys.executable
    if not (subject.config.install_py_dep_per_model or archive.config.use_venv):
        return sys.executable
    return prepare_environment(archive, subject.spec.name, say)


def enter(spec: WorkerSpec, config: Config) -> None:
    """Makes this process what a worker process is: its folder, environment and torch's options."""
    from pyserve.worker.main import move_into

    os.environ.setdefault("PYSERVE_WEIGHTS_CACHE", str(open_cache().root / "weights"))
    if config.blacklist_env_vars:
        for name in [name for name in os.environ if re.fullmatch(config.blacklist_env_vars, name)]:
            del os.environ[name]
    move_into(spec)


def on_device(subject: Subject) -> WorkerSpec:
    """The spec with the GPU that a first worker would get. Needs torch."""
    from dataclasses import replace

    from pyserve.devices import index_of
    from pyserve.models.placement import first_device, gpu_count

    gpus = gpu_count(subject.config.number_of_gpu)
    return replace(subject.spec, gpu_id=index_of(first_device(subject.archive.config, gpus, subject.archive.name)))


def own_samples(subject: Subject) -> list[Input]:
    """The requests that the archive brings along in ``sample_input*``."""
    samples = archive_samples(subject.spec.model_dir)
    return [_input(each.body, each.name, [], each.content_type) for each in samples]


def makes_samples(handler: Any) -> bool:
    """Whether `sample_input` can make something for ``handler``: it is derived from BaseHandler."""
    from pyserve.worker import sample_requests

    return sample_requests.makes_samples(handler)


def sample_input(handler: Any, context: Any) -> Input:
    """A made-up request for a handler that is initialized.

    Raises:
        UsageError: none can be made; the text says what to give.
    """
    from pyserve.worker.sample_requests import made_up_requests

    try:
        made_up = next(iter(made_up_requests(handler, context)))
    except Exception as error:
        text = " ".join(str(error).split())
        raise UsageError(f"no sample can be made up ({text}); give a file with -i, or --json-body") from error
    return _input(made_up.sample.body, made_up.sample.name, [], made_up.sample.content_type)


NO_INPUT = "what does this handler take? give a file with -i, or JSON with --json-body '...'"


def fill_batch(inputs: Sequence[Input], size: int) -> list[Input]:
    """``size`` of ``inputs``, in turn."""
    return [inputs[number % len(inputs)] for number in range(size)]
