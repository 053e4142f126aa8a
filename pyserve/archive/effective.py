"""From what an archive lists to the files that it means: of several entries of one name the last, and links followed.

A link is never made on disk. An entry that is one gets the bytes of what it leads to, under its own name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pyserve.archive.entries import LIMITS, Entry, Limits, check_entries, refuse
from pyserve.errors import shown

_LINKS_MAX = 16  # that lead to each other


def effective_entries(
    label: str, entries: Sequence[Entry], limits: Limits = LIMITS
) -> tuple[list[Entry], list[str]]:  # fmt: skip
    """The files and folders that ``entries`` mean, and texts about what is odd. Writes nothing.

    Raises:
        InvalidModelError: `check_entries` refuses them; or links lead in a circle, or to a folder with further links.
    """
    check_entries(label, entries, limits)
    warnings: list[str] = []
    last: dict[str, Entry] = {}
    for entry in entries:
        before = last.get(entry.name)
        if before is not None and not entry.is_folder:
            if entry.offset < before.offset:  # a reader from the front would take the other
                refuse(label, f"entry {shown(entry.name)} is there twice; keep one and pack again")
            warnings.append(f"{label}: entry {shown(entry.name)} is there twice; the last one counts")
        last[entry.name] = entry
    if not any(entry.link for entry in last.values()):
        return list(last.values()), warnings
    found: dict[str, Entry] = {}
    for entry in last.values():
        if not entry.link:
            found.setdefault(entry.name, entry)
            continue
        followed = list(_followed(label, entry, last))
        if not followed:
            warnings.append(f"{label}: entry {shown(entry.name)} is a link to nothing in the archive; it is left out")
        for each in followed:
            found.setdefault(each.name, each)
        if len(found) > limits.entry_count_max:
            break  # which is refused below
    # What came of links is judged like what lies in the archive.
    check_entries(label, list(found.values()), limits)
    return list(found.values()), warnings


def _followed(label: str, entry: Entry, entries: dict[str, Entry]) -> Iterator[Entry]:
    """What stands for the link ``entry``: one file, a folder and all below it, or nothing."""
    target = entry
    for _ in range(_LINKS_MAX):
        following = entries.get(target.link)
        if following is None or not following.link:
            break
        target = following
    else:
        refuse(label, f"entry {shown(entry.name)} leads through more than {_LINKS_MAX} links; pack the file itself")
    name = target.link
    file = entries.get(name)
    if file is not None and not file.is_folder:
        yield replace(file, name=entry.name, link=name)
        return
    if f"{entry.name}/".startswith(f"{name}/"):
        refuse(label, f"entry {shown(entry.name)} is a link to a folder that it lies in; take it out and pack again")
    below = [each for each in entries.values() if each.name.startswith(f"{name}/")]
    if file is not None or below:
        yield Entry(entry.name, 0, 0, is_folder=True)
    for each in below:
        if each.link:
            refuse(label, f"entry {shown(entry.name)} is a link to a folder with further links in it, such as "
                   f"{shown(each.name)}; pack the files themselves")  # fmt: skip
        yield replace(each, name=entry.name + each.name[len(name) :], link="" if each.is_folder else each.name)
