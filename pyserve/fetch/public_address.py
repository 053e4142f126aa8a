"""Where a host name leads, and whether that is a place that anyone on the internet may be sent to.

Whoever can name a URL must not be able to reach what only this machine can: its own ports, its neighbours, and the
cloud's metadata service. The addresses that are checked here are the ones connected to; the name is not asked again.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

Resolve = Callable[[str, int], list[str]]

_IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Global by the registry, but what answers there is the machine's own cloud or network, to this machine alone.
_SPECIAL = tuple(map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24", "192.88.99.0/24", "3fff::/20")))
_KINDS = ("unspecified", "loopback", "link_local", "multicast", "reserved", "private")


class AddressError(Exception):
    """A host that leads nowhere, or where nothing may be fetched from. The text is a sentence without its end.

    Attributes:
        is_private: it leads somewhere, but not to a public address.
    """

    def __init__(self, text: str, *, is_private: bool = False):
        super().__init__(text)
        self.is_private = is_private


def resolve(host: str, port: int) -> list[str]:
    """The addresses of ``host``, as the system knows them; blocks.

    Raises:
        OSError: there are none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def addresses_of(host: str, port: int, *, allow_private: bool, resolve: Resolve = resolve) -> list[str]:
    """Where ``host`` may be connected to, in the order to try.

    Raises:
        AddressError: nowhere. One address that is not public spoils the others: no honest name has both.
    """
    try:
        addresses = resolve(host, port)
    except (OSError, UnicodeError) as error:
        raise AddressError(f"the host {host} cannot be resolved: {_reason(error)}") from None
    if not addresses:
        raise AddressError(f"the host {host} has no address")
    if not allow_private:
        for address in addresses:
            kind = kind_of(address)
            if kind != "public":
                shown = host if host == address else f"{host} ({address})"
                raise AddressError(
                    f"the host {shown} has a {kind} address, and allow_private_addresses=true is not set",
                    is_private=True,
                )
    return addresses


def kind_of(address: str) -> str:
    """``public``, or why an address is not: ``loopback``, ``link-local``, ``private`` ..."""
    found: _IPAddress = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None or found in _NAT64:  # another way to write an IPv4 address
            return kind_of(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        for inner in (found.sixtofour, *(found.teredo or ())):  # where a tunnel would end
            if inner is not None and (kind := kind_of(str(inner))) != "public":
                return kind
    for name in _KINDS:
        if getattr(found, f"is_{name}"):
            return name.replace("_", "-")
    if isinstance(found, ipaddress.IPv6Address) and found.is_site_local:
        return "private"
    if any(found in network for network in _SPECIAL):
        return "reserved"
    return "public" if found.is_global else "private"  # such as 100.64.0.0/10, which carriers share


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
