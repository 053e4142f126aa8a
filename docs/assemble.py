"""Gathers the sources of the site: docs/, and the documents that lie elsewhere in the repository, each once.

The documents keep their links as they are right in the repository. In the site a page may lie somewhere else, so links
are rewritten; a link to a file that is no page, such as a source file, becomes its text.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Document of the repository -> page of the site.
ELSEWHERE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "DEVIATIONS.md": "deviations.md",
    "SECURITY.md": "reporting-vulnerabilities.md",
    "bench/README.md": "measuring.md",
}
_CODE_BLOCK = re.compile(r"^( *)(```|~~~).*?^\1\2\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[([^\]\[]*(?:\[[^\]]*\][^\]\[]*)*)\]\(([^()\s]+)\)")


class BrokenLinkError(Exception):
    """A link leads to nothing in the repository."""


def documents(root: Path = ROOT) -> dict[str, str]:
    """Document of the repository -> page of the site, of those that exist."""
    pages = {name: page for name, page in ELSEWHERE.items() if (root / name).is_file()}
    for path in sorted((root / "examples").glob("*/README.md")):
        pages[str(path.relative_to(root))] = f"examples/{path.parent.name}.md"
    return pages | {
        str(path.relative_to(root)): str(path.relative_to(root / "docs"))
        for path in sorted((root / "docs").rglob("*.md"))
    }


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """``text`` with ``change`` applied to what stands between its code blocks."""
    parts, end = [], 0
    for block in _CODE_BLOCK.finditer(text):
        parts += [change(text[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(text[end:])])


def local_links(text: str) -> list[str]:
    """Targets of the links to files and headings, outside of code."""
    found: list[str] = []

    def note(prose: str) -> str:
        found.extend(match[2] for match in _LINK.finditer(re.sub(r"`[^`\n]*`", "", prose)))
        return prose

    outside_code(text, note)
    return [each for each in found if not re.match(r"[a-z]+:", each)]


def target_of(link: str, document: str) -> str:
    """The file that a link in ``document`` leads to, as a path from the root of the repository."""
    path = link.partition("#")[0]
    return os.path.normpath(os.path.join(os.path.dirname(document), path)) if path else document


def rewritten(text: str, document: str, pages: dict[str, str], root: Path = ROOT) -> str:
    """The page of a document: its links lead to pages.

    Raises:
        BrokenLinkError: a link leads to no file.
    """
    own_folder = os.path.dirname(pages[document])

    def new_link(match: re.Match[str]) -> str:
        label, link = match[1], match[2]
        if re.match(r"[a-z]+:", link) or link.startswith("#"):
            return match[0]
        target = target_of(link, document)
        if target.startswith(".."):  # a page of the host of the repository, such as its security advisories
            return label
        if not (root / target).exists():
            raise BrokenLinkError(f"{document}: {link} leads to no file")
        if target not in pages:
            return label
        _, mark, heading = link.partition("#")
        return f"[{label}]({os.path.relpath(pages[target], own_folder or '.')}{mark}{heading})"

    return outside_code(text, lambda prose: _LINK.sub(new_link, prose))


def assemble(folder: Path, root: Path = ROOT) -> None:
    """Writes the site's sources to ``folder``, anew; pictures lie beside their documents in both."""
    pages = documents(root)
    shutil.rmtree(folder, ignore_errors=True)
    for document, page in pages.items():
        path = folder / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rewritten((root / document).read_text(), document, pages, root))
    for picture in sorted((root / "docs").rglob("*.png")):
        path = folder / picture.relative_to(root / "docs")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, path)
