"""Replicas in one process, with real engines and a control that they reach without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pyserve.errors import ModelLoadError
from pyserve.replicas import control as module
from pyserve.replicas.archives import Draft, NodeArchives
from pyserve.replicas.bringing import looked_at
from pyserve.replicas.clustered import GenerationApplication, MemberEngine
from pyserve.replicas.control import Control
from pyserve.replicas.link import LinkError
from pyserve.replicas.member import Member
from pyserve.replicas.state import Entry, State
from pyserve.replicas.stock import Stock
from pyserve.serving import ServingError
from tests.support.handler_archives import write_handler

pytestmark = pytest.mark.slow

HANDLER = """
def handle(data, context):
    return ["version VERSION"] * len(data) if data else None
"""
BROKEN = "raise RuntimeError('it is broken')\n"


def archive(folder: Path, version: str, source: str = HANDLER) -> Path:
    folder.mkdir(exist_ok=True)
    return write_handler(folder, "m", source.replace("VERSION", version), version=version, file=f"m-{version}")


class Wire:
    """A `Link` that can be cut."""

    def __init__(self, site: Site):
        self.site = site
        self.is_cut = False
        self.misses_what_follows = False
        self.polls_go = asyncio.Event()
        self.polls_go.set()

    async def call(self, method: str, *arguments: Any) -> Any:
        if self.is_cut:
            raise LinkError("it is cut")
        if self.misses_what_follows and method == "answer" and self.site.control._directive["phase"] == "prepare":
            self.misses_what_follows = False
            self.polls_go.clear()
        if method == "poll":
            while True:
                told = await self.site.control.poll(*arguments)
                if self.polls_go.is_set():
                    return copy.deepcopy(told)
                await self.polls_go.wait()  # and what was said has been missed
        return copy.deepcopy(
            await getattr(self.site.control, method)(*arguments)
        )  # what crosses is nobody's own object

    async def taken(self, shared: Any) -> bytes:
        data: bytes = shared
        return data


class Node(NodeArchives):
    """A machine that may have no room, or take its time."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.has_room = True
        self.held: asyncio.Event | None = None
        self.began = 0

    def draft(self, sha256: str, file: str, size: int) -> Draft:
        self.began += 1
        if not self.has_room:
            raise ModelLoadError(f"{file} cannot be kept in the cache: the disk is full")
        return super().draft(sha256, file, size)


class Site:
    """A cluster of one process."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.kept: list[bytes] = []
        self.control: Any = None
        self.engines: list[MemberEngine] = []
        self.members: list[Member] = []
        self.wires: list[Wire] = []
        self.begin_control()

    def begin_control(self, name: str = "control") -> None:
        stock = Stock(NodeArchives(self.folder / name), lambda data: data)
        self.control = Control(self.kept.append, self.kept[-1] if self.kept else None, stock)

    async def bring(self, path: Path) -> Entry:
        entry, file = looked_at(str(path))
        assert file is not None
        data = file.read_bytes()
        await self.control.receive(entry.sha256, entry.file, len(data), 0, data)
        return entry

    async def begin(self, *paths: Path) -> None:
        entries = [await self.bring(path) for path in paths]
        await self.control.seed(State.first("base", tuple(entries)).to_json())

    async def replica(self, node: Node, *, base: str = "base", models: tuple[str, ...] = ()) -> int:
        """A new replica's number."""
        number = len(self.members)
        wire = Wire(self)
        member = Member(wire, id=str(number), node=f"node-{number}", base=base, archives=node)
        config = {
            "cpu_budget": 1, "disable_token_authorization": True, "enable_model_api": True, "allowed_urls": "file:///.*",
        }  # fmt: skip
        engine = MemberEngine(models, config, member)
        self.engines.append(engine)
        self.members.append(member)
        self.wires.append(wire)
        await engine.start()
        return number

    async def deploy(self, path: Path, **more: Any) -> dict[str, Any]:
        entry = await self.bring(path)
        found: dict[str, Any] = await self.control.change("deploy", {"entry": asdict(entry), **more}, 120.0)
        return found

    async def ask(self, number: int, method: str, path: str, body: bytes = b"") -> tuple[int, str, int]:
        """Status, body and generation."""
        names = ["inference", "management", "metrics"]
        member = self.members[number]
        application = GenerationApplication(self.engines[number], names, lambda: member.generation)
        target, _, query = path.partition("?")
        scope = {
            "type": "http", "method": method, "path": target, "raw_path": target.encode(),
            "query_string": query.encode(), "http_version": "1.1", "scheme": "http", "client": ("10.0.0.1", 9),
            "headers": [(b"host", b"x"), (b"content-length", str(len(body)).encode())],
        }  # fmt: skip
        came: list[dict[str, Any]] = []
        todo = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if todo:
                return todo.pop()
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            came.append(message)

        await application(scope, receive, send)
        headers = dict(came[0]["headers"])
        text = b"".join(each.get("body", b"") for each in came[1:]).decode()
        return came[0]["status"], text, int(headers[b"pyserve-generation"])

    async def has_replicas(self, count: int) -> None:
        """Returns when the control knows so many."""
        while len((await self.control.status())["replicas"]) != count:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    async def predict(self, number: int) -> tuple[int, str, int]:
        return await self.ask(number, "POST", "/predictions/m", b"x")


@contextlib.asynccontextmanager
async def site_in(folder: Path) -> AsyncIterator[Site]:
    site = Site(folder)
    try:
        yield site
    finally:
        for wire in site.wires:
            wire.is_cut = False
        for engine in site.engines:
            await engine.stop()


def run(folder: Path, scenario: Callable[[Site], Awaitable[None]]) -> None:
    async def main() -> None:
        async with site_in(folder) as site:
            await scenario(site)

    asyncio.run(asyncio.wait_for(main(), 300))


def test_versions_switch_on_all_replicas_or_on_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered once, and switched under load: each answer is of the generation that it says it is of."""
    monkeypatch.setattr(module, "REASONS_S", 120.0)  # every reason is compared, however slow the machine is
    versions = [archive(tmp_path / "given", each) for each in ("1", "2", "3")]
    broken = archive(tmp_path / "given", "4", BROKEN)
    nodes = [Node(tmp_path / "one"), Node(tmp_path / "two")]

    async def scenario(site: Site) -> None:
        await site.begin(versions[0])
        for node in nodes:
            await site.replica(node)
        await site.replica(nodes[1])  # beside the other one
        assert [await site.predict(number) for number in range(3)] == [(200, "version 1", 1)] * 3
        assert [node.began for node in nodes] == [1, 1]

        seen: list[tuple[int, str, int]] = []
        ends = asyncio.Event()

        async def load(number: int) -> None:
            while not ends.is_set():
                seen.append(await site.predict(number))
                await asyncio.sleep(0.005)

        loading = [asyncio.ensure_future(load(number)) for number in range(3)]
        answer = await site.deploy(versions[1])
        after = len(seen)
        assert answer["generation"] == 2 and not answer["silent"], answer
        for _ in range(20):
            await asyncio.sleep(0.01)
        nodes[1].has_room = False
        refused = await site.deploy(versions[2])
        assert refused == {"generation": 2, "reasons": {
            "node-1": "m 3: m-3.mar cannot be kept in the cache: the disk is full",
            "node-2": "m 3: m-3.mar cannot be kept in the cache: the disk is full",
        }}  # fmt: skip
        nodes[1].has_room = True
        refused = await site.deploy(broken)
        assert (
            set(refused["reasons"]) == {"node-0", "node-1", "node-2"} and "it is broken" in refused["reasons"]["node-0"]
        )
        ends.set()
        await asyncio.gather(*loading)
        in_flight = 3
        assert {status for status, _, _ in seen} == {200}
        assert {text == f"version {generation}" for _, text, generation in seen} == {True}
        assert {generation for *_, generation in seen[after + in_flight :]} == {2}

        assert json.loads((await site.ask(1, "GET", "/ready"))[1]) == {"status": "Ready", "generation": 2}
        for engine in site.engines:
            served = [(model.name, model.version) for model in engine.running.server.registry.all_models()]
            assert served == [("m", "2")]

    run(tmp_path, scenario)


def test_one_that_is_late_ends_on_what_was_committed(tmp_path: Path) -> None:
    first, second = (archive(tmp_path / "given", each) for each in ("1", "2"))
    node = Node(tmp_path / "one")

    async def scenario(site: Site) -> None:
        await site.begin(first)
        await site.replica(node)
        joining = asyncio.ensure_future(site.replica(Node(tmp_path / "two")))
        await asyncio.sleep(0)
        answer = await site.deploy(second)
        assert answer["generation"] == 2
        assert await joining == 1
        assert await site.predict(1) == (200, "version 2", 2)
        assert await site.replica(Node(tmp_path / "three")) == 2
        assert await site.predict(2) == (200, "version 2", 2)

    run(tmp_path, scenario)


def test_the_control_may_die_and_lose_its_disk(tmp_path: Path) -> None:
    """What is served is served on; the next control has the state, and what it lacks from a replica's node."""
    first, second = (archive(tmp_path / "given", each) for each in ("1", "2"))

    async def scenario(site: Site) -> None:
        await site.begin(first)
        await site.replica(Node(tmp_path / "one"))
        site.wires[0].is_cut = True
        assert await site.predict(0) == (200, "version 1", 1)
        shutil.rmtree(tmp_path / "control")
        site.begin_control("another")
        site.wires[0].is_cut = False
        assert await site.replica(Node(tmp_path / "two")) == 1  # whose archive has come from the first one's node
        await site.has_replicas(2)
        assert (await site.deploy(second))["replicas"] == 2
        assert await site.predict(0) == (200, "version 2", 2)

        site.kept.clear()  # now all is lost: a replica knows it
        site.begin_control("third")
        await site.has_replicas(2)
        assert (await site.control.status())["generation"] == 2

    run(tmp_path, scenario)


def test_the_first_replica_says_what_its_arguments_mean(tmp_path: Path) -> None:
    path = archive(tmp_path / "given", "1")

    async def scenario(site: Site) -> None:
        await site.replica(Node(tmp_path / "one"), models=(str(path),))
        await site.replica(Node(tmp_path / "two"), models=(str(path),))
        assert await site.predict(1) == (200, "version 1", 1)
        path.rename(path.with_name("moved.mar"))
        with pytest.raises(ServingError, match=r"m 1: .*m-1\.mar is not on this node"):
            await site.replica(Node(tmp_path / "three"), models=(str(path),))
        site.engines.pop(), site.members.pop(), site.wires.pop()
        assert "is not on this node" in (await site.control.status())["failures"]["node-2"]

    run(tmp_path, scenario)


def test_management_calls_to_a_replica_mean_the_cluster(tmp_path: Path) -> None:
    first, second = (archive(tmp_path / "given", each) for each in ("1", "2"))

    async def scenario(site: Site) -> None:
        await site.begin(first)
        for name in ("one", "two"):
            await site.replica(Node(tmp_path / name))
        registry = site.engines[0].running.server.registry
        registry._services.config.model_store = str(tmp_path / "given")
        site.engines[0].running.config.model_store = str(tmp_path / "given")
        status, text, _ = await site.ask(0, "POST", f"/models?url={second.name}&initial_workers=1&synchronous=true")
        assert status == 200, text
        assert [(await site.predict(number))[:2] for number in (0, 1)] == [(200, "version 1")] * 2
        status, text, _ = await site.ask(1, "PUT", "/models/m/2/set-default")
        assert status == 200, text
        assert [(await site.predict(number))[:2] for number in (0, 1)] == [(200, "version 2")] * 2
        status, text, _ = await site.ask(1, "DELETE", "/models/m/2")
        assert status == 403 and "Cannot remove default version" in text
        assert (await site.ask(1, "DELETE", "/models/m/1"))[0] == 200
        assert (await site.ask(0, "GET", "/models/m/1"))[0] == 404
        status, text, _ = await site.ask(0, "PUT", "/models/m?min_worker=2&synchronous=true")
        assert status == 200, text
        described = json.loads((await site.ask(1, "GET", "/models/m"))[1])
        assert described[0]["minWorkers"] == 2 and len(described[0]["workers"]) == 2
        assert (await site.ask(0, "PUT", "/models/m?batch_size=2"))[0] == 405

    run(tmp_path, scenario)


def test_a_sample_must_be_answered_on_every_replica(tmp_path: Path) -> None:
    first = archive(tmp_path / "given", "1")
    second = archive(
        tmp_path / "given", "2", HANDLER.replace("return", "assert not data or data[0]['body'] != b'bad'\n    return")
    )

    async def scenario(site: Site) -> None:
        await site.begin(first)
        await site.replica(Node(tmp_path / "one"))
        sample = {"name": "m", "version": "2", "body": "bad", "type": ""}
        refused = await site.deploy(second, sample={**sample, "body": b"bad"})
        assert "m 2 answers the sample with" in refused["reasons"]["node-0"]
        assert (await site.deploy(second, sample={**sample, "body": b"good"}))["generation"] == 2

    run(tmp_path, scenario)


def test_an_entry_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    first, second = (archive(tmp_path / "given", each) for each in ("1", "2"))

    async def scenario(site: Site) -> None:
        await site.begin(first)
        await site.replica(Node(tmp_path / "one"))
        entry = replace(await site.bring(second), version="3")
        refused = await site.control.change("deploy", {"entry": asdict(entry)}, 60.0)
        assert "holds m 2 on this node, not m 3" in refused["reasons"]["node-0"]
        assert await site.predict(0) == (200, "version 1", 1)

    run(tmp_path, scenario)


def test_each_node_fetches_a_url_once(tmp_path: Path) -> None:
    first, second, third = (archive(tmp_path / "given", each) for each in ("1", "2", "3"))
    entry, file = looked_at(second.as_uri())
    assert entry.key == ("m", "2") and entry.url == second.as_uri() and file is None
    changed, _ = looked_at(third.as_uri())
    third.write_bytes(first.read_bytes())

    async def scenario(site: Site) -> None:
        await site.begin(first)
        for name in ("one", "two"):
            await site.replica(Node(tmp_path / name))
        assert (await site.control.change("deploy", {"entry": asdict(entry)}, 60.0))["generation"] == 2
        assert [(await site.predict(number))[:2] for number in (0, 1)] == [(200, "version 2")] * 2
        assert (await site.control.status())["models"][0]["durable"]
        [model] = site.engines[0].running.server.registry.default_models()
        assert model.url == second.as_uri()
        second.rename(second.with_name("gone"))
        await site.replica(Node(tmp_path / "one"))  # where it is already
        with pytest.raises(ServingError, match="m 2"):
            await site.replica(Node(tmp_path / "three"))
        site.engines.pop(), site.members.pop(), site.wires.pop()
        refused = await site.control.change("deploy", {"entry": asdict(changed)}, 60.0)
        assert "its URL has another archive by now" in refused["reasons"]["node-0"]

    run(tmp_path, scenario)


def test_a_version_that_went_and_came_again_is_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the replica has heard of the two changes only after both had begun."""
    monkeypatch.setattr(module, "COMMIT_S", 0.1)
    old = archive(tmp_path / "given", "1")
    new = archive(tmp_path / "other", "1", HANDLER.replace("version", "another"))

    async def scenario(site: Site) -> None:
        await site.begin(old)
        await site.replica(Node(tmp_path / "one"))
        wire = site.wires[0]
        wire.misses_what_follows = True
        answer = await site.control.change("remove", {"name": "m"}, 60.0)
        assert answer["silent"] == {"node-0": "no answer within 0.1 s"}
        monkeypatch.setattr(module, "COMMIT_S", 60.0)
        deploying = asyncio.ensure_future(site.deploy(new))
        while (await site.control.status())["changing"] is False:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        wire.polls_go.set()
        assert (await deploying)["silent"] == {}
        assert await site.predict(0) == (200, "another 1", 3)

    run(tmp_path, scenario)


def test_a_replica_that_cannot_have_the_new_content_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has missed that its version went and came again; what it answers is not called the new generation."""
    monkeypatch.setattr(module, "GONE_S", 0.1)
    old = archive(tmp_path / "given", "1")
    new = archive(tmp_path / "other", "1", HANDLER.replace("version", "another"))

    async def scenario(site: Site) -> None:
        await site.begin(old)
        await site.replica(Node(tmp_path / "one"))
        site.wires[0].is_cut = True
        await site.has_replicas(1)
        assert (await site.control.change("remove", {"name": "m"}, 60.0))["generation"] == 2
        assert (await site.deploy(new))["generation"] == 3
        site.wires[0].is_cut = False
        while not site.members[0].problem:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert "m 1: this replica serves another archive of that version" in site.members[0].problem
        assert await site.predict(0) == (200, "version 1", 1)
        await site.replica(Node(tmp_path / "one"))
        assert await site.predict(1) == (200, "another 1", 3)

    run(tmp_path, scenario)
