"""What ``args`` of a Serve config may say of a deployment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pyserve.config.config import Config
from pyserve.errors import ConfigError


@dataclass(frozen=True)
class Arguments:
    """What ``args`` of a Serve config says.

    Attributes:
        models: paths that each node has, or URLs.
        config: keys of config.properties for every replica.
        num_cpus: of a replica, also its engine's ``cpu_budget``.
        num_gpus: of a replica; it sees no others. A part of one, such as 0.5, shares it with another replica.
        resources: others that nodes were given names for, of a replica.
        replicas_per_node: at most, on one node; None for as many as there is room for.
        replicas_min, replicas_max: bounds; equal for a fixed number.
        target_wait_ms: with a range: how long a request may wait for a worker before there are more replicas.
        upscale_delay_s, downscale_delay_s: for how long more, or fewer, have to be wanted.
        downscale_to_zero_delay_s: for how long nothing may have arrived before the last replica goes.
        direct_port: of each replica's own listener, 0 for none; see `pyserve.replicas.direct`.
        name: of the deployment.
        base: of an application that a command starts, which tells the control what to serve; ``""`` of others.
    """

    models: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    num_cpus: int = 1
    num_gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    replicas_per_node: int | None = None
    replicas_min: int = 1
    replicas_max: int = 1
    target_wait_ms: float = 50.0
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 60.0
    downscale_to_zero_delay_s: float = 300.0
    direct_port: int = 0
    name: str = "pyserve"
    base: str = ""

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Arguments:
        """Raises ConfigError for what is none of them; names it."""
        for key in args:
            if key not in _KNOWN:
                raise ConfigError(f"args: unknown argument {key!r}; there are {', '.join(_KNOWN)}")
        models = args.get("models", ())
        models = (models,) if isinstance(models, str) else tuple(models)
        if not models or not all(isinstance(each, str) for each in models):
            raise ConfigError("args: models must be a list of paths or URLs, such as [/models/a.mar]")
        config = dict(args.get("config") or {})
        if "workers" in args:
            config["default_workers_per_model"] = _whole(args, "workers", 1)
        if config.get("enable_model_api") and not (
            config.get("token_file") or config.get("disable_token_authorization")
        ):
            raise ConfigError(
                "args: with enable_model_api whoever reaches a replica can manage the cluster; give config a "
                "token_file that is the same on every node, or disable_token_authorization"
            )
        low, high = _range(args.get("replicas", 1))
        found = cls(
            models=models, config=config, num_cpus=_whole(args, "num_cpus", 1), num_gpus=_gpus(args),
            resources=_resources(args), replicas_min=low, replicas_max=high,
            replicas_per_node=_whole(args, "replicas_per_node", 1) if "replicas_per_node" in args else None,
            target_wait_ms=_number(args, "target_wait_ms", 50.0, above=True),
            upscale_delay_s=_number(args, "upscale_delay_s", 5.0),
            downscale_delay_s=_number(args, "downscale_delay_s", 60.0),
            downscale_to_zero_delay_s=_number(args, "downscale_to_zero_delay_s", 300.0),
            direct_port=_whole(args, "direct_port", 1) if "direct_port" in args else 0,
            name=str(args.get("name", "pyserve")),
        )  # fmt: skip
        found._check_direct_port()
        return found

    @property
    def needs(self) -> dict[str, float]:
        """Of a replica, by Ray's names, without what it needs none of."""
        found = {"CPU": float(self.num_cpus), "GPU": self.num_gpus, **self.resources}
        return {resource: amount for resource, amount in found.items() if amount}

    @property
    def drain_timeout_s(self) -> int:
        """Of its engine."""
        given = str(self.config.get("drain_timeout_s", ""))
        return int(given) if given.isdecimal() else Config.drain_timeout_s

    def _check_direct_port(self) -> None:
        if not self.direct_port:
            return
        if self.direct_port > 65_535:
            raise ConfigError(f"args: direct_port is {self.direct_port}; the highest port is 65535")
        has_keys = "token_file" in self.config
        if not has_keys and str(self.config.get("disable_token_authorization", "")).lower() != "true":
            raise ConfigError(
                "args: direct_port listens on all interfaces, and config has no token_file: give the same file on "
                "every node, or disable_token_authorization: true if everybody who reaches the nodes may predict"
            )


_KNOWN = (
    "models", "workers", "config", "num_cpus", "num_gpus", "resources", "replicas_per_node", "replicas",
    "target_wait_ms", "upscale_delay_s", "downscale_delay_s", "downscale_to_zero_delay_s", "direct_port", "name",
)  # fmt: skip


def _whole(args: Mapping[str, Any], key: str, default: int) -> int:
    value = args.get(key, default)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"args: {key} is {value!r}; it must be a whole number from 1 on")
    return value


def _number(args: Mapping[str, Any], key: str, default: float, *, above: bool = False) -> float:
    value = args.get(key, default)
    if not _is_amount(value) or (above and not value):
        raise ConfigError(f"args: {key} is {value!r}; it must be a number {'above' if above else 'from'} 0{_on(above)}")
    return float(value)


def _on(above: bool) -> str:
    return "" if above else " on"


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _gpus(args: Mapping[str, Any]) -> float:
    found = _number(args, "num_gpus", 0.0)
    if found > 1 and not found.is_integer():
        raise ConfigError(f"args: num_gpus is {found}; above 1 it must be a whole number")
    return found


def _resources(args: Mapping[str, Any]) -> dict[str, float]:
    found = args.get("resources") or {}
    if not isinstance(found, Mapping) or not all(isinstance(key, str) and _is_amount(found[key]) for key in found):
        raise ConfigError(f"args: resources is {found!r}; write names and amounts, such as {{fast_disk: 1}}")
    for key, argument in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        if key in found:
            raise ConfigError(f"args: resources has {key}; give {argument}")
    return {key: float(amount) for key, amount in found.items()}


def _range(value: Any) -> tuple[int, int]:
    """``3``, ``"1..8"``, ``"0..8"`` or ``{"min": 1, "max": 8}``."""
    found = value
    if isinstance(value, str):
        low, dots, high = value.partition("..")
        found = {"min": low, "max": high if dots else low}
    elif not isinstance(value, Mapping):
        found = {"min": value, "max": value}
    try:
        bounds = int(found["min"]), int(found["max"])
    except (KeyError, TypeError, ValueError):
        bounds = (0, 0)
    if not 0 <= bounds[0] <= bounds[1] or not bounds[1]:
        raise ConfigError(
            f"args: replicas is {value!r}; write 3, 1..8, or {{min: 1, max: 8}}; 0..8 leaves none where nothing arrives"
        )
    return bounds
