"""Names between single backticks in docstrings become links to what they name, where that has a page.

A name is looked up as Python would: in the object whose docstring it is, then in the class or module around it.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAME = re.compile(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)")


class DocstringLinks(griffe.Extension):
    """Loaded by mkdocs.yml."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = _NAME.sub(lambda match: _link(obj, match[1]), obj.docstring.value)


def _link(scope: griffe.Object, name: str) -> str:
    """Optional: a name without a page, or of another project, stays what it was."""
    return f'<autoref optional identifier="{_path(scope, name)}"><code>{name}</code></autoref>'


def _path(scope: griffe.Object, name: str) -> str:
    first, dot, rest = name.partition(".")
    try:
        return scope.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        return name
