"""Whether what is asked for fits a cluster, told before anything is begun."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pyserve.errors import ConfigError

# Parts of a GPU are no binary fractions: ten of a tenth are to fit one.
_SLACK = 1e-6
# How Ray calls it, how people do, and the flag.
_WORDS = {"CPU": ("CPUs", "--num-cpus"), "GPU": ("GPUs", "--num-gpus")}


@dataclass(frozen=True)
class Node:
    """A machine of the cluster.

    Attributes:
        name: that people know.
        cpus: that it gives to the cluster.
        memory: bytes that it does; 0 if that is not known.
        others: what else it gives, by Ray's names: ``GPU``, and those that it was started with.
    """

    name: str
    cpus: float
    memory: int = 0
    others: Mapping[str, float] = field(default_factory=dict)

    def amount(self, resource: str) -> float:
        return self.cpus if resource == "CPU" else self.others.get(resource, 0.0)

    def room(self, needs: Mapping[str, float]) -> int:
        """Replicas that it has room for while nothing else runs."""
        return min(math.floor(self.amount(each) / amount + _SLACK) for each, amount in needs.items() if amount)


def check_fits(
    nodes: Sequence[Node], free: Mapping[str, float], *, needs: Mapping[str, float], replicas: int, size: int,
    per_node: int | None = None,
) -> None:  # fmt: skip
    """Whether the least number of replicas has room.

    Args:
        free: of all nodes, that nobody has, by Ray's names.
        needs: of each replica, by Ray's names, ``CPU`` among them.
        replicas: how many.
        size: of all archives, in bytes.
        per_node: the most of a node; None for as many as there is room for.

    Raises:
        ConfigError: says what there is, and what is missing.
    """
    needs = {resource: amount for resource, amount in needs.items() if amount}
    for resource, amount in needs.items():
        if max((node.amount(resource) for node in nodes), default=0.0) < amount:
            raise ConfigError(
                f"no node of the cluster has {_counted(resource, amount)} for a replica ({_there(nodes, resource)}); "
                f"{_fix(resource)}"
            )
    rooms = [node.room(needs) if per_node is None else min(node.room(needs), per_node) for node in nodes]
    each = " and ".join(_counted(resource, amount) for resource, amount in needs.items())
    there = "; ".join(_there(nodes, resource) for resource in needs)
    if not any(rooms):
        raise ConfigError(f"no node of the cluster has {each} together for a replica ({there})")
    if sum(rooms) < replicas:
        limit = f", {per_node} on a node" if per_node is not None else ""
        raise ConfigError(
            f"{replicas} replicas of {each}{limit} do not fit the cluster, which has room for {sum(rooms)} ({there}); "
            "give fewer --replicas or less to each, or add nodes"
        )
    for resource, amount in needs.items():
        left, all_of_them = free.get(resource, 0.0), sum(node.amount(resource) for node in nodes)
        if left + _SLACK < amount * replicas:
            raise ConfigError(
                f"{replicas} replicas need {_counted(resource, amount * replicas)}, and other programs have left "
                f"{left:g} of {all_of_them:g}; end some, or give fewer --replicas"
            )
    able = [node.memory for node in nodes if node.room(needs) and node.memory]
    if able and size > max(able):
        raise ConfigError(
            f"the archives have {size >> 20} MB, and no node has more than {max(able) >> 20} MB of memory for them; "
            "serve fewer models, or add larger nodes"
        )


def _counted(resource: str, amount: float) -> str:
    if resource not in _WORDS:
        return f"{amount:g} {resource}"
    word = _WORDS[resource][0]
    return f"{amount:g} {word.removesuffix('s') if amount == 1 else word}"


def _there(nodes: Sequence[Node], resource: str) -> str:
    """``CPUs: one 4, two 2``."""
    having = ", ".join(f"{node.name} {node.amount(resource):g}" for node in nodes if node.amount(resource)) or "none"
    return f"{_WORDS[resource][0] if resource in _WORDS else resource}: {having}"


def _fix(resource: str) -> str:
    if resource in _WORDS:
        return f"give a smaller {_WORDS[resource][1]}"
    return f"give a smaller --resource {resource}=..., or start a node with `ray start --resources`"
