"""The gRPC listeners of one server process: their ports, their services, and their end.

The ports are bound before the models are loaded and answer after that; clients that connect meanwhile wait, as those
of HTTP do. gRPC cannot take over a socket, so the server binds them itself, and a server that takes another's place
binds them again.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

import grpc
import grpc.aio

from pyserve.config.address import port_owner
from pyserve.config.config import Config
from pyserve.errors import ConfigError
from pyserve.grpc_api.messages import POOL
from pyserve.grpc_api.service import Dispatcher, Service
from pyserve.security import tls
from pyserve.security.renewal import Watched

log = logging.getLogger(__name__)

# Beside what max_request_size and max_response_size count: names, shapes, framing.
ENVELOPE_SIZE = 64 << 10
# Requests over max_request_size are taken up to twice that, to be answered by a text that names it.
_RECEIVE_FACTOR = 2
_SIZE_MAX = (1 << 31) - 1
STREAMS_PER_CONNECTION_MAX = 1000
# Of calls that are ended by others, when they are answered.
_NO_GRACE_END_S = 1e6


class Listener(NamedTuple):
    """One port.

    Attributes:
        names: ``inference``, ``management`` or both.
        address: ``127.0.0.1:7070``.
    """

    names: tuple[str, ...]
    server: Any
    address: str
    port: int


class GrpcServer:
    """All gRPC listeners. Loop thread only.

    Attributes:
        listeners: those that were bound.
        warnings: why one was not, a line each.
    """

    def __init__(self, config: Config, *, must_bind: bool, shares_ports: bool = False):
        """
        Args:
            must_bind: a port that cannot be had is an error, not a warning.
            shares_ports: with another server of ours, for the moment in which they change places.

        Raises:
            ConfigError: see ``must_bind``.
        """
        self._config = config
        self._shares_ports = shares_ports
        self.listeners: list[Listener] = []
        self.warnings: list[str] = []
        for names, host, port in _places(config):
            try:
                self.listeners.append(self._bind(names, host, port))
            except ConfigError as error:
                if must_bind:
                    raise
                self.warnings.append(f"{error.message} (enable_grpc=true makes this an error, false turns gRPC off)")
        for warning in self.warnings:
            log.warning("%s", warning)

    def _bind(self, names: tuple[str, ...], host: str, port: int) -> Listener:
        config, name = self._config, names[0]
        server = grpc.aio.server(options=_options(config, name), maximum_concurrent_rpcs=config.connection_count_max)
        shown = f"[{host}]" if ":" in host else host
        try:
            if not self._shares_ports and _is_taken(host, port):
                raise RuntimeError
            if config.enable_grpc_ssl:
                bound = server.add_secure_port(f"{shown}:{port}", _credentials(config))
            else:
                bound = server.add_insecure_port(f"{shown}:{port}")
        except RuntimeError:
            bound = 0
        if not bound:
            key = f"grpc_{name}_port"
            owner = port_owner(port)
            reason = f"the port is in use by {owner}" if owner else "the port is in use, or the address is not ours"
            raise ConfigError(
                f"gRPC {name}: cannot listen on {shown}:{port}: {reason}; stop that, choose another with {key} "
                f"({config.origin.get(key, 'default')}), or set enable_grpc=false"
            )
        return Listener(names, server, f"{shown}:{bound}", bound)

    @property
    def addresses(self) -> dict[str, str]:
        """``grpc_inference`` and ``grpc_management``, as far as they are there."""
        return {f"grpc_{name}": listener.address for listener in self.listeners for name in listener.names}

    async def start(self, listener: Listener, services: Sequence[Service], dispatcher: Dispatcher) -> None:
        """Begins to answer on one listener."""
        for service in services:
            listener.server.add_generic_rpc_handlers((dispatcher.handler(service),))
            for method in service.methods:
                _add_file(method.request.DESCRIPTOR.file)
        _add_reflection(listener.server, [service.name for service in services])
        await listener.server.start()

    async def stop(self, grace_s: float | None) -> None:
        """Closes the ports, and asks clients to connect elsewhere; returns when no call is left.

        Args:
            grace_s: after it, the calls that are left are cut off; None if never. A second call may give less.
        """
        grace_s = _NO_GRACE_END_S if grace_s is None else grace_s
        await asyncio.gather(*(listener.server.stop(grace_s) for listener in self.listeners))


def _is_taken(host: str, port: int) -> bool:
    """Whether anybody listens there, who may share the port or not: the system would give each some of the calls."""
    if not port:
        return False
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False  # gRPC says so
    for family, kind, _, _, where in found:
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(where)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    return True
    return False


def _credentials(config: Config) -> Any:
    """Key and certificate as they are when a client connects.

    Raises:
        ConfigError: they cannot be used.
    """
    pair = tls.key_and_chain_pem(config)

    def read() -> None:
        nonlocal pair
        key, chain = tls.key_and_chain_pem(config)
        tls.inspect(key, chain, tls.sources(config))
        pair = key, chain

    watch = Watched(tls.files(config), read)

    def changed() -> Any:
        return grpc.ssl_server_certificate_configuration([pair]) if watch.look() else None

    return grpc.dynamic_ssl_server_credentials(grpc.ssl_server_certificate_configuration([pair]), changed)


def _places(config: Config) -> list[tuple[tuple[str, ...], str, int]]:
    inference = (config.grpc_inference_address, config.grpc_inference_port)
    management = (config.grpc_management_address, config.grpc_management_port)
    if inference == management and inference[1]:
        return [(("inference", "management"), *inference)]
    return [(("inference",), *inference), (("management",), *management)]


def _options(config: Config, name: str) -> list[tuple[str, int]]:
    options = [
        ("grpc.max_receive_message_length", min(_SIZE_MAX, config.max_request_size * _RECEIVE_FACTOR + ENVELOPE_SIZE)),
        ("grpc.max_send_message_length", min(_SIZE_MAX, config.max_response_size + ENVELOPE_SIZE)),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION_MAX),
        # For an upgrade, in which two servers have one port for a moment; other servers are looked for before.
        ("grpc.so_reuseport", 1),
    ]
    for key in ("max_connection_age_ms", "max_connection_age_grace_ms"):
        value = getattr(config, f"grpc_{name}_{key}")
        if value is not None:
            options.append((f"grpc.{key}", min(_SIZE_MAX, value)))
    return options


def _add_reflection(server: Any, names: list[str]) -> None:
    try:
        from grpc_reflection.v1alpha import reflection, reflection_pb2
    except ImportError as error:  # not there, or made for another protobuf
        log.warning("gRPC reflection is off: %s", error)
        return
    _add_file(reflection_pb2.DESCRIPTOR)
    reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server, POOL)


def _add_file(file: Any) -> None:
    """Makes a file of another pool known to reflection."""
    try:
        POOL.FindFileByName(file.name)
    except KeyError:
        POOL.AddSerializedFile(file.serialized_pb)
