"""What stands behind a listening socket, whichever process accepts from it."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any

from pyserve.config.address import Address
from pyserve.config.config import Config
from pyserve.http1.compression import Compression
from pyserve.http1.connections import Connections
from pyserve.http1.limits import Http1Limits
from pyserve.request.body_budget import BodyBudget
from pyserve.request.descriptors import DescriptorLimit
from pyserve.request.messages import ErrorFormat
from pyserve.security.cors import Cors

log = logging.getLogger("pyserve.site")

TLS_HANDSHAKE_S = 10.0
# Until a client that is slow to read has got its answer; Http1TlsProtocol hangs up on the others much sooner.
TLS_SHUTDOWN_S = 120.0


def grouped(sockets: Mapping[str, socket.socket]) -> list[tuple[socket.socket, list[str]]]:
    """The sockets, each with the names of all that it answers for. The same order in all processes."""
    names_by_socket: dict[socket.socket, list[str]] = {}
    for name, sock in sockets.items():
        names_by_socket.setdefault(sock, []).append(name)
    return list(names_by_socket.items())


def error_format(config: Config) -> ErrorFormat:
    """How errors are told under ``config``."""
    return ErrorFormat(
        with_detail=config.compat != "strict" and config.error_detail != "none",
        kserve_versions=("v2",) if config.compat == "strict" else ("v1", "v2"),
        with_private_detail=config.error_detail == "full"
        or (
            config.error_detail == "auto"
            and config.inference_address.is_loopback
            and config.management_is_local
            and (config.enable_grpc == "false" or Address(config.grpc_inference_address).is_loopback)
        ),
    )


def new_connections(  # noqa: PLR0917 - all that a listener has
    config: Config, names: list[str], connection_count_max: int, bodies: BodyBudget, descriptors: DescriptorLimit,
    error_format: ErrorFormat, compression: Compression | None,
) -> Connections:  # fmt: skip
    """The register of the connections of the listener that has ``names``."""
    limits = Http1Limits(body_size_max=config.max_request_size, connection_count_max=connection_count_max)
    cors = Cors(config)
    connections = Connections(limits, bodies, decorate=cors.add if cors else None,
                              takes_ids=config.compat != "strict", error_format=error_format,
                              compression=compression)  # fmt: skip
    is_inference = "inference" in names
    connections.descriptor_limit = lambda: descriptors.inference if is_inference else descriptors.management
    return connections


def warn_of_few_descriptors(wanted: int, descriptors: DescriptorLimit) -> None:
    """Says so if this process cannot have as many connections for inference as are ``wanted``."""
    if wanted > descriptors.inference:
        log.warning(
            "connection_count_max=%d, but this process may have %d open files, which leaves %d for connections "
            "beside those that workers and logs need; more are refused. Raise the limit: `ulimit -Hn`, "
            "LimitNOFILE= in a systemd unit, --ulimit nofile= of docker run", wanted, descriptors.count,
            descriptors.inference,
        )  # fmt: skip


def new_compression(config: Config, pool: Executor) -> Compression | None:
    """Of answers, as ``config`` has it; larger ones are compressed in ``pool``."""
    if not config.response_compression or config.compat == "strict":
        return None
    return Compression(pool, config.response_compression_size_min)


def tls_options(context: ssl.SSLContext | None) -> dict[str, Any]:
    """Of ``create_server``, for a listener that speaks TLS; none without a context."""
    if context is None:
        return {}
    return {"ssl": context, "ssl_handshake_timeout": TLS_HANDSHAKE_S, "ssl_shutdown_timeout": TLS_SHUTDOWN_S}
