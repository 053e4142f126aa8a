"""The samples that an archive brings along: files that hold the body of a request it can answer.

sample_input.json            sent as application/json
sample_input_cat.jpg         as image/jpeg
sample_input2.txt            as text/plain
sample_input.bin             as application/octet-stream
warmup/long.json             the same endings, and .pt for what torch.save writes; of any name

All of them are run before a model is ready. A model that cannot answer one of the first kind is not served, or says
so; those in ``warmup/`` only warm it up.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

PATTERN = "sample_input*"
WARM_UP_FOLDER = "warmup"
CONTENT_TYPES = {
    ".json": "application/json",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".txt": "text/plain",
    ".bin": "application/octet-stream",
}
WARM_UP_TYPES = {**CONTENT_TYPES, ".pt": "application/octet-stream"}
SAMPLES_MAX = 16
WARM_UP_MAX = 64
# The folder of inputs that an int8 model is calibrated with, see `pyserve.backends.calibration`.
CALIBRATION_FOLDER = "calibration"
# A larger file is left out: it could not be sent either, by the default max_request_size.
SAMPLE_SIZE_MAX = 6_553_500


@dataclass(frozen=True)
class Sample:
    """The body of one request.

    Attributes:
        name: of its file.
        content_type: by the file's extension.
    """

    name: str
    body: bytes
    content_type: str


def archive_samples(model_dir: str | Path) -> list[Sample]:
    """The samples in an unpacked archive's folder by their names, at most 16; empty files and large ones are left out.

    Raises:
        nothing: a file that cannot be read is left out.
    """
    samples: list[Sample] = []
    for path in sorted(Path(model_dir).glob(PATTERN)):
        content_type = CONTENT_TYPES.get(path.suffix.lower())
        if content_type is None or len(samples) == SAMPLES_MAX:
            continue
        try:
            if path.is_file() and 0 < path.stat().st_size <= SAMPLE_SIZE_MAX:
                samples.append(Sample(path.name, path.read_bytes(), content_type))
        except OSError:
            continue
    return samples


def warm_up_samples(model_dir: str | Path) -> list[Sample]:
    """The files in ``warmup/`` of an unpacked archive's folder and in folders below it, by their names, each called
    ``warmup/NAME``; at most 64.

    What cannot be sent is left out, with a warning that names the file and what may stand there.

    Raises:
        nothing: a file that cannot be read is left out.
    """
    samples: list[Sample] = []
    folder = Path(model_dir) / WARM_UP_FOLDER
    try:
        paths = sorted(each for each in folder.rglob("*") if not each.is_dir())
    except OSError:
        return samples  # most archives have none
    for path in paths:
        name = f"{WARM_UP_FOLDER}/{path.relative_to(folder).as_posix()}"
        if len(samples) == WARM_UP_MAX:
            log.warning("%s and those after it are left out: at most %d files warm a model up", name, WARM_UP_MAX)
            break
        try:
            reason = _unfit(path)
            if not reason:
                samples.append(Sample(name, path.read_bytes(), WARM_UP_TYPES[path.suffix.lower()]))
                continue
        except OSError as error:
            reason = f"it cannot be read: {error.strerror or error}"
        log.warning("%s does not warm the model up: %s", name, reason)
    return samples


def _unfit(path: Path) -> str:
    """Why a file cannot be sent as the body of a request; ``""`` if it can."""
    if path.suffix.lower() not in WARM_UP_TYPES:
        return f"its name has to end in one of {', '.join(WARM_UP_TYPES)}"
    if not path.is_file():
        return "it is not a file"
    size = path.stat().st_size
    if not 0 < size <= SAMPLE_SIZE_MAX:
        return f"it has {size} bytes; 1 to {SAMPLE_SIZE_MAX} can be sent"
    return ""
