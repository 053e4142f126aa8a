"""Settings from environment variables: TorchServe's ``TS_*`` and our own ``PYSERVE_*``. Empty ones are not set."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping

from pyserve.config.keys import ALWAYS_READ, OWN_VARIABLES, VARIABLES

# Ours too, but no settings; and what Kubernetes tells every container about a service called "pyserve".
_OTHERS = frozenset({"PYSERVE_CACHE", "PYSERVE_WEIGHTS_CACHE", "PYSERVE_SERVER", "PYSERVE_SUPERVISOR"})
_NEAR = 0.85


def settings_of(environ: Mapping[str, str], switches: Container[str]) -> Iterator[tuple[str, str, str]]:
    """(key, text, variable) of every variable that counts, the weaker first.

    Args:
        switches: those of ``enable_envvars_config`` and ``use_env_allowed_urls`` that are on.
    """
    for key, variable in VARIABLES.items():
        is_read = key in ALWAYS_READ or "enable_envvars_config" in switches
        if key == "allowed_urls":
            is_read = is_read and "use_env_allowed_urls" in switches
        if is_read and environ.get(variable):
            yield key, environ[variable], variable
    for key, variable in OWN_VARIABLES.items():
        if environ.get(variable):
            yield key, environ[variable], variable


def misspelt(environ: Mapping[str, str]) -> Iterator[str]:
    """A line for each variable that is nearly one of ours."""
    from difflib import get_close_matches

    known = set(OWN_VARIABLES.values())
    for name in sorted(environ):
        if name.startswith("PYSERVE_") and name not in known | _OTHERS:
            near = get_close_matches(name, known, n=1, cutoff=_NEAR)
            if near:
                yield f"the environment variable {name} is not known; did you mean {near[0]}?"
