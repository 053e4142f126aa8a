"""The control of a cluster: all replicas change, or none, whoever is slow, gone or late."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pyserve.errors import ModelLoadError
from pyserve.replicas import control as module
from pyserve.replicas import stock as stock_module
from pyserve.replicas.archives import NodeArchives
from pyserve.replicas.control import Control
from pyserve.replicas.state import Entry, State
from pyserve.replicas.stock import Stock

A1, A2 = Entry("a", "1", "a.mar"), Entry("a", "2", "a-2.mar")
DEPLOY = {"entry": asdict(A2)}


class Site:
    """A control whose clock the test turns, and what it wrote down."""

    def __init__(self, folder: Path, kept: list[bytes] | None = None):
        self.now = 0.0
        self.kept = [] if kept is None else kept
        self.stock = Stock(NodeArchives(folder), lambda data: data, clock=lambda: self.now)
        self.control = Control(
            self.kept.append, self.kept[-1] if self.kept else None, self.stock, clock=lambda: self.now
        )

    async def begin(self) -> None:
        await self.control.seed(State.first("base", (A1,)).to_json())


class Replica:
    """Follows directives as it is told to."""

    def __init__(self, control: Control, name: str):
        self.control = control
        self.name = name
        self.generation = 1
        self.problem = ""
        self.is_silent = False
        self.seen = ""
        self.phases: list[str] = []
        self.task: asyncio.Task[None] | None = None

    async def join(self) -> dict[str, Any]:
        told = await self.control.admit(self.name, f"node-{self.name}", "base", self.generation)
        if not told:
            self.task = asyncio.ensure_future(self.follow())
        return told

    async def follow(self) -> None:
        while True:
            told = await self.control.poll(self.name, self.seen, "base")
            if told.get("id", self.seen) == self.seen:
                await asyncio.sleep(0.01)
                continue
            self.seen = told["id"]
            self.phases.append(told["phase"])
            if self.is_silent:
                continue
            if told["phase"] == "serve":
                self.generation = told["state"]["generation"]
            problem = self.problem if told["phase"] == "prepare" else ""
            await self.control.answer(self.name, told["id"], self.generation, problem)


async def prepares(replica: Replica) -> None:
    """Returns when it was told to."""
    while replica.phases[-1:] != ["prepare"]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def run(folder: Path, scenario: Callable[[Site, list[Replica]], Awaitable[None]], count: int = 2) -> None:
    async def main() -> None:
        site = Site(folder)
        await site.begin()
        replicas = [Replica(site.control, str(number)) for number in range(count)]
        for each in replicas:
            assert await each.join() == {}
        await scenario(site, replicas)
        for each in replicas:
            if each.task is not None:
                each.task.cancel()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_change_is_prepared_by_all_before_any_serves_it(tmp_path: Path) -> None:
    async def scenario(site: Site, replicas: list[Replica]) -> None:
        answer = await site.control.change("deploy", DEPLOY)
        assert answer["generation"] == 2 and not answer["silent"] and answer["replicas"] == 2
        assert [each.generation for each in replicas] == [2, 2]
        assert [each.phases[-2:] for each in replicas] == [["prepare", "serve"]] * 2
        assert State.from_json(json.loads(site.kept[-1])).defaults == {"a": "2"}

    run(tmp_path, scenario)


def test_one_that_cannot_prepare_keeps_all_where_they_are(tmp_path: Path) -> None:
    async def scenario(site: Site, replicas: list[Replica]) -> None:
        replicas[1].problem = "no room"
        written = len(site.kept)
        answer = await site.control.change("deploy", DEPLOY)
        assert answer == {"generation": 1, "reasons": {"node-1": "no room"}}
        assert [each.generation for each in replicas] == [1, 1] and len(site.kept) == written
        assert all(each.phases[-1] == "serve" for each in replicas)  # what was loaded can go
        replicas[1].problem = ""
        assert (await site.control.change("deploy", DEPLOY))["generation"] == 2

    run(tmp_path, scenario)


def test_one_that_is_gone_holds_nobody_up(tmp_path: Path) -> None:
    async def scenario(site: Site, replicas: list[Replica]) -> None:
        assert replicas[1].task is not None
        replicas[1].task.cancel()
        changing = asyncio.ensure_future(site.control.change("deploy", DEPLOY))
        await prepares(replicas[0])
        assert not changing.done()
        site.now += module.GONE_S - 1
        await site.control.poll("0", "", "base")  # the other one is heard of
        site.now += 2
        assert (await changing)["replicas"] == 1

    run(tmp_path, scenario)


def test_one_that_is_too_slow_is_named(tmp_path: Path) -> None:
    async def scenario(site: Site, replicas: list[Replica]) -> None:
        replicas[1].is_silent = True
        changing = asyncio.ensure_future(site.control.change("deploy", DEPLOY, 5.0))
        await prepares(replicas[1])
        site.now += 6
        replicas[1].is_silent = False
        answer = await changing
        assert answer == {"generation": 1, "reasons": {"node-1": "no answer within 5 s"}}

    run(tmp_path, scenario)


def test_a_change_can_be_called_off_until_it_is_committed(tmp_path: Path) -> None:
    async def scenario(site: Site, replicas: list[Replica]) -> None:
        replicas[0].is_silent = True
        changing = asyncio.ensure_future(site.control.change("deploy", DEPLOY))
        await prepares(replicas[0])
        refused = await site.control.change("remove", {"name": "a"})
        assert refused["status"] == 409 and "under way" in refused["error"]
        replicas[0].is_silent = False
        await site.control.cancel()
        assert (await changing)["reasons"] == {"command": "it was called off"}
        assert (await site.control.status())["generation"] == 1

    run(tmp_path, scenario)


def test_one_that_joins_while_a_change_is_prepared_prepares_it_too(tmp_path: Path) -> None:
    async def scenario(site: Site, replicas: list[Replica]) -> None:
        replicas[0].is_silent = True
        changing = asyncio.ensure_future(site.control.change("deploy", DEPLOY))
        await prepares(replicas[0])
        late = Replica(site.control, "late")
        late.problem = "not here"
        assert await late.join() == {}
        answer = await changing  # although the first one is silent: there is a reason
        assert answer["reasons"] == {"node-late": "not here"}
        late.problem, replicas[0].is_silent = "", False
        site.now += module.REASONS_S
        assert (await site.control.change("deploy", DEPLOY))["generation"] == 2
        assert late.generation == 2
        behind = Replica(site.control, "behind")
        told = await behind.join()
        assert told["phase"] == "behind" and told["state"]["generation"] == 2
        assert late.task is not None
        late.task.cancel()

    async def turning(site: Site, replicas: list[Replica]) -> None:
        async def turn() -> None:
            while True:
                await asyncio.sleep(0.05)
                site.now += 0.5

        clock = asyncio.ensure_future(turn())
        await scenario(site, replicas)
        clock.cancel()

    run(tmp_path, turning, count=1)


def test_a_control_that_begins_again_knows_what_was_committed(tmp_path: Path) -> None:
    async def scenario(site: Site, replicas: list[Replica]) -> None:
        assert (await site.control.change("deploy", DEPLOY))["generation"] == 2
        again = Site(tmp_path, site.kept)
        assert (await again.control.poll("0", "x", "base"))["phase"] == "unknown"
        assert (await again.control.admit("0", "node-0", "base", 1))["state"]["generation"] == 2
        assert await again.control.admit("0", "node-0", "base", 2) == {}
        assert (await again.control.status())["generation"] == 2

    run(tmp_path, scenario)


def test_replicas_with_other_arguments_begin_anew(tmp_path: Path) -> None:
    async def scenario(site: Site, replicas: list[Replica]) -> None:
        assert await site.control.committed("other") is None
        found = await site.control.seed(State.first("other", (A2,)).to_json())
        assert found["generation"] == 2 and found["base"] == "other"
        assert (await site.control.poll("0", replicas[0].seen, "base"))["phase"] == "leave"
        assert (await site.control.admit("0", "node-0", "base", 1))["phase"] == "leave"

    run(tmp_path, scenario)


def test_an_answer_that_comes_late_or_twice_says_nothing_of_what_came_after_it(tmp_path: Path) -> None:
    async def scenario(site: Site, replicas: list[Replica]) -> None:
        control = site.control
        assert await control.admit("0", "node-0", "base", 1) == {}
        seen = (await control.poll("0", "", "base"))["id"]
        changing = asyncio.ensure_future(control.change("deploy", DEPLOY))
        prepare = await control.poll("0", seen, "base")
        await control.answer("0", prepare["id"], 1, "")
        serve = await control.poll("0", prepare["id"], "base")
        assert (prepare["phase"], serve["phase"]) == ("prepare", "serve")
        await control.answer("0", serve["id"], 2, "")
        await control.answer("0", prepare["id"], 1, "an old problem")
        answer = await changing
        assert answer["generation"] == 2 and answer["silent"] == {}, answer
        assert [each["generation"] for each in (await control.status())["replicas"]] == [2]

    run(tmp_path, scenario, count=0)


def test_a_replica_that_waits_is_not_given_what_others_serve(tmp_path: Path) -> None:
    async def scenario(site: Site, replicas: list[Replica]) -> None:
        seen = (await site.control.poll("0", "", "base"))["id"]
        waiting = asyncio.ensure_future(site.control.poll("0", seen, "base"))
        await asyncio.sleep(0)
        await site.control.seed(State.first("other", (A2,)).to_json())
        assert await waiting == {"phase": "leave"}
        assert not (await site.control.status())["replicas"]

    run(tmp_path, scenario, count=1)


def test_a_state_that_cannot_be_written_down_is_served_by_nobody(tmp_path: Path) -> None:
    async def scenario(site: Site, replicas: list[Replica]) -> None:
        def full(content: bytes) -> None:
            raise OSError(28, "No space left on device")

        site.control._keep = full
        answer = await site.control.change("deploy", DEPLOY)
        assert answer["generation"] == 1
        assert "No space left on device" in answer["reasons"]["control"]
        assert [each.phases[-2:] for each in replicas] == [["prepare", "serve"]] * 2  # what was loaded can go
        assert [each.generation for each in replicas] == [1, 1]
        site.control._keep = site.kept.append
        assert (await site.control.change("deploy", DEPLOY))["generation"] == 2

    run(tmp_path, scenario)


def test_one_that_joins_while_a_state_is_written_down_loads_that(tmp_path: Path) -> None:
    async def scenario(site: Site, replicas: list[Replica]) -> None:
        begun, goes_on = threading.Event(), threading.Event()

        def slow(content: bytes) -> None:
            begun.set()
            goes_on.wait()

        site.control._keep = slow
        changing = asyncio.ensure_future(site.control.change("deploy", DEPLOY))
        await asyncio.to_thread(begun.wait)
        joining = asyncio.ensure_future(site.control.admit("late", "node-late", "base", 1))
        await asyncio.sleep(0)
        goes_on.set()
        told = await joining  # it has prepared nothing
        assert told["phase"] == "behind" and told["state"]["generation"] == 2
        assert not (await changing)["silent"]

    run(tmp_path, scenario)


def test_several_may_send_an_archive_at_the_same_time(tmp_path: Path) -> None:
    data = bytes(each * each % 251 for each in range(16384))
    key = hashlib.sha256(data).hexdigest()
    half = len(data) // 2

    async def scenario(site: Site, replicas: list[Replica]) -> None:
        receive = site.stock.receive
        await asyncio.gather(*(receive(key, "a.mar", len(data), 0, data[:half]) for _ in range(3)))
        for _ in range(2):  # the second one sends what is there already
            await receive(key, "a.mar", len(data), half, data[half:])
        assert await site.stock.part(key, "a.mar", 0, "one") == data
        with pytest.raises(ModelLoadError, match="a part of it is missing"):
            await receive("1" * 64, "a.mar", len(data), half, data[half:])
        await receive(key, "b.mar", len(data), 0, data[:half])  # the same under another name
        with pytest.raises(ModelLoadError, match="a part of it is missing"):
            await receive(key, "b.mar", len(data), half + 1, data[half + 1 :])
        await receive(key, "b.mar", len(data), half, data[half:])  # whom that has not harmed
        assert await site.stock.has(key, "b.mar")

    run(tmp_path, scenario)
    assert not list(tmp_path.rglob(".draft-*"))


def test_another_one_is_asked_for_an_archive_whose_sender_is_gone(tmp_path: Path) -> None:
    key = hashlib.sha256(b"12").hexdigest()

    async def scenario(site: Site, replicas: list[Replica]) -> None:
        stock = site.stock
        stock.want(key, "a.mar")
        assert stock.wanted_of_one() == [(key, "a.mar")]
        assert stock.wanted_of_one() == []
        site.now += stock_module.BEGUN_S
        assert stock.wanted_of_one() == [(key, "a.mar")]
        await stock.receive(key, "a.mar", 2, 0, b"1")
        site.now += stock_module.STALLED_S - 1
        assert stock.wanted_of_one() == []
        site.now += 1
        assert stock.wanted_of_one() == [(key, "a.mar")]
        await stock.receive(key, "a.mar", 2, 0, b"12")
        assert stock.wanted_of_one() == [] and await stock.has(key, "a.mar")

    run(tmp_path, scenario)


def test_an_archive_that_nobody_completes_is_given_up(tmp_path: Path) -> None:
    def drafts() -> list[Path]:
        return list(tmp_path.rglob(".draft-*"))

    async def scenario(site: Site, replicas: list[Replica]) -> None:
        await site.stock.receive("1" * 64, "a.mar", 2, 0, b"1")
        site.stock.forget(())
        assert drafts()
        site.now += stock_module.ABANDONED_S
        site.stock.forget(())
        assert not drafts()

    run(tmp_path, scenario)


def test_an_archive_comes_whole_or_not_at_all(tmp_path: Path) -> None:
    data = bytes(range(256)) * 64
    key = hashlib.sha256(data).hexdigest()

    async def scenario(site: Site, replicas: list[Replica]) -> None:
        half = len(data) // 2
        await site.stock.receive(key, "a.mar", len(data), 0, data[:half])
        assert not await site.stock.has(key, "a.mar")
        await site.stock.receive(key, "a.mar", len(data), half, data[half:])
        assert await site.stock.has(key, "a.mar")
        assert await site.stock.part(key, "a.mar", 0, "one") == data
        assert await site.stock.part(key, "a.mar", len(data), "one") == b""
        assert site.stock.sent == {key: {"one": len(data)}}
        for wrong in (data[1:], data[:-1] + b"x"):
            try:
                await site.stock.receive("0" * 64, "a.mar", len(wrong), 0, wrong)
            except Exception as error:
                assert "came damaged" in str(error)
            else:
                raise AssertionError("it was taken")
        assert not await site.stock.has("0" * 64, "a.mar")

    run(tmp_path, scenario)
    assert not list(tmp_path.rglob(".draft-*"))


def test_what_is_not_served_any_more_goes_after_a_while(tmp_path: Path) -> None:
    node = NodeArchives(tmp_path)
    old = time.time() - 7200
    for key in ("a" * 64, "b" * 64, "c" * 64):
        node.path(key, "m.mar").parent.mkdir(parents=True)
        node.path(key, "m.mar").write_bytes(b"x")
        (node.folder(key) / ".draft-1").write_bytes(b"left")
    for key in ("a" * 64, "b" * 64):
        os.utime(node.folder(key) / ".draft-1", (old, old))
        os.utime(node.folder(key), (old, old))
    node.remove_others({"a" * 64})
    assert sorted(each.name for each in node.folder("a" * 64).iterdir()) == ["m.mar"]
    assert not node.folder("b" * 64).exists()
    assert sorted(each.name for each in node.folder("c" * 64).iterdir()) == [".draft-1", "m.mar"]


def test_a_full_disk_keeps_nothing_of_an_archive(tmp_path: Path) -> None:
    draft = NodeArchives(tmp_path).draft("0" * 64, "a.mar", 1)
    draft._file.close()
    draft._file = Path("/dev/full").open("wb")  # noqa: SIM115
    draft.write(b"x")  # which waits in memory, and is refused at the end
    with pytest.raises(ModelLoadError, match="No space left on device"):
        draft._sha256 = draft._digest.hexdigest()
        draft.commit()
    draft.close()
    assert not list(tmp_path.rglob(".draft-*"))


def test_what_is_being_brought_stays(tmp_path: Path) -> None:
    """A transfer of hours, and a clock that jumps."""
    node = NodeArchives(tmp_path)
    key, other = "a" * 64, "b" * 64
    old = time.time() - 7200
    with node.lock(key):
        for each in (key, other):
            node.folder(each).mkdir()
            (node.folder(each) / ".draft-1").write_bytes(b"x")
            os.utime(node.folder(each) / ".draft-1", (old, old))
            os.utime(node.folder(each), (old, old))
        (node.folder(other) / ".draft-2").write_bytes(b"it still grows")
        os.utime(node.folder(other), (old, old))
        node.remove_others(())
        assert [each.name for each in node.folder(key).iterdir()] == [".draft-1"]
        assert [each.name for each in node.folder(other).iterdir()] == [".draft-2"]
    node.remove_others(())
    assert not node.folder(key).exists() and not (node.folder(key).with_suffix(".lock")).exists()


def test_a_lock_whose_file_is_removed_meanwhile_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = NodeArchives(tmp_path)
    path = tmp_path / "cluster" / f"{'a' * 64}.lock"
    flock = fcntl.flock
    taken: list[int] = []

    def waited(descriptor: int, how: int) -> None:
        flock(descriptor, how)
        taken.append(descriptor)
        if len(taken) == 1:
            path.unlink()  # as `remove_others` does, which held it until now

    monkeypatch.setattr(fcntl, "flock", waited)
    with node.lock("a" * 64):
        assert len(taken) == 2 and path.exists()


def test_a_url_is_kept_where_the_control_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("u", "1", "u.mar", sha256="c" * 64, url="https://x/u.mar")
    old = time.time() - 7200

    async def scenario(site: Site, replicas: list[Replica]) -> None:
        folder = NodeArchives(tmp_path).folder(entry.archive_key)
        folder.mkdir(parents=True)
        os.utime(folder, (old, old))
        removed = threading.Event()
        node = NodeArchives(tmp_path)

        def remove_others(kept: Collection[str]) -> None:
            node.remove_others(kept)
            removed.set()

        monkeypatch.setattr(site.stock._archives, "remove_others", remove_others)
        assert not (await site.control.change("add", {"entry": asdict(entry)}))["silent"]
        await asyncio.to_thread(removed.wait)
        assert folder.is_dir()
