"""The control of a cluster while changes wait for each other, and what it knows of archives at the end."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import asdict
from pathlib import Path

from pyserve.replicas.archives import NodeArchives
from pyserve.replicas.state import Entry
from tests.replicas.test_cluster_control import DEPLOY, Replica, Site, prepares, run


def test_the_archives_that_nodes_keep_are_known_until_the_end(tmp_path: Path) -> None:
    """Of what was served and is not any more, of what could not be, and of what was fetched from a URL."""

    async def scenario(site: Site, replicas: list[Replica]) -> None:
        first = Entry("b", "1", "b.mar", sha256="1" * 64)
        far = Entry("b", "2", "b.mar", sha256="2" * 64, url="https://a.example/b.mar")
        broken = Entry("b", "3", "b.mar", sha256="3" * 64)
        for entry in (first, far):
            assert "committed" in await site.control.change("deploy", {"entry": asdict(entry)})
        replicas[0].problem = "it is broken"
        assert "reasons" in await site.control.change("deploy", {"entry": asdict(broken)})
        expected = sorted([first.sha256, broken.sha256, hashlib.sha256(far.url.encode()).hexdigest()])
        assert await site.control.archive_keys() == expected

        archives = NodeArchives(tmp_path / "node")
        for key in (*expected, "4" * 64):
            archives.folder(key).mkdir(parents=True)
            with archives.lock(key):
                pass
        archives.remove([*expected, "5" * 64])
        assert {each.name for each in (tmp_path / "node/cluster").iterdir()} == {"4" * 64, "4" * 64 + ".lock"}

    run(tmp_path, scenario)


def test_changes_that_wait_for_their_turn_are_made_in_order(tmp_path: Path) -> None:
    """As management calls do, one of which may not have been waited for by its caller; commands say it at once."""

    async def scenario(site: Site, replicas: list[Replica]) -> None:
        replicas[0].is_silent = True
        first = asyncio.ensure_future(site.control.change("deploy", DEPLOY))
        await prepares(replicas[0])
        waiting = [
            asyncio.ensure_future(site.control.change("scale", {"name": "a", "workers": count}, 60.0, 60.0))
            for count in (2, 3)
        ]
        refused = await site.control.change("scale", {"name": "a", "workers": 4})
        assert "Another change of the cluster is under way" in refused["error"]
        late = await site.control.change("scale", {"name": "a", "workers": 5}, 60.0, 0.01)
        assert "Another change of the cluster is under way" in late["error"]
        assert not any(each.done() for each in waiting)
        replicas[0].is_silent = False
        await site.control.cancel()
        assert "reasons" in await first
        assert [(await each)["generation"] for each in waiting] == [2, 3]
        state = await site.control.committed("base")
        assert state is not None and state["entries"][0]["workers"] == 3

    run(tmp_path, scenario)
