"""Work in the background: nothing of it is lost, and a failure is in the log."""

from __future__ import annotations

import asyncio

import pytest

from pyserve.background import Background


def test_what_fails_is_logged_and_what_is_cancelled_is_not(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []

    async def fail() -> None:
        raise ValueError("no room")

    async def work() -> None:
        await asyncio.sleep(0)
        done.append("work")

    async def main() -> None:
        background = Background()
        background.begin(fail(), "unloading m 1.0")
        background.begin(work(), "working")
        await background.finish()
        background.begin(asyncio.Event().wait(), "waiting for ever")
        background.cancel()
        await background.finish()

    asyncio.run(main())
    assert done == ["work"]
    assert [record.getMessage() for record in caplog.records] == ["unloading m 1.0 failed: no room"]
