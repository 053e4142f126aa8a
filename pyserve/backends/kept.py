"""What was made of an archive for a backend, and which backend was chosen: kept in the archive's cache.

    <cache>/archives/<key>/derived/<backend>-<precision>-<hash>/     the main file of the table and made.json
    <cache>/archives/<key>/derived/backend-choice-<hash>.json        a `Choice`

The hash stands for all that would make something else of it: versions, the kind of CPU, the handler. The archive's own
key stands for its content, model-config.yaml among it. What is there is whole: it is written under another name, and
renamed. Needs no torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pyserve.archive.archive import Archive
from pyserve.archive.drafts import draft_folder, write_whole
from pyserve.archive.file_digest import digest_of
from pyserve.backends.table import BACKENDS

log = logging.getLogger(__name__)

# Part of the hash: what an earlier version made or accepted is made again.
_MAKING = 2
_NOTE = "made.json"
# What no start has read for so long is removed when another is kept.
_UNUSED_MAX_S = 30 * 86_400.0
_CPU_FIELDS = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part", "CPU implementer")
_CPU_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


@dataclass(frozen=True)
class Made:
    """What became of making a model for a backend.

    Attributes:
        backend, precision: as in `table.BACKENDS`.
        seconds: how long it took.
        size: of all its files, bytes.
        difference: largest one to the model itself, relative; infinite where an answer was another altogether.
        probes: how many inputs it was compared on.
        error: why there is none, with what to do about it; ``""`` if there is one.
        note: what is odd about it, for a person.
        lasts: an error that would come again, so that it is kept too; else another try may do better.
        ranges: of each input the smallest and largest whole number that it may hold, both included, as far as the
            program was proven; None for floating-point inputs and for whole numbers of which any will do.
        sizes: of each input the smallest and largest size of each dimension, without the batch, that it was proven for;
            None for one without a known largest.
        agreement: of a lower precision: a `precision.PrecisionAgreement` with fp32 on the archive's calibration files,
            as JSON has it; None if there are none.
        digests: SHA-256 of each file, by its name.
    """

    backend: str
    precision: str
    seconds: float = 0.0
    size: int = 0
    difference: float = 0.0
    probes: int = 0
    error: str = ""
    note: str = ""
    lasts: bool = True
    ranges: tuple[tuple[int, int] | None, ...] = ()
    sizes: tuple[tuple[tuple[int, int | None], ...], ...] = ()
    agreement: dict[str, Any] | None = None
    digests: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The infinite difference as a number that JSON can hold."""
        return json.dumps({**asdict(self), "difference": min(self.difference, 1e300)})

    @classmethod
    def from_json(cls, text: str) -> Made:
        """Raises ValueError for anything that `to_json` did not write."""
        try:
            found = dict(json.loads(text))
            ranges = tuple(None if each is None else (int(each[0]), int(each[1])) for each in found.pop("ranges"))
            sizes = tuple(tuple((low, high) for low, high in each) for each in found.pop("sizes"))
            return cls(**found, ranges=ranges, sizes=sizes)
        except (TypeError, LookupError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"it is no note of what was made: {type(error).__name__}") from error


@dataclass(frozen=True)
class Choice:
    """Which backend a model runs on.

    Attributes:
        reason: why, one line.
        tried: a `trial.Tried` for each candidate that need not be tried again, as a dict.
        is_final: whether nothing is left to be tried; else the next start begins with it and continues.
    """

    backend: str
    reason: str
    tried: tuple[dict[str, Any], ...] = ()
    is_final: bool = True


def main_file(archive: Archive, backend: str, precision: str) -> Path:
    """Where the file that the backend loads is kept; it may not exist."""
    return _folder(archive, backend, precision) / BACKENDS[backend].file


def read_made(archive: Archive, backend: str, precision: str) -> Made | None:
    """What became of making it here before; None if it was not tried, or another try may do better."""
    folder = _folder(archive, backend, precision)
    try:
        made = Made.from_json((folder / _NOTE).read_text())
        # Of files that were cut short, or of which some are gone, no library says so in words of use.
        is_whole = (folder / BACKENDS[backend].file).is_file() and size_of(folder) == made.size
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError):
        os.utime(folder / _NOTE)  # for `_remove_unused`
    return made if made.error or is_whole else None


def size_of(folder: Path) -> int:
    """Bytes of what was made in a draft or a kept folder, its note left out."""
    return sum(path.stat().st_size for path in _files(folder))


def digests_of(folder: Path) -> dict[str, str]:
    """`Made.digests` of what was made in a draft or a kept folder.

    Raises:
        OSError: a file cannot be read.
    """
    found = {}
    for path in _files(folder):
        found[str(path.relative_to(folder))] = digest_of(path)
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _NOTE)


def forget_damaged(archive: Archive, backends: Iterable[str], precision: str) -> dict[str, str]:
    """Removes what is kept but is not as it was written, so that it is made again. Reads all of it.

    Loaders map these files: at the end of one that was cut short the process would end, and zeros in place of weights
    would be taken for them.

    Returns:
        what was removed: the backend's name -> what is wrong with it, for a person. The log has it too.
    """
    removed: dict[str, str] = {}
    for backend in backends:
        folder = _folder(archive, backend, precision)
        try:
            made = Made.from_json((folder / _NOTE).read_text())
            found = digests_of(folder)
        except (OSError, ValueError):
            continue  # nothing is there that `read_made` would take
        names = sorted(name for name in {*found, *made.digests} if found.get(name) != made.digests.get(name))
        if names and not made.error:
            removed[backend] = f"{' and '.join(names)} in {folder} was changed or damaged since it was made"
            log.warning("%s: %s", archive.name, removed[backend])
            with contextlib.suppress(OSError):
                _set_aside(folder)
    return removed


@contextlib.contextmanager
def draft(archive: Archive, backend: str, precision: str) -> Iterator[Path]:
    """An empty folder to make it in, for `keep`; gone afterwards.

    Raises:
        OSError: it cannot be written.
    """
    with draft_folder(_folder(archive, backend, precision)) as made_in:
        yield made_in


def keep(archive: Archive, made: Made, made_in: Path) -> None:
    """Puts what lies in ``made_in``, and ``made``, in the place of what was kept before.

    Raises:
        OSError: there is no room for it.
    """
    with (made_in / _NOTE).open("w") as file:
        file.write(made.to_json())
        file.flush()
        os.fsync(file.fileno())
    made_in.chmod(0o700)
    folder = _folder(archive, made.backend, made.precision)
    for _ in range(2):  # one more if another process kept its own meanwhile: either is right
        with contextlib.suppress(OSError):
            _set_aside(folder)
        try:
            made_in.rename(folder)
            _remove_unused(folder)
            return
        except OSError:
            if not folder.is_dir():
                raise


def _remove_unused(folder: Path) -> None:
    """Removes what is kept beside ``folder`` for the same backend and precision and was not read for long: it is of
    another torch, CPU or handler, and as large as the weights."""  # fmt: skip
    for each in folder.parent.glob(f"{folder.name.rpartition('-')[0]}-*"):
        with contextlib.suppress(OSError):
            if each != folder and time.time() - (each / _NOTE).stat().st_mtime > _UNUSED_MAX_S:
                _set_aside(each)


def _set_aside(folder: Path) -> None:
    """Removes a folder without showing a part of it; who has its files open keeps them."""
    aside = folder.with_name(f".{folder.name}.{os.urandom(4).hex()}.partial")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def read_choice(archive: Archive, precision: str, batch_size: int, cpus: int) -> Choice | None:
    """What was chosen for this archive before, with these backends, this batch size and budget; None if nothing was."""
    try:
        found = json.loads(_choice_file(archive, precision, batch_size, cpus).read_text())
        if found["backend"] not in BACKENDS:
            return None
        tried = tuple(dict(each) for each in found["tried"])
        return Choice(str(found["backend"]), str(found["reason"]), tried, bool(found["is_final"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def keep_choice(archive: Archive, precision: str, batch_size: int, cpus: int, choice: Choice) -> None:
    """Keeps it for later starts.

    Raises:
        OSError: there is no room for it.
    """
    path = _choice_file(archive, precision, batch_size, cpus)
    write_whole(path, lambda name: Path(name).write_text(json.dumps(asdict(choice))))


def _choice_file(archive: Archive, precision: str, batch_size: int, cpus: int) -> Path:
    usable = [f"{name} {each.version()}" for name, each in BACKENDS.items() if not each.missing()]
    return archive.cache_file(f"backend-choice-{_hash(archive, [precision, str(batch_size), str(cpus), *usable])}.json")


def _folder(archive: Archive, backend: str, precision: str) -> Path:
    row = BACKENDS[backend]
    installed = "" if row.missing() else row.version()
    return archive.cache_file(f"{backend}-{precision}-{_hash(archive, [backend, precision, installed])}")


def _hash(archive: Archive, parts: list[str]) -> str:
    given = [str(_MAKING), version("torch"), archive.given_handler, cpu_identity(), *parts]
    return hashlib.sha256("\0".join(given).encode()).hexdigest()[:16]


@functools.cache
def cpu_identity() -> str:
    """What compiled code may depend on: the kind of this machine's CPU, and what it can do."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in _CPU_FIELDS:
                found.setdefault(name.strip(), " ".join(sorted(value.split())))
    limits = [f"{name}={os.environ.get(name, '')}" for name in _CPU_VARIABLES]
    return "\n".join([platform.machine(), *(f"{name}={found[name]}" for name in sorted(found)), *limits])
