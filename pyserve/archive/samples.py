"""The samples that an archive brings along: extra files that hold the body of a request it can answer.

sample_input.json            sent as application/json
sample_input_cat.jpg         as image/jpeg
sample_input2.txt            as text/plain
sample_input.bin             as application/octet-stream
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PATTERN = "sample_input*"
CONTENT_TYPES = {
    ".json": "application/json",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".txt": "text/plain",
    ".bin": "application/octet-stream",
}
SAMPLES_MAX = 16
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
