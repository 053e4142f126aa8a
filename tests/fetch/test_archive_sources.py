"""What a running server cannot easily be brought to: read-only stores, transfers that hang, servers that stop."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.config.config import Config
from pyserve.errors import DownloadError, ModelLoadError, ModelNotFoundError, ServerError
from pyserve.fetch import sources as archive_sources
from pyserve.fetch.sources import FETCHES_MAX, ArchiveSources, Obtained
from pyserve.fetch.transfer import Transfer
from pyserve.fetch.web import Network
from tests.support.hostile_web import HostileWeb, Peer, file_answer, silence

HANG_S = 60


@pytest.fixture
def web() -> Iterator[HostileWeb]:
    with HostileWeb({"/m.mar": file_answer(b"content"), "/hang.mar": silence}) as running:
        yield running


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "store").mkdir()
    return tmp_path / "store"


def sources(store: Path | None, network: Network | None = None, **settings: Any) -> ArchiveSources:
    values: dict[str, Any] = {"allowed_urls": ".*", "allow_private_addresses": True, **settings}
    return ArchiveSources(Config(model_store=str(store) if store else None, **values), network=network)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - of another thread, which knows no events of the loop
        await asyncio.sleep(0.01)


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, HANG_S))


@pytest.fixture
def read_only(store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store like one on a disk that is mounted for reading."""

    def begin(folder: Path, *arguments: Any) -> Transfer:
        if folder == store:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return Transfer(folder, *arguments)

    monkeypatch.setattr(archive_sources, "Transfer", begin)
    return store


def test_read_only_store_has_what_is_fetched_kept_in_the_cache(
    read_only: Path, web: HostileWeb, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        there = sources(read_only)
        first = await there.obtain(f"{web.url}/m.mar?sig=1")
        assert first.is_fetched and first.path.read_bytes() == b"content" and os.listdir(read_only) == []
        assert first.path.is_relative_to(read_only.parent / "cache" / "downloads")
        assert f"the model store is read-only; keeping m.mar in {first.path.parent}" in caplog.text
        # One that is served is not replaced; one that an earlier server left is.
        with pytest.raises(ServerError, match=r"^Model file already exists m\.mar$"):
            await there.obtain(f"{web.url}/m.mar", in_use=[first.path])
        web.answers["/m.mar"] = file_answer(b"newer")
        assert (await there.obtain(f"{web.url}/m.mar")).path == first.path
        assert first.path.read_bytes() == b"newer"
        there.remove(first.path)
        assert not first.path.exists()

    run(test())


def test_copy_in_the_cache_is_fetched_anew_only_when_it_has_changed(read_only: Path, web: HostileWeb) -> None:
    content, tag = b"first", '"1"'

    def answer(peer: Peer) -> None:
        if f"If-None-Match: {tag}\r\n" in peer.head:
            peer.send(b"HTTP/1.1 304 Not Modified\r\n\r\n")
        else:
            peer.send(file_answer(content, f"ETag: {tag}"))

    async def test() -> None:
        nonlocal content, tag
        web.answers["/m.mar"] = answer
        first = await sources(read_only).obtain(f"{web.url}/m.mar?sig=1")
        content = b"is not sent"
        assert await sources(read_only).obtain(f"{web.url}/m.mar?sig=2") == first  # as a restarted server does
        assert first.path.read_bytes() == b"first"
        content, tag = b"second", '"2"'
        assert await sources(read_only).obtain(f"{web.url}/m.mar") == first
        assert first.path.read_bytes() == b"second"
        content = b"third"
        first.path.unlink()
        await sources(read_only).obtain(f"{web.url}/m.mar")
        assert first.path.read_bytes() == b"third"  # what is not there is not taken for unchanged
        tag = "x\r\nX-Evil: 1"
        (first.path.parent / ".etag").write_text(tag)
        await sources(read_only).obtain(f"{web.url}/m.mar")
        assert "X-Evil" not in web.requests[-1]

    run(test())


def test_nothing_but_what_was_fetched_is_removed(store: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.mar"
    mine.write_bytes(b"")
    (store / "folder").mkdir()
    there = sources(store)
    for path in (mine, store / "folder", store / "gone.mar"):
        there.remove(path)
    assert mine.exists() and (store / "folder").exists()


def test_without_a_model_store_nothing_is_fetched(web: HostileWeb) -> None:
    async def test() -> None:
        for url in (f"{web.url}/m.mar", "m.mar", "/m.mar"):
            with pytest.raises(ModelNotFoundError, match=r"^Model store has not been configured\.$"):
                await sources(None).obtain(url)
        assert web.connection_count == 0

    run(test())


@pytest.mark.parametrize("end", [lambda there, task: there.stop(), lambda there, task: task.cancel()])
def test_stopping_and_hanging_up_end_a_download(
    store: Path, web: HostileWeb, end: Callable[[ArchiveSources, asyncio.Task[Obtained]], None]
) -> None:
    async def test() -> None:
        there = sources(store)
        task = asyncio.ensure_future(there.obtain(f"{web.url}/hang.mar"))
        await until(lambda: bool(web.requests))
        end(there, task)
        with pytest.raises((DownloadError, asyncio.CancelledError)) as caught:
            await task
        if isinstance(caught.value, DownloadError):
            assert caught.value.detail["reason"] == "the server is stopping"
        await until(lambda: not os.listdir(store))  # the thread of a cancelled call ends by itself

    run(test())


def test_transfer_that_cannot_be_ended_is_left_behind(
    store: Path, web: HostileWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that does not answer: no socket of ours is there to be shut down."""
    monkeypatch.setattr(archive_sources, "_ABANDON_S", 0.1)
    answer = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        answer.wait(HANG_S)
        return ["127.0.0.1"]

    async def test() -> None:
        network = Network(allow_private=True, resolve=resolve)
        there = sources(store, network, download_timeout_s=1)
        with pytest.raises(DownloadError) as caught:
            await there.obtain(f"http://models.example:{web.port}/m.mar")
        assert caught.value.detail["reason"] == "it took longer than download_timeout_s=1"
        assert os.listdir(store) == []

    try:
        run(test())
    finally:
        answer.set()
    for thread in threading.enumerate():
        if thread.name == "fetch":
            thread.join(HANG_S)
    assert web.connection_count == 0 and os.listdir(store) == []


def test_only_so_many_are_fetched_at_once(store: Path) -> None:
    held = threading.Semaphore(0)
    running = []

    def hold(peer: Any) -> None:
        running.append(peer.target)
        held.acquire(timeout=HANG_S)
        peer.send(file_answer(b"content"))

    async def test() -> None:
        there = sources(store)
        paths = [f"/{number}.mar" for number in range(FETCHES_MAX + 3)]
        with HostileWeb(dict.fromkeys(paths, hold)) as web:
            tasks = [asyncio.ensure_future(there.obtain(web.url + path)) for path in paths]
            await until(lambda: len(running) >= FETCHES_MAX)
            for count in range(1, len(paths) + 1):
                assert len(running) < FETCHES_MAX + count
                held.release()
                await until(lambda count=count: sum(task.done() for task in tasks) >= count)  # type: ignore[misc]
            assert all(task.result().is_fetched for task in tasks)

    run(test())


def test_disk_error_of_an_archive_is_torchserves_text(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise ModelLoadError("m.mar: cannot be read or unpacked: Input/output error")

    monkeypatch.setattr(archive_sources, "open_archive", fail)
    with pytest.raises(ModelLoadError, match=r"^Failed to save model: m\.mar$") as caught:
        archive_sources.open_obtained(Obtained(store / "m.mar", "m.mar"))
    assert "Input/output error" in caught.value.detail["text"]
