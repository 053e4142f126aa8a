"""A text that a terminal would obey, and what is to be seen of it."""

from __future__ import annotations

HOSTILE = "\x1b[2J\x1b]0;title\x07 \r\b\x7f \x9b31m\x85 \u202eexe.\u2066\u2028 é ü 漢 \u200f"
SHOWN = r"\x1b[2J\x1b]0;title\x07 \x0d\x08\x7f \x9b31m\x85 \u202eexe.\u2066\u2028 é ü 漢 " + "\u200f"
