"""Ids of requests: those that are made here, and what a client may send as one."""

from __future__ import annotations

import os
import re

_ID_BATCH_SIZE = 16 * 256


class IdSource:
    """Random UUID4 texts, in batches, since one system call each would cost more than all the rest of them."""

    def __init__(self) -> None:
        self._hex = ""
        self._next = 0
        # A forked child must not repeat its parent's ids.
        os.register_at_fork(after_in_child=self._forget)

    def __call__(self) -> str:
        start = self._next
        if start >= len(self._hex):
            self._hex = os.urandom(_ID_BATCH_SIZE).hex()
            start = 0
        self._next = start + 32
        digits = self._hex[start : start + 32]
        variant = "89ab"[int(digits[16], 16) & 3]
        return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"

    def _forget(self) -> None:
        self._next = len(self._hex)


new_id = IdSource()
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
