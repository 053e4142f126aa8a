"""What an archive's requirements file says, as far as it decides which environment serves the model.

pip reads the file; here it is read for three questions: is anything wanted, which torch is wanted, and which other
files does the answer depend on. The last one is asked generously: a word that names something on disk counts, whatever
option it stands behind, since one name too many costs an installation and one too few runs old code.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from pyserve.archive.archive import Archive
from pyserve.archive.file_digest import digest_of

WHEELHOUSE = "wheels"  # a folder of the archive whose wheels are found by name, as those beside the handler are
_ARCHIVE_SUFFIXES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar", ".egg")
_BUILT = frozenset({"build", "dist", "__pycache__"})  # what building a package leaves in its folder
_HASHED_SIZE_MAX = 64 << 20  # of a file of a plain folder; a larger one counts by its name, size and times
_NESTING_MAX = 32
_FILE_COUNT_MAX = 100_000  # of a folder outside of the archive

_COMMENT = re.compile(r"(^|\s+)#.*$")
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")
_CODING = re.compile(rb"^#.*?coding[:=][ \t]*([-_.a-zA-Z0-9]+)")
_NESTED = re.compile(r"(?:-r|-c|--requirement|--constraint)(?:\s*=\s*|\s*)(.+)")
_EDITABLE = re.compile(r"(?:-e|--editable)\b|-e(?=[./~])")
_OPTION = re.compile(r"--?[A-Za-z][A-Za-z-]*=?")
_TORCH = re.compile(r"torch(?=$|[\s\[<>=!~;@(,])", re.IGNORECASE)
_BOMS = (
    (b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"),
)  # fmt: skip


class Line(NamedTuple):
    """One requirement or option: the file it stands in, its number from 1, and its text with variables put in."""

    file: str
    number: int
    text: str
    is_constraint: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.text}"


@dataclass
class Requirements:
    """What one requirements file and those that it includes come to.

    Attributes:
        lines: all that are no comments, in the order in which pip reads them.
        is_editable: one names a folder that is used where it lies.
        inputs: SHA-256 in hex, by name, of every file and folder that the installation reads.
    """

    lines: list[Line] = field(default_factory=list)
    is_editable: bool = False
    inputs: dict[str, str] = field(default_factory=dict)


def read_requirements(archive: Archive) -> Requirements:
    """Reads the archive's requirements file and all that it names. Reads wheels and sources; takes as long.

    Raises:
        OSError: the requirements file itself cannot be read.
    """
    assert archive.manifest.requirements_file is not None
    path = archive.model_dir / archive.manifest.requirements_file
    found = Requirements()
    reader = _Reader(archive, found)
    reader.read(path)
    for wheel in wheels_of(archive):
        reader.add(wheel)
    return found


def wheels_of(archive: Archive) -> list[Path]:
    """The wheels that an archive brings along: beside the handler, and in its folder ``wheels``."""
    found = [*archive.model_dir.glob("*.whl"), *(archive.model_dir / WHEELHOUSE).glob("*.whl")]
    return sorted(path for path in found if os.path.isfile(path))


def input_digest(path: Path) -> str:
    """SHA-256 in hex of a file of pip's configuration, or of the names and times in a folder; ``""`` without one."""
    try:
        if path.is_dir():
            return _outside(path)
        return digest_of(path)
    except OSError:
        return ""


def torch_conflict(found: Requirements, running: str) -> Line | None:
    """The first line that wants another torch than the version ``running``.

    Constraints are left to pip: they say nothing unless something else wants torch.
    """
    for line in found.lines:
        if not line.is_constraint and _TORCH.match(line.text) and not _is_met(line.text, running):
            return line
    return None


def _is_met(line: str, running: str) -> bool:
    """Whether ``running`` satisfies a requirement of torch. What cannot be judged is left to pip."""
    try:
        from packaging.requirements import InvalidRequirement, Requirement
    except ImportError:
        try:
            from pip._vendor.packaging.requirements import (  # type: ignore[assignment]
                InvalidRequirement,
                Requirement,
            )
        except ImportError:
            return True
    try:
        wanted = Requirement(re.split(r"\s--", line)[0].strip())
    except InvalidRequirement:
        return True
    if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
        return True
    # Whatever a URL names, pip would fetch it beside the torch that runs.
    return not wanted.url and wanted.specifier.contains(running, prereleases=True)


class _Reader:
    """Follows one file's lines into what they name."""

    def __init__(self, archive: Archive, found: Requirements):
        self._archive = archive
        self._root = archive.model_dir.resolve()
        self._found = found
        self._seen: set[tuple[Path, bool]] = set()

    def read(self, path: Path, depth: int = 0, *, is_constraint: bool = False) -> None:
        content = path.read_bytes()
        seen = (path.resolve(), is_constraint)
        if seen in self._seen:
            return
        self._seen.add(seen)
        self._found.inputs[self._name(path)] = hashlib.sha256(content).hexdigest()
        for number, line in _logical_lines(_decoded(content)):
            text = _VARIABLE.sub(lambda match: os.environ.get(match[1]) or match[0], line)
            self._found.lines.append(Line(self._name(path), number, text, is_constraint))
            self._follow(text, path, depth, is_constraint)

    def add(self, path: Path) -> None:
        """Counts a file or folder among the inputs."""
        name = self._name(path)
        if name in self._found.inputs:
            return
        if not path.is_dir():
            self._found.inputs[name] = digest_of(path)
        elif path.resolve().is_relative_to(self._root):
            # A build may read what lies beside its folder.
            self._found.inputs["."] = self._whole_archive()
        else:
            self._found.inputs[name] = _outside(path)

    def _follow(self, line: str, of: Path, depth: int, is_constraint: bool) -> None:
        if _EDITABLE.match(line):
            self._found.is_editable = True
        nested = _NESTED.match(line)
        if nested is not None:
            path = self._existing(nested[1].strip().strip("'\""), [of.parent])
            if path is not None and path.is_file() and depth < _NESTING_MAX:
                is_constraint = is_constraint or line.startswith(("-c", "--constraint"))
                self.read(path, depth + 1, is_constraint=is_constraint)
            return
        is_named = False
        for word in _words(line):
            path = self._existing(word, [self._archive.model_dir, of.parent])
            if path is not None:
                is_named = True
                self.add(path)
        if not is_named and _is_pathlike(line):
            self._found.inputs["."] = self._whole_archive()

    def _existing(self, word: str, places: list[Path]) -> Path | None:
        for place in places:
            path = place / os.path.expanduser(word)
            try:
                if path.exists() and (path.is_file() or path.is_dir()):
                    return path
            except (OSError, ValueError):
                continue
        return None

    def _name(self, path: Path) -> str:
        real = path.resolve()
        return str(real.relative_to(self._root)) if real.is_relative_to(self._root) else str(real)

    def _whole_archive(self) -> str:
        """A key of all of its files; of a plain folder without what building a package leaves there."""
        archive = self._archive
        if not archive.path.is_dir():
            return archive.sha256
        digest = hashlib.sha256()
        for name in sorted(archive.files):
            parts = name.split("/")
            if _BUILT.intersection(parts) or any(part.endswith(".egg-info") for part in parts):
                continue
            path = archive.model_dir / name
            try:
                status = path.stat()
                if status.st_size <= _HASHED_SIZE_MAX and name != archive.manifest.serialized_file:
                    digest.update(f"{name}\0{digest_of(path)}\n".encode())
                else:
                    digest.update(f"{name}\0{status.st_size} {status.st_mtime_ns}\n".encode())
            except OSError:
                continue
        return digest.hexdigest()


def _outside(folder: Path) -> str:
    """A key of a folder that is not the archive's: names, sizes and times, since it may be anything."""
    digest = hashlib.sha256()
    count = 0
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(each for each in folders if each not in _BUILT and not each.startswith("."))
        for each in sorted(files):
            path = Path(place, each)
            try:
                status = path.stat()
            except OSError:
                continue
            digest.update(f"{path.relative_to(folder)}\0{status.st_size} {status.st_mtime_ns}\n".encode())
            count += 1
            if count > _FILE_COUNT_MAX:
                return digest.hexdigest()
    return digest.hexdigest()


def _decoded(content: bytes) -> str:
    """As pip decodes it; bytes that it would refuse are replaced, since only names matter here."""
    for mark, encoding in _BOMS:
        if content.startswith(mark):
            return content[len(mark) :].decode(_endian(mark, encoding), "replace")
    for line in content.split(b"\n")[:2]:
        coding = _CODING.match(line)
        if coding is not None:
            try:
                return content.decode(coding[1].decode("ascii"), "replace")
            except LookupError:
                break
    return content.decode("utf-8", "replace")


def _endian(mark: bytes, encoding: str) -> str:
    if encoding == "utf-8":
        return encoding
    return f"{encoding}-{'le' if mark[:1] == bytes([0xFF]) else 'be'}"


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, text) without comments; a line that ends with a backslash continues."""
    start, joined = 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        is_comment = line.lstrip().startswith("#")
        start = start or number
        if line.endswith("\\") and not is_comment:
            joined += line[:-1]
            continue
        stripped = _COMMENT.sub("", joined + (" " + line if is_comment and joined else line)).strip()
        if stripped:
            yield start, stripped
        start, joined = 0, ""
    if joined.strip():
        yield start, _COMMENT.sub("", joined).strip()


def _words(line: str) -> Iterator[str]:
    """Everything in a line that could be a path."""
    candidates = {line, re.split(r"\s+;|\s+--", line)[0]}
    candidates.update(re.split(r"\s+", line))
    for each in list(candidates):
        candidates.add(_OPTION.sub("", each, count=1))  # --find-links=wh
        if re.match(r"-[a-z](?=[^-\s])", each):
            candidates.add(each[2:])  # -fwh
        candidates.update(part for part in re.split(r"[@=]", each))
    for each in candidates:
        word = each.strip().strip("'\"").partition("#")[0]
        for path in (word, re.sub(r"\[[^\]]*\]$", "", word)):  # without extras
            if path.lower().startswith("file:"):
                yield unquote(urlsplit(path).path or path[5:])
            elif path and path not in {";", "-"}:
                yield path


def _is_pathlike(line: str) -> bool:
    """Whether the line seems to name something on disk, rather than a package or a URL."""
    words = [word for word in re.split(r"[\s=@]+", line) if word and "://" not in word]
    return any(
        word.startswith((".", "/", "~", "file:")) or word.lower().endswith(_ARCHIVE_SUFFIXES) for word in words
    ) or bool(_EDITABLE.match(line) and "://" not in line)
