"""The limits of archives: what an operator may set, and where it is kept for all processes of a server.

By default the disk decides how much may be unpacked. A ratio says that a file is a bomb only where it would be large:
weights of zeros deflate a thousandfold, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pyserve.config.config import Config
from pyserve.config.keys import KINDS, OWN_VARIABLES
from pyserve.errors import ConfigError

# Field of `Limits` -> key of config.properties.
KEYS = {
    "entry_count_max": "archive_entry_count_max",
    "unpacked_size_max": "archive_unpacked_size_max",
    "entry_size_max": "archive_entry_size_max",
    "ratio_max": "archive_ratio_max",
    "ratio_free_size": "archive_ratio_free_size",
}


@dataclass(frozen=True)
class Limits:
    """Bounds of one archive; sizes in bytes.

    Attributes:
        unpacked_size_max: what is written to disk, weights that are mapped from the archive not among it; None for
            what the disk has room for.
        entry_size_max: one file, whether it is unpacked or mapped; None for no limit of its own.
        ratio_max: unpacked : packed, judged only above ``ratio_free_size``.
        room: bytes that the disk has room for, where something is to be unpacked.
        name_size_max: UTF-8 bytes of a whole name.
        part_size_max: UTF-8 bytes between two slashes; what Linux file systems take.
    """

    entry_count_max: int = 100_000
    unpacked_size_max: int | None = None
    entry_size_max: int | None = None
    ratio_max: int = 200
    ratio_free_size: int = 4 << 30
    room: int | None = None
    name_size_max: int = 1024
    part_size_max: int = 255
    depth_max: int = 32
    manifest_size_max: int = 16 << 20
    config_size_max: int = 16 << 20

    @property
    def directory_size_max(self) -> int:
        """A zip's central directory, or all of a tar's long-name records."""
        return max(64 << 20, 256 * self.entry_count_max)


LIMITS = Limits()


def configured_limits(environ: Mapping[str, str] | None = None) -> Limits:
    """The limits that `use_limits` or the operator put into the environment.

    Raises:
        ConfigError: a variable's value is none.
    """
    environ = os.environ if environ is None else environ
    found: dict[str, int] = {}
    for field, key in KEYS.items():
        text = environ.get(OWN_VARIABLES[key], "").strip()
        if text:
            try:
                found[field] = KINDS[key].parse(text)
            except ValueError:
                raise ConfigError(f"${OWN_VARIABLES[key]}: allowed: {KINDS[key].allowed}") from None
    return Limits(**found)


def use_limits(config: Config) -> None:
    """Has this process, and those that it starts from now on, open archives within the limits of ``config``."""
    for key in KEYS.values():
        value, variable = getattr(config, key), OWN_VARIABLES[key]
        if value is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = str(value)
