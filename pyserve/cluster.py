"""Engines on Ray Serve: many models in each replica, behind the HTTP API of pyserve.

# app.yaml, for `serve deploy app.yaml` and for KubeRay
applications:
  - name: pyserve
    import_path: pyserve.cluster:app
    args: {models: [/models/densenet.mar], num_cpus: 8, replicas: 1..8, target_wait_ms: 50}

serve.run(pyserve.cluster.app({"models": ["densenet.mar"]}))       # from Python
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyserve.replicas.arguments import Arguments
from pyserve.replicas.deployment import deployment

__all__ = ["app"]


def app(args: Mapping[str, Any]) -> Any:
    """An application of Ray Serve.

    Args:
        args: ``models``, and what there is else: ``workers`` of each model, ``config`` with keys of config.properties,
            ``num_cpus`` of a replica (1), ``replicas`` (``3``, or ``1..8`` to scale by load), ``target_wait_ms`` (50),
            ``name`` of the deployment.

    Raises:
        ConfigError: names the argument, or what has to be installed.
    """
    return deployment(Arguments.of(args))
