"""The names that a misspelt one may have meant, as the end of a sentence."""

from __future__ import annotations

from collections.abc import Iterable

from pyserve.config.keys import ACCEPTED_KEYS, FLAG_ONLY, KINDS, MODEL_KEYS


def nearest_of_file(name: str) -> str:
    """Of a key in config.properties, which may be one of model-config.yaml."""
    near = _near(name, {*ACCEPTED_KEYS, *KINDS, *MODEL_KEYS} - FLAG_ONLY)
    if near not in MODEL_KEYS:
        return f"; did you mean {near!r}?" if near else ""
    meant = f"did you mean {near!r}? It" if near != name else "it"
    return f"; {meant} is a setting of each model: {MODEL_KEYS[near]} in its model-config.yaml, or in 'models'"


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'job_queue_size'?``, or ``""``."""
    near = _near(name, known)
    return f"; did you mean {near!r}?" if near else ""


def _near(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, n=1, cutoff=0.6)
    return near[0] if near else ""
