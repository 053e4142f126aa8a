"""Fetches an archive over HTTP or HTTPS, from hosts whose owners may wish us harm.

The connection goes to the very address that was checked, so that a name which leads elsewhere a moment later gains
nothing; TLS is verified against the name. Proxies of the environment are not used: they would resolve the name again.
Redirects are followed on the same host only, and each target is checked as the first URL was.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urljoin

from pyserve.config.allowed_urls import AllowedUrls
from pyserve.config.archive_url import ArchiveUrl, UrlError, goes_up, parse_url
from pyserve.fetch.public_address import AddressError, Resolve, addresses_of, resolve
from pyserve.fetch.transfer import CHUNK_SIZE, Transfer, TransferError

REDIRECTS_MAX = 5
_REDIRECTS = (301, 302, 303, 307, 308)

Connect = Callable[[tuple[str, int], float], socket.socket]


@dataclass(frozen=True)
class Network:
    """How hosts are found and reached."""

    allow_private: bool = False
    resolve: Resolve = resolve
    connect: Connect = socket.create_connection


def fetch_http(url: ArchiveUrl, allowed: AllowedUrls, network: Network, transfer: Transfer, *, known: str = "") -> str:
    """Fills ``transfer`` with what ``url`` gives, and returns its ETag or ``""``. Blocks; `Abort.fire` ends it.

    Args:
        known: ETag of a copy that is there; returned, with nothing in ``transfer``, if that is still right.

    Raises:
        TransferError: it could not be fetched as a whole.
    """
    for _ in range(REDIRECTS_MAX + 1):
        try:
            with _connected(url, network, transfer) as connection, _asked(connection, url, known) as response:
                if response.status == 304 and known:
                    return known
                if response.status not in _REDIRECTS:
                    _receive(response, transfer)
                    return response.getheader("ETag") or ""
                location = response.getheader("Location")
        except ssl.SSLCertVerificationError as error:
            raise TransferError(
                f"the certificate of {url.host} cannot be trusted: {error.verify_message or error.reason}",
                fix="SSL_CERT_FILE names the file of a certificate authority of your own",
            ) from None
        except (OSError, http.client.HTTPException) as error:
            transfer.check()
            raise TransferError(_failure(url, error)) from None
        url = _redirected(url, location, allowed)
    raise TransferError(f"it is redirected more than {REDIRECTS_MAX} times")


@contextlib.contextmanager
def _connected(url: ArchiveUrl, network: Network, transfer: Transfer) -> Iterator[http.client.HTTPConnection]:
    try:
        addresses = addresses_of(url.host, url.port, allow_private=network.allow_private, resolve=network.resolve)
    except AddressError as error:
        fix = "allow_private_addresses=true in config.properties" if error.is_private else ""
        raise TransferError(str(error), fix=fix, is_refused=error.is_private) from None
    transfer.check()
    timeout_s = transfer.limits.connect_timeout_s
    for index, address in enumerate(addresses):
        try:
            sock = network.connect((address, url.port), timeout_s)
            break
        except OSError:
            transfer.check()
            if index == len(addresses) - 1:
                raise
    try:
        if url.scheme == "https":
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=url.host, do_handshake_on_connect=False)
        transfer.abort.watch(sock)
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        sock.settimeout(transfer.limits.window_s)
        connection = http.client.HTTPConnection(url.host, url.port)
        connection.sock = sock
        yield connection
    finally:
        transfer.abort.watch(None)
        sock.close()


def _asked(connection: http.client.HTTPConnection, url: ArchiveUrl, known: str) -> http.client.HTTPResponse:
    headers = {"Host": url.authority, "Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "pyserve",
               "Connection": "close"}  # fmt: skip
    if known:
        headers["If-None-Match"] = known
    connection.request("GET", url.target, headers=headers)
    return connection.getresponse()


def _receive(response: http.client.HTTPResponse, transfer: Transfer) -> None:
    if response.status != 200:
        reason = "".join(each for each in response.reason[:80] if each.isprintable())
        raise TransferError(f"the server answered {response.status} {reason}".rstrip())
    expected = response.length
    if expected is not None:
        transfer.expect(expected)
    while chunk := response.read1(CHUNK_SIZE):
        transfer.write(chunk)
    transfer.check()  # a socket that was shut down ends like one that was closed
    if expected is not None and transfer.size != expected:
        raise TransferError(f"the connection ended after {transfer.size} of {expected} bytes")
    if transfer.size == 0:
        raise TransferError("the server answered with nothing")


def _redirected(url: ArchiveUrl, location: str | None, allowed: AllowedUrls) -> ArchiveUrl:
    """Where an answer sends us, if we may go there."""
    if not location:
        raise TransferError("it is redirected without saying where to")
    try:
        text = urljoin(f"{url.scheme}://{url.authority}{url.target}", location)
        target = parse_url(text)
        if goes_up(text):
            raise UrlError("goes up with '..'")
    except ValueError as error:
        reason = str(error) if isinstance(error, UrlError) else "cannot be read"
        raise TransferError(f"it is redirected to a URL that {reason}", is_refused=True) from None
    if target.host != url.host or (url.scheme, target.scheme) not in (
        ("http", "http"), ("http", "https"), ("https", "https")
    ):  # fmt: skip
        raise TransferError(
            f"it is redirected to {target.scheme}://{target.authority}, and redirects off the host are not followed",
            fix="give the URL that it is redirected to, and allow it in allowed_urls", is_refused=True,
        )  # fmt: skip
    if not allowed.match(target):
        raise TransferError(f"it is redirected to {target.base}, which allowed_urls does not allow", is_refused=True)
    return target


def _failure(url: ArchiveUrl, error: Exception) -> str:
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended in the middle of the archive"
    if isinstance(error, TimeoutError):
        return f"{url.authority} did not answer in time"
    if isinstance(error, http.client.HTTPException):
        return f"{url.authority} did not answer as HTTP does ({type(error).__name__})"
    assert isinstance(error, OSError)
    return f"the connection to {url.authority} failed: {error.strerror or type(error).__name__}"
