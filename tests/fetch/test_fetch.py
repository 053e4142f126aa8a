"""Fetching an archive: limits, addresses, TLS and redirects, with name resolution and connections under control."""

from __future__ import annotations

import os
import resource
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.config.allowed_urls import AllowedUrls
from pyserve.config.archive_url import parse_url
from pyserve.fetch import object_store as object_fetch
from pyserve.fetch import transfer
from pyserve.fetch.object_store import fetch_object
from pyserve.fetch.transfer import Abort, ExistsError, Transfer, TransferError, TransferLimits
from pyserve.fetch.web import Network, fetch_http
from tests.support.certificates import self_signed, signed_by_authority
from tests.support.hostile_web import (
    HostileWeb,
    chunked_answer,
    endless,
    endless_head,
    file_answer,
    one_byte_then_nothing,
    redirect,
    silence,
)
from tests.support.ports import free_port

CONTENT = bytes(range(256)) * 100
LIMITS = TransferLimits(size_max=100_000, timeout_s=60, window_s=60)
PUBLIC = "93.184.215.14"


@pytest.fixture
def web() -> Iterator[HostileWeb]:
    with HostileWeb({"/m.mar": file_answer(CONTENT), "/chunked.mar": chunked_answer(CONTENT)}) as running:
        yield running


def fetched(
    folder: Path, url: str, *, network: Network | None = None, allowed: str = ".*", limits: TransferLimits = LIMITS,
    abort: Abort | None = None, clock: Any = time.monotonic,
) -> bytes:  # fmt: skip
    """What ``url`` gives. Whatever happens, no partial file is left."""
    try:
        with Transfer(folder, "m.mar", limits, abort or Abort(), clock=clock) as into:
            fetch_http(parse_url(url), AllowedUrls(allowed), network or Network(allow_private=True), into)
            into.commit()
        assert os.listdir(folder) == ["m.mar"]
        return (folder / "m.mar").read_bytes()
    except BaseException:
        assert os.listdir(folder) == []
        raise


@pytest.mark.parametrize("path", ["/m.mar", "/chunked.mar"])
def test_file_is_fetched_as_it_is(web: HostileWeb, tmp_path: Path, path: str) -> None:
    assert fetched(tmp_path, f"{web.url}{path}?X-Sig=a%2Fb") == CONTENT
    [head] = web.requests
    assert head.startswith(f"GET {path}?X-Sig=a%2Fb HTTP/1.1\r\nHost: 127.0.0.1:{web.port}\r\n")
    assert "Accept-Encoding: identity" in head


@pytest.mark.parametrize(
    "answer, reason",
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "the server answered 404 Not Found"),
        (b"HTTP/1.1 403 \r\nContent-Length: 0\r\n\r\n", "the server answered 403"),
        (b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1\r\n\r\nx", "answered 206"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort", "ended after 5 of 1000 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nshort", "in the middle"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nshort", "in the middle"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nshort", "in the middle"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100001\r\n\r\n", "the most is download_size_max=100000"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "answered with nothing"),
        (endless, "the most is download_size_max=100000"),
        (b"SSH-2.0-OpenSSH\r\n", "did not answer as HTTP does"),
        (b"", "did not answer as HTTP does|failed"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000, "did not answer as HTTP does"),
        (endless_head, "did not answer as HTTP does"),
        (redirect(""), "without saying where"),
        (redirect("/../m.mar"), "allowed_urls does not allow"),
        (redirect("/models/%2e%2e/m.mar"), "it is redirected to a URL that has .* '..' in its path"),
        (redirect("http://user@127.0.0.1/m.mar"), "user name"),
        (redirect("file:///etc/passwd"), "off the host"),
        (redirect("http://localhost/m.mar"), "off the host"),
        (redirect("//evil.example/m.mar"), "off the host"),
        (redirect("http://127.0.0.1:1/m.mar"), "allowed_urls does not allow"),
        (redirect("/other/m.mar"), "allowed_urls does not allow"),
        (redirect("/models/x.mar"), "redirected more than 5 times"),
    ],
)
def test_what_is_not_a_whole_archive_leaves_nothing(web: HostileWeb, tmp_path: Path, answer: Any, reason: str) -> None:
    web.answers["/models/x.mar"] = answer
    with pytest.raises(TransferError, match=reason):
        fetched(tmp_path, f"{web.url}/models/x.mar", allowed=rf"http://127.0.0.1:{web.port}/models/.*")


def test_redirects_on_the_host_are_followed(web: HostileWeb, tmp_path: Path) -> None:
    for hop in range(5):
        web.answers[f"/{hop}"] = redirect(f"/{hop + 1}" if hop < 4 else f"{web.url}/m.mar?sig=1")
    assert fetched(tmp_path, f"{web.url}/0") == CONTENT
    assert [head.split()[1] for head in web.requests] == ["/0", "/1", "/2", "/3", "/4", "/m.mar?sig=1"]


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]"])
def test_private_address_is_not_connected_to(web: HostileWeb, tmp_path: Path, host: str) -> None:
    with pytest.raises(TransferError, match="has a loopback address") as caught:
        fetched(tmp_path, f"http://{host}:{web.port}/m.mar", network=Network())
    assert caught.value.is_refused and "allow_private_addresses=true" in caught.value.fix
    assert web.connection_count == 0


def test_address_that_was_checked_is_the_one_connected_to(web: HostileWeb, tmp_path: Path) -> None:
    """DNS rebinding: the second answer of the name server is another than the first."""
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    connected: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        connected.append(address)
        return socket.create_connection(("127.0.0.1", web.port), timeout)

    network = Network(resolve=lambda host, port: next(answers), connect=connect)
    assert fetched(tmp_path, "http://models.example/m.mar", network=network) == CONTENT
    assert connected == [(PUBLIC, 80)]
    assert next(answers) == ["127.0.0.1"]  # nobody asked again
    assert "\r\nHost: models.example\r\n" in web.requests[0]


def test_name_is_checked_anew_for_each_redirect(web: HostileWeb, tmp_path: Path) -> None:
    web.answers["/x.mar"] = redirect("/m.mar")
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    network = Network(
        resolve=lambda host, port: next(answers),
        connect=lambda address, timeout: socket.create_connection(("127.0.0.1", web.port), timeout),
    )
    with pytest.raises(TransferError, match=r"models\.example \(127\.0\.0\.1\) has a loopback address"):
        fetched(tmp_path, "http://models.example/x.mar", network=network)
    assert web.connection_count == 1


def test_next_address_is_tried_when_one_refuses(web: HostileWeb, tmp_path: Path) -> None:
    ports = {"198.51.100.1": free_port(), PUBLIC: web.port}
    network = Network(
        allow_private=True,
        resolve=lambda host, port: list(ports),
        connect=lambda address, timeout: socket.create_connection(("127.0.0.1", ports[address[0]]), timeout),
    )
    assert fetched(tmp_path, "http://models.example/m.mar", network=network) == CONTENT
    del ports[PUBLIC]
    (tmp_path / "m.mar").unlink()
    with pytest.raises(TransferError, match=r"the connection to models\.example failed: Connection refused"):
        fetched(tmp_path, "http://models.example/m.mar", network=network)


# --- TLS -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_certificate_must_be_for_the_name_and_from_a_known_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, authority = signed_by_authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    stranger = self_signed(tmp_path, "stranger")
    other = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    other.load_cert_chain(stranger.certificate, stranger.key)
    store = tmp_path / "store"
    store.mkdir()
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    answers = {"/m.mar": file_answer(CONTENT)}
    with (
        HostileWeb(dict(answers), context) as good,
        HostileWeb(dict(answers), other) as bad,
        HostileWeb(greeting=b"SSH-2.0-OpenSSH\r\n") as plain,
    ):
        assert fetched(store, f"https://localhost:{good.port}/m.mar") == CONTENT
        (store / "m.mar").unlink()

        def anywhere(address: tuple[str, int], timeout: float) -> socket.socket:
            return socket.create_connection(("127.0.0.1", good.port), timeout)

        network = Network(resolve=lambda host, port: [PUBLIC], connect=anywhere)
        with pytest.raises(TransferError, match=r"certificate of models\.example cannot be trusted.*models\.example"):
            fetched(store, "https://models.example/m.mar", network=network)
        with pytest.raises(TransferError, match="certificate of localhost cannot be trusted") as caught:
            fetched(store, f"https://localhost:{bad.port}/m.mar")
        assert "SSL_CERT_FILE" in caught.value.fix
        assert bad.requests == []
        with pytest.raises(TransferError, match="failed"):
            fetched(store, f"https://localhost:{plain.port}/m.mar")


# --- limits ----------------------------------------------------------------------------------------------------------


def test_slow_stream_is_given_up(web: HostileWeb, tmp_path: Path) -> None:
    """One byte at a time, each of which takes a second of the clock."""
    now = iter(range(1_000_000))
    web.answers["/m.mar"] = chunked_answer(CONTENT, size=1)
    limits = TransferLimits(100_000, 60, window_s=30, window_size_min=1000)
    with pytest.raises(TransferError, match=r"only \d+ bytes came in 30 s; the least is 1000"):
        fetched(tmp_path, f"{web.url}/m.mar", limits=limits, clock=lambda: float(next(now)))


@pytest.mark.parametrize("answer", [silence, one_byte_then_nothing])
def test_abort_ends_what_hangs(web: HostileWeb, tmp_path: Path, answer: Any) -> None:
    web.answers["/m.mar"] = answer
    abort = Abort()
    came = threading.Event()

    def answering(peer: Any) -> None:
        came.set()
        answer(peer)

    web.answers["/m.mar"] = answering
    firing = threading.Thread(target=lambda: (came.wait(60), abort.fire("it took too long")))
    firing.start()
    with pytest.raises(TransferError, match="it took too long"):
        fetched(tmp_path, f"{web.url}/m.mar", abort=abort)
    firing.join()


def test_abort_before_the_connection_is_there(web: HostileWeb, tmp_path: Path) -> None:
    abort = Abort()
    abort.fire("the server is stopping")
    with pytest.raises(TransferError, match="the server is stopping"):
        fetched(tmp_path, f"{web.url}/m.mar", abort=abort)
    assert web.connection_count == 0


def test_disk_without_room_is_an_error_before_anything_is_written(
    web: HostileWeb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "room_in", lambda folder: 1000)
    with pytest.raises(TransferError, match=f"has {len(CONTENT)} bytes, and the model store has room for 1000"):
        fetched(tmp_path, f"{web.url}/m.mar")


def test_disk_that_fills_up_leaves_nothing(web: HostileWeb, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(TransferError, match="cannot be kept in the model store: File too large"):
            fetched(tmp_path, f"{web.url}/chunked.mar")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with Transfer(tmp_path, "m.mar", LIMITS, Abort()) as into:
        into.write(b"new")
        (tmp_path / "m.mar").write_bytes(b"old")
        with pytest.raises(ExistsError):
            into.commit()
    assert os.listdir(tmp_path) == ["m.mar"] and (tmp_path / "m.mar").read_bytes() == b"old"


def test_file_system_without_links_still_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(transfer.os, "link", link)
    for content in (b"first", b"second"):
        with Transfer(tmp_path, "m.mar", LIMITS, Abort()) as into:
            into.write(content)
            if content == b"first":
                into.commit()
            else:
                with pytest.raises(ExistsError):
                    into.commit()
    assert os.listdir(tmp_path) == ["m.mar"] and (tmp_path / "m.mar").read_bytes() == b"first"


def test_partial_file_of_a_killed_process_goes_with_the_next_transfer(tmp_path: Path) -> None:
    long_ago = time.time() - 3600
    dead, alive = tmp_path / ".dead.pyserve-partial", None
    dead.write_bytes(b"x")
    os.utime(dead, (long_ago, long_ago))
    with Transfer(tmp_path, "other.mar", LIMITS, Abort()) as other:
        alive = other.partial
        os.utime(alive, (long_ago, long_ago))
        with Transfer(tmp_path, "m.mar", LIMITS, Abort()):
            assert not dead.exists()
            assert alive.exists()
    assert os.listdir(tmp_path) == []


# --- object stores ---------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Any:
    """fsspec's file system in memory, in the place of each store."""
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    asked: list[str] = []
    monkeypatch.setattr(fsspec, "filesystem", lambda name: asked.append(name) or memory)
    memory.asked = asked
    yield memory
    memory.store.clear()


def fetched_object(folder: Path, url: str, limits: TransferLimits = LIMITS) -> bytes:
    try:
        with Transfer(folder, "m.mar", limits, Abort()) as into:
            fetch_object(parse_url(url), into)
            into.commit()
        return (folder / "m.mar").read_bytes()
    finally:
        assert os.listdir(folder) in ([], ["m.mar"])


@pytest.mark.parametrize(
    "url, key",
    [("s3://bucket/deep/m.mar", "bucket/deep/m.mar"), ("gs://bucket/m%20x.mar", "bucket/m x.mar"),
     ("hf://Owner/repo@v1/m.mar", "Owner/repo@v1/m.mar")],
)  # fmt: skip
def test_object_is_fetched_by_bucket_and_key(bucket: Any, tmp_path: Path, url: str, key: str) -> None:
    bucket.pipe(f"/{key}", CONTENT)
    assert fetched_object(tmp_path, url) == CONTENT
    assert bucket.asked == [url.partition(":")[0]]


@pytest.mark.parametrize(
    "url, reason",
    [("s3://bucket/nope.mar", "no such object"), ("s3://bucket/deep", "is a folder"),
     ("s3://bucket/deep/big.mar", "the most is download_size_max")],
)  # fmt: skip
def test_object_that_cannot_be_had_leaves_nothing(bucket: Any, tmp_path: Path, url: str, reason: str) -> None:
    bucket.pipe("/bucket/deep/big.mar", b"x" * 100_001)
    with pytest.raises(TransferError, match=reason):
        fetched_object(tmp_path, url)
    assert os.listdir(tmp_path) == []


def test_error_of_a_store_is_told_in_one_line(bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def info(key: str) -> dict[str, Any]:
        raise PermissionError("Access\nDenied")

    monkeypatch.setattr(bucket, "info", info)
    with pytest.raises(TransferError, match=r"^PermissionError: Access Denied$"):
        fetched_object(tmp_path, "s3://bucket/m.mar")


@pytest.mark.parametrize("scheme", ["s3", "gs", "hf"])
def test_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    def import_module(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(object_fetch.importlib, "import_module", import_module)
    with pytest.raises(TransferError, match=f"{scheme}:// needs packages that are not installed") as caught:
        fetched_object(tmp_path, f"{scheme}://bucket/m.mar")
    assert caught.value.fix == f"pip install fsspec {object_fetch.PACKAGES[scheme]}"
