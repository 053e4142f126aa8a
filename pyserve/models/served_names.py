"""What a model is called that is served from an archive."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pyserve.archive.archive import Archive
from pyserve.archive.entries import MANIFEST_NAME
from pyserve.archive.manifest import NAME_SIZE_MAX, check_served_name, missing_manifest, name_of_file
from pyserve.errors import InvalidModelError, JsonObject

NAMES_SHOWN_MAX = 5


def served_name(archive: Archive, given: str | None, *, is_named_by_file: bool) -> str:
    """What a model is to be called.

    Raises:
        InvalidModelError: nothing says so, or it cannot be used.
    """
    name = given or archive.manifest.model_name or (name_of_file(archive.name) if is_named_by_file else "")
    if not name and archive.manifest.raw is None:
        raise without_manifest(archive)
    if not name:
        raise InvalidModelError(
            f"{archive.name}: {MANIFEST_NAME} has no model.modelName; give model_name=, or pack again"
        )
    return check_served_name(name, archive.name)


def what_was_meant(name: str, served: Iterable[str]) -> JsonObject:
    """The ``detail`` of an answer that there is no model ``name``: the nearest one, or those that there are."""
    names = sorted(served)
    near = difflib.get_close_matches(name, names, n=1) if len(name) <= NAME_SIZE_MAX else []
    if near:
        return {"fix": f"did you mean {near[0]}?"}
    if not names:
        return {"fix": "no model is served; register one with POST /models?url= of the management API"}
    more = f", and {len(names) - NAMES_SHOWN_MAX} more" if len(names) > NAMES_SHOWN_MAX else ""
    return {"fix": f"the models here are {', '.join(names[:NAMES_SHOWN_MAX])}{more}"}


def without_manifest(archive: Archive) -> InvalidModelError:
    """Of an archive that cannot be served, because nothing says what it is."""
    return InvalidModelError(f"{missing_manifest(archive.name).message}, or give model_name= and handler=")
