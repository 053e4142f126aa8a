"""What to warn of when a server with the rights of root can be reached from other machines."""

from __future__ import annotations

import os

from pyserve.config.address import Address
from pyserve.config.config import Config


def exposure_notes(config: Config, user: int | None = None) -> list[tuple[str, str]]:
    """What the user should know at start: (``warning``, one line), or nothing.

    Args:
        user: the effective user id; by default this process's.
    """
    if (os.geteuid() if user is None else user) != 0:
        return []
    addresses = {name: address for name, address in config.addresses().items() if not address.is_loopback}
    if config.enable_grpc != "false":
        for name in ("inference", "management"):
            address = Address(getattr(config, f"grpc_{name}_address"), getattr(config, f"grpc_{name}_port"))
            if not address.is_loopback:
                addresses[f"grpc_{name}"] = address
    if not addresses:
        return []
    shown = ", ".join(f"{address} ({name})" for name, address in addresses.items())
    return [("warning", f"running as root, and other machines can reach {shown}: a fault in a model's code or in a "
                        "library would give away this machine; start it as another user")]  # fmt: skip
