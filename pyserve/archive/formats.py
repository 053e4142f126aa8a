"""Writes the files of a model as a zip, a tar.gz or a folder; each appears complete or not at all."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from pyserve.archive.archive import survey
from pyserve.archive.entries import MANIFEST_NAME
from pyserve.errors import InvalidModelError

_ALIGNMENT = 64  # bytes; what vector loads and torch's own files use
_PADDING_EXTRA = 0xD935  # the id that zipalign gave to padding in a zip's extra field
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first time a zip can express


def write_zip(file: BinaryIO, files: Mapping[str, Path], manifest: bytes, stored: Collection[str]) -> None:
    """A zip with the manifest first; the members named in ``stored`` uncompressed and aligned, the others deflated."""
    with zipfile.ZipFile(file, "w") as archive:
        method = zipfile.ZIP_STORED if MANIFEST_NAME in stored else zipfile.ZIP_DEFLATED
        archive.writestr(_zip_header(MANIFEST_NAME, method), manifest)
        # What is mapped comes last: everything else is then read from one place at the front.
        for name in sorted(files, key=lambda name: (name in stored, name)):
            source = files[name]
            header = _zip_header(name, zipfile.ZIP_STORED if name in stored else zipfile.ZIP_DEFLATED)
            header.file_size = source.stat().st_size
            # The rule by which zipfile writes wide sizes, which lengthen the header.
            is_wide = header.file_size * 1.05 > zipfile.ZIP64_LIMIT
            if name in stored:
                _align(header, file.tell(), is_wide)
            with source.open("rb") as content, archive.open(header, "w", force_zip64=is_wide) as member:
                shutil.copyfileobj(content, member, 1 << 20)


def _zip_header(name: str, method: int) -> zipfile.ZipInfo:
    header = zipfile.ZipInfo(name, _EPOCH)
    header.compress_type = method
    header.create_system = 3  # Unix, whatever writes it
    header.external_attr = (stat.S_IFREG | 0o644) << 16
    return header


def _align(header: zipfile.ZipInfo, position: int, is_wide: bool) -> None:
    """Fills the extra field so that the bytes after the header at ``position`` begin on a boundary."""
    header.CRC = header.compress_size = 0  # not known yet; they take the same room
    unpadded = position + len(header.FileHeader(is_wide)) + 6
    size = -unpadded % _ALIGNMENT
    header.extra = (
        _PADDING_EXTRA.to_bytes(2, "little")
        + (2 + size).to_bytes(2, "little")
        + _ALIGNMENT.to_bytes(2, "little")
        + bytes(size)
    )


def write_tar(file: BinaryIO, files: Mapping[str, Path], manifest: bytes, model_name: str) -> None:
    """A gzipped tar with everything below a folder named as the model, as torch-model-archiver writes it."""
    with (
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        header = tarfile.TarInfo(f"{model_name}/{MANIFEST_NAME}")
        header.size = len(manifest)
        archive.addfile(header, io.BytesIO(manifest))
        for name in sorted(files):
            header = tarfile.TarInfo(f"{model_name}/{name}")
            header.size = files[name].stat().st_size
            with files[name].open("rb") as source:
                archive.addfile(header, source)


def write_file(target: Path, write: Callable[[BinaryIO], None], *, force: bool) -> None:
    """Writes beside ``target``, checks that the result opens, then renames."""
    with _partial(target) as partial:
        with partial.open("xb+") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        with survey(partial, label=target.name):
            pass
        if target.is_dir():
            raise InvalidModelError(f"{target.name} is a folder; remove it, or choose another export path")
        if not force:
            check_absent(target)
        partial.replace(target)


def check_absent(target: Path) -> None:
    """Raises InvalidModelError when something has that name already."""
    if os.path.lexists(target):
        raise InvalidModelError(f"{target.name} already exists in the export path; use --force to replace it")


def write_folder(target: Path, files: Mapping[str, Path], manifest: bytes) -> None:
    """The files in a plain folder; one that is already there is replaced."""
    with _partial(target) as partial:
        (partial / MANIFEST_NAME).parent.mkdir(parents=True)
        (partial / MANIFEST_NAME).write_bytes(manifest)
        for name, source in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, partial / name)
        with survey(partial, label=target.name):
            pass
        if os.path.lexists(target):
            if not target.is_dir() or target.is_symlink():
                raise InvalidModelError(f"{target.name} is not a folder; remove it, or choose another export path")
            with _partial(target) as discarded:
                target.rename(discarded)
                partial.rename(target)
        else:
            partial.rename(target)


@contextlib.contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A free name beside ``target``; what still lies there in the end is removed."""
    partial = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.partial")
    try:
        yield partial
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)
