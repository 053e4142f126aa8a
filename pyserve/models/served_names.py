"""What a model is called that is served from an archive."""

from __future__ import annotations

import bisect
import difflib
import heapq
from collections.abc import Iterable, Sequence

from pyserve.archive.archive import Archive
from pyserve.archive.entries import MANIFEST_NAME
from pyserve.archive.manifest import check_served_name, missing_manifest, name_of_file
from pyserve.errors import InvalidModelError, JsonObject, VersionNotFoundError

NAMES_SHOWN_MAX = 5
# How alike two names are takes time with the square of their sizes, and anybody may ask for any name at any rate.
COMPARED_MAX = 100
COMPARED_SIZE_MAX = 64
CLOSELY_COMPARED_MAX = 5


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
    near = near_name(name, names)
    return {"fix": f"did you mean {near}?" if near else shown_names(names)}


def no_such_version(text: str, versions: Iterable[str]) -> VersionNotFoundError:
    """The error that a model has no such version; tells those that it has."""
    return VersionNotFoundError(text, detail={"fix": f"its versions are {_first_of(sorted(versions))}"})


def near_name(name: str, names: Sequence[str]) -> str:
    """The one of the sorted ``names`` that ``name`` most likely means; ``""`` if none is like it.

    Of thousands only those are compared that begin alike, closely only the few that have the most letters in common,
    and long ones not at all: comparing all would hold the others up.
    """
    if len(name) > COMPARED_SIZE_MAX:
        return ""
    if len(names) > COMPARED_MAX:
        at = bisect.bisect_left(names, name)
        names = names[max(0, at - COMPARED_MAX // 2) : at + COMPARED_MAX // 2]
    by_lower = {each.lower(): each for each in names if len(each) <= COMPARED_SIZE_MAX}
    matcher: difflib.SequenceMatcher[str] = difflib.SequenceMatcher()
    matcher.set_seq2(name.lower())

    def letters_in_common(other: str) -> float:
        matcher.set_seq1(other)
        return matcher.quick_ratio()

    closest = heapq.nlargest(CLOSELY_COMPARED_MAX, by_lower, key=letters_in_common)
    near = difflib.get_close_matches(name.lower(), closest, n=1)
    return by_lower[near[0]] if near else ""


def shown_names(names: Sequence[str]) -> str:
    """Which models there are, in a few words."""
    if not names:
        return "no model is served; register one with POST /models?url= of the management API"
    return f"the models here are {_first_of(names)}"


def _first_of(names: Sequence[str]) -> str:
    more = f", and {len(names) - NAMES_SHOWN_MAX} more" if len(names) > NAMES_SHOWN_MAX else ""
    return ", ".join(names[:NAMES_SHOWN_MAX]) + more


def without_manifest(archive: Archive) -> InvalidModelError:
    """Of an archive that cannot be served, because nothing says what it is."""
    return InvalidModelError(f"{missing_manifest(archive.name).message}, or give model_name= and handler=")
