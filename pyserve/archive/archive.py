"""Opens a model archive: ``.mar`` (zip), ``.tar.gz``/``.tgz``, or a plain folder.

The file is opened once and everything is read through that descriptor, so replacing it meanwhile gives the old or the
new content, never a mixture. The order is: list, check, read manifest and configuration, check what the weights would
inflate to, and only then write; what is written appears by one rename.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyserve.archive.bare_file import BareReader, input_unknown
from pyserve.archive.cache import ArchiveCache, Contents, folder_key, open_cache
from pyserve.archive.effective import effective_entries
from pyserve.archive.entries import (
    MANIFEST_NAME,
    Entry,
    Limits,
    Reader,
    SourceFile,
    check_unpacked_size,
    name_problem,
    refuse,
)
from pyserve.archive.extract import find_root, unpack, verify
from pyserve.archive.file_kind import ARCHIVE, WEIGHTS, kind_of, weights_alone
from pyserve.archive.folder_reader import FolderReader, has_manifest, model_folder
from pyserve.archive.given import given_for
from pyserve.archive.limits import configured_limits
from pyserve.archive.manifest import Manifest, missing_manifest
from pyserve.archive.model_config import ModelConfig
from pyserve.archive.model_folder import Originals
from pyserve.archive.own_folder import OwnFolder
from pyserve.archive.program_inputs import inputs_beside, inputs_in
from pyserve.archive.room import room_in
from pyserve.archive.v2_metadata import METADATA_NAME
from pyserve.archive.weights import FileIdentity, Weights, check_inflation
from pyserve.errors import InvalidModelError, ModelLoadError, ModelNotFoundError
from pyserve.os_errors import cause_of

__all__ = [
    "Archive",
    "Manifest",
    "ModelConfig",
    "Survey",
    "Weights",
    "has_manifest",
    "is_unpacked",
    "open_archive",
    "survey",
]

log = logging.getLogger(__name__)

# Of files that torch.save and torch.jit.save write, whose kinds their names do not tell.
_TORCH_SUFFIXES = (".pt", ".pth", ".ts", ".torchscript")


@dataclass(frozen=True)
class Survey:
    """What an archive holds, before anything is unpacked.

    Attributes:
        kind: ``zip``, ``tar.gz``, ``tar`` or ``folder``.
        entries: everything in it, in its order.
        root: the folder that holds the model, with a trailing slash, or empty.
        weights: the entry of the serialized file; None when the manifest names none.
        is_mapped: the weights can be used where they lie.
        needed: what is wrong with it for a handler that reads all that the manifest names.
        oddities: texts about odd entries.
    """

    kind: str
    entries: list[Entry]
    root: str
    manifest: Manifest
    config: ModelConfig
    weights: Entry | None
    is_mapped: bool
    needed: tuple[str, ...] = ()
    oddities: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """Texts about all that is odd in it."""
        return [*self.oddities, *self.manifest.warnings, *self.config.warnings]


class Archive:
    """An opened archive.

    Attributes:
        path: as given to `open_archive`.
        name: its file name.
        manifest, config: parsed and checked.
        model_dir: folder with code and extra files, to be read only. Mapped weights are not in it until
            `Weights.as_file` is called.
        weights: the serialized file; None when the manifest names none.
        sha256: key of the content; for a folder, of its files' identities.
        files: names below ``model_dir`` that belong to the archive, mapped weights included, with sizes in bytes.
        needed: what is wrong with it for a handler that reads all that the manifest names; see `check_complete`.
        given_handler: the handler that was put in place of the manifest's; ``""`` if none was.
        bare: what was taken for granted of a model's file by itself, in one line; ``""`` of an archive or folder.
        inputs_from: what in the model's file the configuration's ``input`` was read from; ``""`` if it was not.
    """

    def __init__(
        self,
        path: Path,
        cache: ArchiveCache,
        key: str,
        *,
        model_dir: Path,
        manifest: Manifest,
        config: ModelConfig,
        weights: Weights | None,
        files: dict[str, int],
        needed: tuple[str, ...] = (),
        limits: Limits | None = None,
    ):
        self.path = path
        self.name = path.name
        self.sha256 = key
        self.model_dir = model_dir
        self.manifest = manifest
        self.config = config
        self.weights = weights
        self.files = files
        self.needed = needed
        self.given_handler = ""
        self.bare = ""
        self.inputs_from = ""
        self._cache = cache
        self._limits = limits or configured_limits()
        self._own = OwnFolder()
        self._read_inputs()

    def cache_file(self, name: str) -> Path:
        """Where something derived from this content is kept, such as a compiled model. The file may not exist.

        Raises:
            ValueError: ``name`` is not a plain file name.
        """
        if "/" in name or name_problem(name):
            raise ValueError(f"{name!r} is not a plain file name")
        return self._cache.derived(self.sha256) / name

    def use_handler(self, handler: str) -> None:
        """From now on ``handler`` is the manifest's; what handlers see of the manifest stays as it was written."""
        if handler != self.manifest.handler:
            self.manifest, self.given_handler = replace(self.manifest, handler=handler), handler
            self._read_inputs()

    def _read_inputs(self) -> None:
        """What the tensor handler has to know of the inputs, if only the model's own file or metadata says it."""
        manifest, weights = self.manifest, self.weights
        if manifest.handler != "tensor" or "tensor.py" in self.files or self.config.raw.get("input") is not None:
            return
        if weights is None:
            return
        found = inputs_in(weights, self.name, self._limits) if manifest.model_file is None else None
        if found is None and METADATA_NAME in self.files:
            found = inputs_beside(self.model_dir, self.name)
        if found is not None:
            self.config, self.inputs_from = self.config.with_input(found[0], self.name), found[1]

    @property
    def warnings(self) -> list[str]:
        """Texts about what is odd in its manifest and configuration; odd entries are reported when it is unpacked."""
        return [*self.manifest.warnings, *self.config.warnings]

    def check_complete(self) -> None:
        """To be called before anything but a handler of the archive's own reads its weights or model file.

        Raises:
            ModelLoadError: one of them is not there or cannot be used.
            InvalidModelError: the weights are a damaged zip, or inflate beyond the limits.
        """
        problems = (*self.needed, *self.config.needed)
        if problems:
            raise ModelLoadError(problems[0])
        if self.weights is not None:
            check_inflation(self.weights, self._limits, self.name)
            self._check_kind(self.weights)
        if self.bare and self.manifest.handler == "tensor" and self.config.raw.get("input") is None:
            raise ModelLoadError(f"{self.name}: {input_unknown(self.name)}")

    def _check_kind(self, weights: Weights) -> None:
        """Refuses what is no TorchScript, or no weights where there is a model file, by its name."""
        if weights.suffix not in _TORCH_SUFFIXES:
            return
        label = f"{self.name}: {weights.name}"
        with weights.pinned() as descriptor:
            try:
                kind, _ = kind_of(SourceFile(descriptor, label, weights.size, weights.offset), self._limits)
            except InvalidModelError as error:
                raise ModelLoadError(error.message) from error
        if kind == WEIGHTS and self.manifest.model_file is None:
            raise ModelLoadError(f"{label}: {weights_alone(weights.name)}")

    def own_folder(self, *, with_weights: bool = False, completes: bool = False) -> Path:
        """The model folder for code that may write there: this archive object's own, until `close`. Any thread.

        It is made at the first call, and again when it is gone. An archive that is a folder is served where it lies, as
        TorchServe does.

        Args:
            with_weights: the serialized file is in it too.
            completes: single files that are gone are put back too.

        Raises:
            ModelLoadError: it cannot be written, or all is gone: what was unpacked, and the archive.
        """
        if self.is_folder:
            if not self.model_dir.is_dir():
                raise ModelLoadError(f"{self.name}: its folder is gone; put it back, or register the model again")
            return self.model_dir
        try:
            return self._own.filled(
                self, self._cache, self._unpack_again, with_weights=with_weights, completes=completes
            )
        except OSError as error:
            fix = (
                "raise that limit, or allow fewer connections" if error.errno in (errno.EMFILE, errno.ENFILE)
                else "free space, or set PYSERVE_CACHE to a folder with enough"
            )  # fmt: skip
            raise ModelLoadError(
                f"{self.name}: its files cannot be copied to a folder of its own: {cause_of(error)}; {fix}"
            ) from error

    @property
    def served_dir(self) -> Path:
        """The folder that its code sees: `own_folder`, if that was made, else what was unpacked, to be read only."""
        return self._own.path or self.model_dir

    def _unpack_again(self) -> None:
        """If what was unpacked is gone from the cache, or was written to."""
        if self._cache.look_up(self.sha256) is not None:
            return
        log.warning("%s: what was unpacked of it is gone from the cache; it is unpacked again", self.name)
        try:
            with open_archive(self.path, cache_dir=self._cache.root, limits=self._limits) as again:
                is_other = again.sha256 != self.sha256
        except ModelNotFoundError:
            raise ModelLoadError(
                f"{self.name}: what was unpacked of it is gone from the cache, and so is the archive itself; put it "
                "back into its folder, or register the model again"
            ) from None
        if is_other:
            raise ModelLoadError(
                f"{self.name}: what was unpacked of it is gone from the cache, and the file is another one by now; "
                "register the model again"
            )

    @property
    def is_folder(self) -> bool:
        """Whether it is a plain folder, which is used where it lies."""
        return not self.model_dir.is_relative_to(self._cache.root / "archives")

    @property
    def originals(self) -> Originals:
        """What the large files of `own_folder` were copied from."""
        return self._own.originals

    def close(self) -> None:
        """Lets go of the archive file, and removes `own_folder`. Unpacked files and open maps stay."""
        if self.weights is not None:
            self.weights.close()
        self._own.remove()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


def open_archive(
    path: str | Path,
    *,
    cache_dir: str | Path | None = None,
    limits: Limits | None = None,
    manifest: bytes | None = None,
) -> Archive:
    """Opens an archive, unpacking it the first time its content is seen.

    Args:
        path: a ``.mar``, ``.tar.gz``, ``.tgz`` or ``.tar`` file, a folder, or a model's file by itself
            (`pyserve.archive.bare_file`).
        cache_dir: where to unpack; see `pyserve.archive.cache.open_cache` for the default.
        limits: by default those that are configured.
        manifest: text of MANIFEST.json for a folder without one; `given.give` gives it to all processes.

    Raises:
        ModelNotFoundError: there is no such file.
        InvalidModelError: the archive cannot be used; nothing of it is left on disk.
        ModelLoadError: the cache folder cannot be used, or the disk is full.
    """
    path = Path(path).absolute()
    cache = open_cache(Path(cache_dir).absolute() if cache_dir is not None else None)
    limits = limits or configured_limits()
    try:
        if path.is_dir():
            return _open_folder(path, cache, limits, manifest or given_for(path).manifest.encode() or None)
        with _opened(path) as source:
            return _open_file(path, source, cache, limits)
    except OSError as error:
        raise ModelLoadError(
            f"{path.name}: cannot be read or unpacked: {error.strerror or type(error).__name__}; check its "
            "permissions, and free space or set PYSERVE_CACHE to a folder with enough of it"
        ) from error


@contextlib.contextmanager
def survey(path: str | Path, *, label: str | None = None, limits: Limits | None = None) -> Iterator[Survey]:
    """Lists and checks an archive, and unpacks nothing. Errors as for `open_archive`, with ``label`` for its name."""
    path = Path(path).absolute()
    limits = limits or configured_limits()
    if path.is_dir():
        yield _survey(FolderReader(model_folder(path), label or path.name, limits), limits)
        return
    with _opened(path) as source:
        source.label = label or source.label
        yield _survey(_reader(path, source, limits), limits)


def _reader(path: Path, source: SourceFile, limits: Limits) -> Reader:
    """Of an archive, or of a model's file by itself."""
    kind, reader = kind_of(source, limits)
    if kind == ARCHIVE and reader is not None:
        return reader
    return BareReader(source, kind, given_for(path), limits)


def _key(cache: ArchiveCache, source: SourceFile, reader: Reader) -> str:
    digest = cache.digest(source)
    return (
        hashlib.sha256(f"{digest} {reader.key_part}".encode()).hexdigest() if isinstance(reader, BareReader) else digest
    )


def _survey(reader: Reader, limits: Limits) -> Survey:
    entries, oddities = effective_entries(reader.label, reader.entries, limits)
    root = find_root(reader.label, entries)
    files = {entry.name[len(root) :]: entry for entry in entries if not entry.is_folder and entry.name.startswith(root)}
    sizes = {name: entry.size for name, entry in files.items()}
    manifest, needed = read_manifest(
        reader.read(files[MANIFEST_NAME], limits.manifest_size_max) if MANIFEST_NAME in files else None,
        sizes, reader.label,
    )  # fmt: skip
    config = ModelConfig()
    if manifest.config_file is not None:
        text = reader.read(files[manifest.config_file], limits.config_size_max)
        config = ModelConfig.parse(text, f"{reader.label}: {manifest.config_file}")
    weights = files[manifest.serialized_file] if manifest.serialized_file is not None else None
    # Nothing can be mapped of what has no bytes.
    is_mapped = weights is not None and weights.is_stored and weights.size > 0
    if reader.kind != "folder":
        unpacked = [entry for entry in entries if not (is_mapped and entry is weights)]
        check_unpacked_size(reader.label, unpacked, reader.file_size, limits)
    return Survey(reader.kind, entries, root, manifest, config, weights, is_mapped, needed, tuple(oddities))


def read_manifest(text: bytes | None, sizes: Mapping[str, int], label: str) -> tuple[Manifest, tuple[str, ...]]:
    """The manifest of an archive with files of these sizes, and what is wrong for a handler that reads all it names.

    Args:
        text: None where there is none; the registration then says under which name, with which handler.
    """
    if text is None:
        return Manifest(
            warnings=(f"{missing_manifest(label).message}, or register it with model_name= and handler=",)
        ), ()
    return Manifest.parse(text, label).fitted(sizes, label)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[SourceFile]:
    """The regular file ``path``; a pipe or device in its place neither blocks nor is read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFoundError(f"Model not found at: {path.name}") from None
    except OSError as error:
        refuse(path.name, f"cannot be opened: {error.strerror}; check its permissions")
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            refuse(path.name, "is not a regular file; give an archive or a folder")
        yield SourceFile(descriptor, path.name, status.st_size)
    finally:
        os.close(descriptor)


def _open_file(path: Path, source: SourceFile, cache: ArchiveCache, limits: Limits) -> Archive:
    before = FileIdentity.of(source.descriptor)
    limits = replace(limits, room=room_in(cache.root))
    reader = _reader(path, source, limits)
    key = _key(cache, source, reader)
    contents = cache.look_up(key)
    if contents is None:
        with cache.lock(key):
            contents = cache.look_up(key) or _add(reader, source, path=path, cache=cache, key=key, limits=limits)
    if FileIdentity.of(source.descriptor) != before:
        refuse(path.name, "changed while it was read; write it elsewhere, then rename it into place")
    model_dir = cache.files(key) / contents.root
    names = dict(contents.files)
    if contents.weights is not None:
        names[contents.weights[0]] = contents.weights[2]
    root = contents.root
    files = {name[len(root) :]: size for name, size in names.items() if name.startswith(root)}
    text = (model_dir / MANIFEST_NAME).read_bytes() if MANIFEST_NAME in files else None
    manifest, needed = read_manifest(text, files, path.name)
    config = ModelConfig()
    if manifest.config_file is not None:
        text = (model_dir / manifest.config_file).read_bytes()
        config = ModelConfig.parse(text, f"{path.name}: {manifest.config_file}")
    weights = None
    if contents.weights is not None:
        name, offset, size = contents.weights
        unpack_to = cache.files(key) / name
        weights = Weights(
            name[len(contents.root) :], path, offset, size, descriptor=source.descriptor, unpack_to=unpack_to
        )
    elif manifest.serialized_file is not None:
        unpacked = model_dir / manifest.serialized_file
        weights = Weights(manifest.serialized_file, unpacked, 0, unpacked.stat().st_size)
    archive = Archive(
        path, cache, key, model_dir=model_dir, manifest=manifest, config=config, weights=weights, files=files,
        needed=needed, limits=limits,
    )  # fmt: skip
    archive.bare = reader.said if isinstance(reader, BareReader) else ""
    return archive


def _add(reader: Reader, source: SourceFile, *, path: Path, cache: ArchiveCache, key: str, limits: Limits) -> Contents:
    """Unpacks an archive into the cache; whatever goes wrong, nothing of it stays."""
    found = _survey(reader, limits)
    mapped = found.weights if found.is_mapped else None
    for text in found.oddities:
        log.warning("%s", text)
    with cache.unpacking(key) as partial:
        files = partial / "files"
        files.mkdir()
        if mapped is not None:
            verify(reader, [mapped])
        unpack(reader, [entry for entry in found.entries if entry is not mapped], files)
        contents = Contents(
            found.root,
            {entry.name: entry.size for entry in found.entries if not entry.is_folder and entry is not mapped},
            (mapped.name, mapped.offset, mapped.size) if mapped is not None else None,
        )
        cache.commit(key, partial, contents)
    return contents


def _open_folder(path: Path, cache: ArchiveCache, limits: Limits, manifest: bytes | None) -> Archive:
    if manifest is not None:
        reader = FolderReader(path, path.name, limits, manifest=manifest)
    else:
        reader = FolderReader(model_folder(path), path.name, limits)
    found = _survey(reader, limits)
    for text in reader.passed_over:
        log.warning("%s", text)
    weights = None
    if found.weights is not None:
        weights = Weights(found.weights.name, reader.path / found.weights.name, 0, found.weights.size)
    files = {entry.name: entry.size for entry in reader.files if not entry.is_folder}
    key = folder_key(reader.path, reader.files)
    if manifest is not None:
        key = hashlib.sha256(key.encode() + manifest).hexdigest()
    return Archive(
        path, cache, key, model_dir=reader.path, manifest=found.manifest, config=found.config, weights=weights,
        files=files, needed=found.needed, limits=limits,
    )  # fmt: skip


def is_unpacked(path: str | Path) -> bool:
    """Whether opening this archive unpacks nothing: it is a folder, or in the cache.

    Raises:
        ServeError: there is no such file.
    """
    path = Path(path).absolute()
    if path.is_dir():
        return True
    with _opened(path) as source:
        cache = open_cache()
        return cache.look_up(_key(cache, source, _reader(path, source, configured_limits()))) is not None
