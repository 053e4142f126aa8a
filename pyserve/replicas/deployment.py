"""The deployment of Ray Serve whose replicas are engines."""

from __future__ import annotations

from typing import Any

from pyserve.errors import ConfigError
from pyserve.replicas.arguments import Arguments
from pyserve.replicas.clustered import ClusterReplica
from pyserve.replicas.policy import WaitPolicy

FIX = 'pip install "ray[serve]>=2.60"'
# An engine admits by its own queues, and says 503 itself: Ray is not to hold requests back before it.
ONGOING_MAX = 10_000
HEALTH_PERIOD_S = 5.0
HEALTH_TIMEOUT_S = 15.0
# Beyond what an engine takes to answer what it has accepted; Ray kills a replica after it.
END_MARGIN_S = 10.0
# How often a replica tells its load, and of how long the mean counts: more replicas are to be decided on in 15 s.
METRICS_INTERVAL_S = 2.0
LOOK_BACK_S = 3.0


def deployment(arguments: Arguments) -> Any:
    """An application of Ray Serve, bound to ``arguments``.

    Raises:
        ConfigError: ray is missing, or too old.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"Ray Serve cannot be imported ({error}); {FIX}") from None
    try:
        replica = serve.ingress()(ClusterReplica)
    except TypeError:
        raise ConfigError(f"this version of Ray Serve is too old; {FIX}") from None
    return serve.deployment(**options(arguments))(replica).bind(
        list(arguments.models), dict(arguments.config), arguments.num_cpus, base=arguments.base,
        direct_port=arguments.direct_port, gpus=arguments.num_gpus,
    )  # fmt: skip


def options(arguments: Arguments) -> dict[str, Any]:
    """What ``serve.deployment`` is called with."""
    actor = {"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus, "resources": dict(arguments.resources)}
    found: dict[str, Any] = {
        "name": arguments.name,
        "ray_actor_options": {key: value for key, value in actor.items() if value},
        "max_ongoing_requests": ONGOING_MAX,
        "health_check_period_s": HEALTH_PERIOD_S,
        "health_check_timeout_s": HEALTH_TIMEOUT_S,
        "graceful_shutdown_timeout_s": arguments.drain_timeout_s + END_MARGIN_S,
    }
    if arguments.replicas_per_node is not None:
        found["max_replicas_per_node"] = arguments.replicas_per_node
    if arguments.replicas_min == arguments.replicas_max:
        found["num_replicas"] = arguments.replicas_min
    else:
        found["autoscaling_config"] = autoscaling(arguments)
    return found


def autoscaling(arguments: Arguments) -> dict[str, Any]:
    """How many replicas: `WaitPolicy` decides, and waits before it does, so that Ray is not to wait once more."""
    return {
        "min_replicas": arguments.replicas_min,
        "max_replicas": arguments.replicas_max,
        "initial_replicas": max(1, arguments.replicas_min),
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "metrics_interval_s": METRICS_INTERVAL_S,
        "look_back_period_s": LOOK_BACK_S,
        "policy": {
            "policy_function": f"{WaitPolicy.__module__}:{WaitPolicy.__name__}",
            "policy_kwargs": {
                "target_wait_s": arguments.target_wait_ms / 1000,
                "upscale_delay_s": arguments.upscale_delay_s,
                "downscale_delay_s": arguments.downscale_delay_s,
                "to_zero_delay_s": arguments.downscale_to_zero_delay_s,
            },
        },
    }
