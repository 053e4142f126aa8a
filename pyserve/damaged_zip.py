"""What a zip file that is damaged is known by: torch's files are zip files, and archives too."""

from __future__ import annotations

import struct
import zipfile
import zlib

# What opening one, or reading a member, raises if it is damaged, encrypted, or packed in a way that is not known; the
# last two for a method or a version that zipfile does not have (NotImplementedError) and for names that are no text.
DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, OverflowError, RuntimeError, ValueError)
