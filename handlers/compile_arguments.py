"""What ``pt2`` in model-config.yaml asks for: its forms, checked. Needs no torch.

pt2: inductor                                           a backend alone
pt2: {backend: inductor, mode: reduce-overhead}         arguments of torch.compile
pt2: {compile: {enable: true, backend: inductor, ...}}  the same, with a switch
pt2: {export: {aot_compile: true}}                      the weights are compiled already; nothing to do
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pyserve.handler import ModelLoadError

_ARGUMENTS = ("backend", "mode", "fullgraph", "dynamic", "options", "disable")
_FORMS = "write e.g. 'pt2: {compile: {enable: true, backend: inductor}}'"


def compile_arguments(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of torch.compile that ``pt2`` in ``config`` asks for; None if it asks for no compilation.

    Raises:
        ModelLoadError: it is of no known form, or has an argument that torch.compile does not know.
    """
    entry = config.get("pt2")
    if entry is None or entry is False or entry == {}:
        return None
    if isinstance(entry, str):
        return {"backend": entry}
    if not isinstance(entry, Mapping):
        raise ModelLoadError(f"'pt2' in model-config.yaml is {entry!r}, not a backend or a mapping; {_FORMS}")
    if "compile" in entry or "export" in entry:
        return _from_section(entry.get("compile"))
    return _checked(entry)


def _from_section(section: Any) -> dict[str, Any] | None:
    if section is None or section is False:
        return None
    if section is True:
        return {}
    if not isinstance(section, Mapping):
        raise ModelLoadError(f"'pt2.compile' in model-config.yaml is {section!r}, not a mapping; {_FORMS}")
    enable = section.get("enable", False)
    if not isinstance(enable, bool):
        raise ModelLoadError(f"'pt2.compile.enable' in model-config.yaml is {enable!r}; write true or false")
    arguments = _checked({name: value for name, value in section.items() if name != "enable"})
    return arguments if enable else None


def _checked(arguments: Mapping[Any, Any]) -> dict[str, Any]:
    for name in arguments:
        if name not in _ARGUMENTS:
            nearest = difflib.get_close_matches(str(name), _ARGUMENTS, n=1)
            fix = f", did you mean {nearest[0]!r}?" if nearest else "."
            raise ModelLoadError(
                f"'pt2' in model-config.yaml has {name!r}, which torch.compile does not know{fix} "
                f"It takes {', '.join(_ARGUMENTS)}."
            )
    return dict(arguments)
