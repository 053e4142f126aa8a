"""What a server remembers of devices that were lost, and for how long it leaves them alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from pyserve.lanes.batch_ceiling import RETRY_S, BatchCeiling
from pyserve.lanes.limited_runs import EndlessError
from pyserve.lanes.lost_devices import (
    HEALTHY_S,
    PAUSE_FIRST_S,
    PAUSE_MAX_S,
    DeviceLoss,
    DeviceLostError,
    LostDevices,
)

DEVICE, LABEL = "simdev:1", "resnet 1.0"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def in_loop(run: Callable[[], Any]) -> Any:
    async def body() -> Any:
        result = run()
        return await result if asyncio.iscoroutine(result) else result

    return asyncio.run(body())


def lose(kept: bytes | None, clock: Clock, loading: list[str] | None = None, *, is_in_use: bool = True) -> bytes:
    """One server that loses the device."""

    def run() -> bytes:
        devices = LostDevices(kept, clock=clock)
        devices.note(DEVICE, "device-side assert")
        return devices.record(loading or [], is_in_use=is_in_use)

    result: bytes = in_loop(run)
    return result


def left_alone(kept: bytes | None, clock: Clock, device: str = DEVICE) -> str:
    text: str = in_loop(lambda: LostDevices(kept, clock=clock).left_alone(device))
    return text


def refusal(kept: bytes | None, clock: Clock, device: str = DEVICE, label: str = LABEL) -> str:
    def run() -> Any:
        return LostDevices(kept, clock=clock).check(device, label, 1.0)

    try:
        in_loop(run)
    except DeviceLostError as error:
        assert error.may_pass
        return error.message
    return ""


def test_only_the_first_loss_is_what_the_process_is_replaced_for() -> None:
    def run() -> tuple[DeviceLoss, DeviceLoss | None]:
        devices = LostDevices()
        assert not devices.loss.done() and devices.get(DEVICE) is None
        devices.note(DEVICE, "first")
        devices.note(DEVICE, "second")
        devices.note("simdev:0", "third")
        return devices.loss.result(), devices.get("simdev:0")

    first, other = in_loop(run)
    assert first == DeviceLoss(DEVICE, "first") and other == DeviceLoss("simdev:0", "third")


def test_the_third_loss_in_a_row_leaves_the_device_alone_for_longer_and_longer() -> None:
    clock, kept = Clock(), None
    for _ in range(2):
        kept = lose(kept, clock)
        assert not left_alone(kept, clock)
        clock.now += 1
    pauses = []
    for _ in range(8):
        kept = lose(kept, clock)
        text = left_alone(kept, clock)
        assert DEVICE in text and "device-side assert" in text and not left_alone(kept, clock, "simdev:0")
        began = clock.now
        while left_alone(kept, clock):
            clock.now += 1
        pauses.append(clock.now - began)
    assert pauses[:3] == [PAUSE_FIRST_S, 2 * PAUSE_FIRST_S, 4 * PAUSE_FIRST_S] and pauses[-1] == PAUSE_MAX_S


def test_losses_that_are_far_apart_are_none_in_a_row() -> None:
    clock, kept = Clock(), None
    for _ in range(10):
        kept = lose(kept, clock)
        clock.now += HEALTHY_S
        assert not left_alone(kept, clock)


def test_a_model_that_breaks_its_device_while_it_is_loaded_is_left_out_alone() -> None:
    clock = Clock()
    kept = lose(None, clock, [LABEL], is_in_use=False)
    assert LABEL in refusal(kept, clock) and not refusal(kept, clock, label="other 1.0")
    clock.now += PAUSE_FIRST_S
    assert not refusal(kept, clock)
    kept = lose(kept, clock, [LABEL], is_in_use=False)
    clock.now += PAUSE_FIRST_S
    assert refusal(kept, clock), "the second pause is longer"


def test_what_broke_the_device_is_known_also_when_its_load_is_over() -> None:
    async def run() -> bytes:
        devices = LostDevices(None, lambda device, limit_s: ("lost", "assert"), Clock())
        await devices.look(DEVICE, LABEL, RuntimeError("bad"), "bad")
        return devices.record([], is_in_use=False)

    kept = asyncio.run(run())
    assert LABEL in refusal(kept, Clock()) and not left_alone(kept, Clock())


def test_a_device_that_does_not_work_is_none_to_load_a_model_on_and_nothing_is_lost() -> None:
    def run(state: str) -> Any:
        devices = LostDevices(None, lambda device, limit_s: (state, "no such device"))
        return devices.check(DEVICE, LABEL, 0.1)

    in_loop(lambda: run("well"))
    for state in ("lost", "silent"):
        with pytest.raises(DeviceLostError, match="no such device"):
            in_loop(lambda state=state: run(state))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("state", "error", "is_lost"),
    [
        ("well", RuntimeError("bad"), False),
        ("lost", RuntimeError("bad"), True),
        ("silent", RuntimeError("bad"), False),
        ("silent", EndlessError("no end"), True),
        ("lost", DeviceLostError("it was before"), False),
    ],
    ids=["well", "lost", "busy", "endless", "known"],
)
def test_whether_a_load_that_failed_broke_the_device(state: str, error: Exception, is_lost: bool) -> None:
    async def run() -> bool:
        devices = LostDevices(None, lambda device, limit_s: (state, ""))
        await devices.look(DEVICE, LABEL, error, str(error))
        await devices.look("cpu", LABEL, error, str(error))
        return devices.loss.done()

    assert asyncio.run(run()) is is_lost


@pytest.mark.parametrize("kept", [b"", b"{", b"{}", None], ids=["empty", "cut", "none", "no file"])
def test_what_cannot_be_read_is_nothing(kept: bytes | None) -> None:
    assert not refusal(kept, Clock())


class FakeCore:
    def __init__(self) -> None:
        self.ceiling = 0

    def forget_ceiling(self) -> None:
        self.ceiling = 0


def test_the_size_that_fits_is_believed_for_a_while() -> None:
    core = FakeCore()
    ceiling = BatchCeiling(core, "m 1.0")
    assert not ceiling.look(0, 32) and ceiling.limited(32) == 32 and ceiling.note(32) == ""
    core.ceiling = 8
    assert ceiling.look(1, 32) and not ceiling.look(2, 32)
    assert (
        (ceiling.limited(32), ceiling.limited(4)) == (8, 4) and "at most 8" in ceiling.note(32) and not ceiling.note(8)
    )
    assert ceiling.look(1 + int(RETRY_S * 1e9), 32) and ceiling.limited(32) == 32
    core.ceiling = 4
    assert ceiling.look(2 + int(RETRY_S * 1e9), 32) and ceiling.limited(32) == 4
    ceiling.forget()
    assert core.ceiling == 0 and ceiling.limited(32) == 32
