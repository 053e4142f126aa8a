"""Writes model archives, with the flags of ``torch-model-archiver``.

In the default format code is deflated but the weights are stored, their first byte on a 64-byte boundary of the file,
so that a server can map them where they lie. The same files give the same bytes: entries are sorted and carry no
times; only the manifest's ``createdOn`` moves, and ``SOURCE_DATE_EPOCH`` holds that still too. The manifest also
names the versions of Python and packages that it was packed with, unless ``SOURCE_DATE_EPOCH`` asks for the same bytes
on all machines.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from pyserve.archive import versions
from pyserve.archive.entries import MANIFEST_NAME, Entry, check_entries
from pyserve.archive.formats import check_absent, write_file, write_folder, write_tar, write_zip
from pyserve.archive.manifest import (
    BUILTIN_HANDLERS,
    LSP_HANDLERS,
    RUNTIMES,
    check_model_name,
    check_model_version,
    nearest_handler,
    split_handler,
)
from pyserve.archive.model_config import ModelConfig
from pyserve.archive.samples import CALIBRATION_FOLDER, WARM_UP_FOLDER
from pyserve.errors import InvalidModelError, JsonObject, shown

FORMATS = ("default", "zip-store", "tgz", "no-archive")
log = logging.getLogger(__name__)

ARCHIVER_VERSION = "1.0"  # of the layout written here

_SKIPPED_FOLDERS = ("__MACOSX", "__pycache__")


@dataclass
class ArchiverConfig:
    """What to pack. Field names are those of ``model_archiver.ModelArchiverConfig``.

    Attributes:
        handler: a built-in name, or a Python file, with or without ``.py``, optionally ``:function``.
        serialized_file: weights; stored uncompressed.
        model_file: Python file with the one class that eager weights need.
        extra_files: comma-separated files, wildcards, and folders, whose content goes to the archive's root.
        archive_format: one of `FORMATS`.
        force: replace an archive that exists.
        calibration: a folder of inputs to calibrate an int8 model with; it goes to ``calibration/``.
        warmup: a folder of bodies that a model is run with before it is ready; it goes to ``warmup/``.
    """

    model_name: str
    handler: str
    version: str = "1.0"
    serialized_file: str | None = None
    model_file: str | None = None
    extra_files: str | None = None
    runtime: str = "python"
    export_path: str = ""
    archive_format: str = "default"
    force: bool = False
    requirements_file: str | None = None
    config_file: str | None = None
    # Ours: what is printed of TorchServe's class has the fields above.
    calibration: str | None = field(default=None, repr=False)
    warmup: str | None = field(default=None, repr=False)


def write_archive(config: ArchiverConfig) -> Path:
    """Packs a model and returns the path of the archive (a folder for ``no-archive``).

    The archive appears complete or not at all.

    Raises:
        InvalidModelError: a file is missing, given twice or cannot be packed, or the archive exists.
        OSError: the disk is full or the like.
    """
    check_model_name(config.model_name)
    check_model_version(config.version)
    if config.archive_format not in FORMATS:
        raise InvalidModelError(f"archive format {shown(config.archive_format)}: use one of {', '.join(FORMATS)}")
    if config.runtime not in RUNTIMES:
        raise InvalidModelError(f"runtime {shown(config.runtime)}: use one of {', '.join(RUNTIMES)}")
    files = _Files()
    manifest = _collect(config, files)
    check_entries(config.model_name, files.entries())
    folder = Path(config.export_path or os.getcwd())
    folder.mkdir(parents=True, exist_ok=True)
    suffix = {"tgz": ".tar.gz", "no-archive": ""}.get(config.archive_format, ".mar")
    target = folder / f"{config.model_name}{suffix}"
    if not config.force:
        check_absent(target)
    if config.archive_format == "no-archive":
        write_folder(target, files.sources, manifest)
        return target

    def write(file: BinaryIO) -> None:
        if config.archive_format == "tgz":
            write_tar(file, files.sources, manifest, config.model_name)
        elif config.archive_format == "zip-store":
            write_zip(file, files.sources, manifest, stored={*files.sources, MANIFEST_NAME})
        else:
            write_zip(file, files.sources, manifest, stored={_name_of(config.serialized_file)})

    write_file(target, write, force=config.force)
    return target


class _Files:
    """Names in the archive and where their bytes come from; no name twice."""

    def __init__(self) -> None:
        self.sources: dict[str, Path] = {}

    def add(self, name: str, source: Path) -> None:
        if name == MANIFEST_NAME:
            raise InvalidModelError(f"{source}: {MANIFEST_NAME} is written by the archiver; leave it out")
        known = self.sources.setdefault(name, source)
        if known != source and not known.samefile(source):
            raise InvalidModelError(f"{name} given twice: {known}, {source}; rename one of them")

    def add_file(self, what: str, path: str) -> str:
        """Adds one file to the root; returns its name there."""
        source = Path(path)
        if not source.is_file():
            text = f"{what} not found: {path}; check the path, it is relative to the current folder"
            raise InvalidModelError(text) from FileNotFoundError(path)
        self.add(source.name, source)
        return source.name

    def add_extra(self, pattern: str) -> None:
        found = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern))
        if not found and glob.has_magic(pattern):
            log.warning("extra files: %s matches no file", pattern)
        elif not found:
            text = f"extra file not found: {pattern}; check the path and the commas"
            raise InvalidModelError(text) from FileNotFoundError(pattern)
        for path in found:
            if os.path.isdir(path):
                self._add_folder(Path(path))
            else:
                self.add_file("extra file", path)

    def add_folder_as(self, what: str, name: str, path: str) -> None:
        """Adds the files in a folder, and in those below it, under ``name/`` instead of the root."""
        folder = Path(path)
        if not folder.is_dir():
            text = f"{what} folder not found: {path}; give a folder, relative to the current one"
            raise InvalidModelError(text) from FileNotFoundError(path)
        for source in sorted(folder.rglob("*")):
            inside = source.relative_to(folder)
            if source.is_file() and not any(part in _SKIPPED_FOLDERS or part.startswith(".") for part in inside.parts):
                self.add(f"{name}/{inside.as_posix()}", source)

    def entries(self) -> list[Entry]:
        return [Entry(name, source.stat().st_size, source.stat().st_size) for name, source in self.sources.items()]

    def _add_folder(self, folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                self._add_below(folder, path)
            else:
                self.add_file("extra file", str(path))

    def _add_below(self, top: Path, folder: Path) -> None:
        if folder.name in _SKIPPED_FOLDERS or folder.name.startswith("."):
            return
        if folder.is_symlink():
            raise InvalidModelError(f"extra files: {folder} is a link to a folder; name the folder itself")
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                self._add_below(top, path)
            elif path.is_file():
                self.add(path.relative_to(top).as_posix(), path)
            else:
                raise InvalidModelError(f"extra files: {path} is not a regular file; leave it out")


def _collect(config: ArchiverConfig, files: _Files) -> bytes:
    """Adds all files and returns the manifest's text."""
    model: dict[str, str] = {"modelName": config.model_name}
    if config.serialized_file:
        model["serializedFile"] = files.add_file("serialized file", config.serialized_file)
    model["handler"] = _add_handler(config, files)
    if config.model_file:
        model["modelFile"] = files.add_file("model file", config.model_file)
    model["modelVersion"] = config.version
    if config.requirements_file:
        model["requirementsFile"] = files.add_file("requirements file", config.requirements_file)
    if config.config_file:
        model["configFile"] = files.add_file("config file", config.config_file)
        ModelConfig.parse(Path(config.config_file).read_bytes(), model["configFile"])
    for pattern in (config.extra_files or "").split(","):
        if pattern.strip():
            files.add_extra(pattern.strip())
    if config.calibration:
        files.add_folder_as("calibration", CALIBRATION_FOLDER, config.calibration)
    if config.warmup:
        files.add_folder_as("warm-up", WARM_UP_FOLDER, config.warmup)
    now = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    manifest: JsonObject = {
        "createdOn": time.strftime("%d/%m/%Y %H:%M:%S", time.gmtime(now)),
        "runtime": config.runtime,
        "model": model,
        "archiverVersion": ARCHIVER_VERSION,
    }
    if not os.environ.get("SOURCE_DATE_EPOCH"):
        python_files = [path for name, path in files.sources.items() if name.endswith(".py")]
        manifest[versions.MANIFEST_KEY] = versions.running_versions(python_files)
    return json.dumps(manifest, indent=2).encode()


def _add_handler(config: ArchiverConfig, files: _Files) -> str:
    """Adds the handler's file, if it has one; returns what the manifest says."""
    handler = config.handler
    if handler in (LSP_HANDLERS if config.runtime == "LSP" else BUILTIN_HANDLERS):
        return handler
    path, colon, function = handler.rpartition(":") if ":" in handler else (handler, "", "")
    suffixes = (".so", ".dylib") if config.runtime == "LSP" else (".py",)
    for candidate in (path, *(path + suffix for suffix in suffixes)):
        if os.path.isfile(candidate) and candidate.endswith(suffixes):
            files.add(os.path.basename(candidate), Path(candidate))
            written = f"{os.path.basename(path)}{colon}{function}"
            split_handler(written)
            return written
    stem = os.path.basename(path)
    text = f"handler {shown(handler)} is neither a Python file nor built in{nearest_handler(stem)}"
    raise InvalidModelError(text) from FileNotFoundError(path)


def _name_of(path: str | None) -> str:
    return Path(path).name if path else ""
