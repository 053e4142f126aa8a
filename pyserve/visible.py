"""Control characters of texts from outside, made visible: a terminal obeys them.

An exception's text, a path or the name of a file in an archive may move the cursor over what stands there, change its
colours, answer for the keyboard, or turn the order of letters around.
"""

from __future__ import annotations

# C0 and C1 but for the newline and the tab, DEL, what turns the order of letters around, and further ends of lines.
_CODES = (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029)
ESCAPES = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _CODES if chr(code) not in "\n\t"}


def visible(text: str) -> str:
    r"""``text`` with each control character as ``\x1b`` or ``\u202e``; newlines and tabs are kept."""
    return text if text.isprintable() else text.translate(ESCAPES)
