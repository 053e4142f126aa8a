"""The manual page ``pyserve(1)``, from the parsers and the texts of docs/descriptions/commands.yaml."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

from pyserve import __version__
from pyserve.commands.completion import help_text

_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")
_CODE = re.compile(r"`([^`]+)`")


def man_page(texts: Mapping[str, str], parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """The page, in roff.

    Args:
        texts: name of a command, such as ``pyserve start`` -> what it is for, in Markdown.
        parsers: the same names -> its parser.
    """
    lines = [
        '.\\" Written by docs/generate.py; change docs/descriptions/commands.yaml or the code, and run it again.',
        f'.TH PYSERVE 1 "" "pyserve {__version__}" "User Commands"',
        ".SH NAME", "pyserve \\- serve PyTorch models over HTTP and gRPC",
        ".SH SYNOPSIS", ".B pyserve", ".I COMMAND", "[arguments]", ".br", ".B pyserve", ".I COMMAND", ".B \\-\\-help",
        ".SH EXIT STATUS",
        "0 on success, 1 on an error (one line on standard error), 2 on wrong usage and 130 when interrupted.",
        ".SH COMMANDS",
    ]  # fmt: skip
    for name, text in texts.items():
        lines += [f".SS {_escaped(name)}", _prose(text)]
        for action in parsers[name]._actions:
            if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
                lines += [".TP", _argument(action), _prose(help_text(action)) or "\\&"]
    lines += [
        ".SH FILES",
        ".TP", ".I config.properties", "Settings of a server; \\fBpyserve config\\fR shows where each comes from.",
        ".TP", ".I logs/", "Logs, or the folder that \\fBLOG_LOCATION\\fR names.",
        ".TP", ".I ~/.cache/pyserve", "Unpacked archives, or the folder that \\fBPYSERVE_CACHE\\fR names.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _argument(action: argparse.Action) -> str:
    """``\\fB--flag\\fR \\fIVALUE\\fR``, with all names of a flag."""
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if not action.option_strings:
        return f"\\fI{_escaped(value if isinstance(action.metavar, str) else action.dest)}\\fR"
    names = ", ".join(f"\\fB{_escaped(name)}\\fR" for name in action.option_strings)
    return names if action.nargs == 0 else f"{names} \\fI{_escaped(value)}\\fR"


def _prose(text: str) -> str:
    """Markdown of one paragraph in roff."""
    plain = _LINK.sub(r"\1", " ".join(text.split()))
    parts = _CODE.split(plain)  # every other one is code
    roff = "".join(f"\\fB{_escaped(part)}\\fR" if number % 2 else _escaped(part) for number, part in enumerate(parts))
    return f"\\&{roff}" if roff[:1] in (".", "'") else roff


def _escaped(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-")
