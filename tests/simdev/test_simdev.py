"""The simulated accelerator itself: what tests rely on when they say that something is right on a device."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.simdev import build

pytestmark = pytest.mark.accelerator
DEVICE = "simdev:0"


def run(source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process that has the device."""
    return subprocess.run(
        [sys.executable, "-c", "import torch\n" + source], env={**os.environ, **build.environment(), **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def pinned(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, pin_memory=True)


def synchronize() -> None:
    torch.accelerator.synchronize(DEVICE)


def code_of(error: Any) -> int:
    """The driver's number, which torch's annotations do not have."""
    return int(error.error_code)


@pytest.fixture
def layer(simdev: Any) -> torch.nn.Linear:
    """On the device, run once, so that its operators are queued from now on."""
    layer = torch.nn.Linear(8, 3).to(DEVICE)
    with torch.inference_mode():
        layer(torch.ones(4, 8, device=DEVICE))
    return layer


# --- streams ----------------------------------------------------------------------------------------------------------


def test_torch_sees_the_device_in_the_fixture_only() -> None:
    from tests.simdev.device import real_accelerator, simulated

    if real_accelerator() is not None:
        pytest.skip("torch has a real accelerator")
    with simulated():
        assert torch.accelerator.device_count() == 2
        assert str(torch.accelerator.current_accelerator(check_available=True)) == "simdev"
    assert torch.accelerator.device_count() == 0 and not torch.accelerator.is_available()


def test_what_is_queued_is_seen_only_after_waiting(simdev: Any, layer: torch.nn.Linear) -> None:
    x = torch.randn(4, 8)
    expected = torch.nn.functional.linear(x, layer.weight.cpu(), layer.bias.cpu())
    on_device, got = x.to(DEVICE), pinned(4, 3)
    simdev.fault("hang device=0")
    with torch.inference_mode():
        got.copy_(layer(on_device), non_blocking=True)
        assert not torch.accelerator.current_stream(DEVICE).query()
        assert bool((got < -1e22).all()), "the target of a copy must be poisoned until the copy is over"
        simdev.fault("release device=0")
        synchronize()
    torch.testing.assert_close(got, expected)


def test_streams_wait_for_one_another_only_by_events(simdev: Any, layer: torch.nn.Linear) -> None:
    first, second = torch.Stream(DEVICE), torch.Stream(DEVICE)
    simdev.fault("hang device=0")
    with torch.inference_mode(), first:
        layer(torch.ones(4, 8, device=DEVICE))
    with second:
        torch.ones(2).to(DEVICE)
        second.synchronize()  # the other one hangs
        waits = first.record_event()
        second.wait_event(waits)
        assert not second.query()
        simdev.fault("release")
        second.synchronize()
    assert first.query()


def test_memory_that_is_freed_too_early_gives_wrong_numbers(simdev: Any) -> None:
    producer, reader = torch.Stream(DEVICE), torch.Stream(DEVICE)
    with torch.inference_mode():
        with producer:
            data = torch.full((64,), 3.0, device=DEVICE)
            producer.synchronize()
        wanted, got = (pinned(64) for _ in range(2))
        simdev.fault("delay kind=d2h us=20000")
        for is_recorded, target in ((True, wanted), (False, got)):
            copy = data.clone()
            synchronize()
            with producer:
                mine = copy.clone()
                producer.synchronize()
            with reader:
                target.copy_(mine, non_blocking=True)
            if is_recorded:
                mine.record_stream(reader)
            del mine
            synchronize()
    assert bool((wanted == 3).all()) and not bool((got == 3).any())


def test_a_host_that_touches_device_memory_ends_at_once() -> None:
    ended = run("import ctypes\nx = torch.ones(4, device='simdev:0')\nprint(x.cpu().sum().item(), flush=True)\n"
                "ctypes.string_at(x.data_ptr(), 4)")  # fmt: skip
    assert ended.stdout == "4.0\n" and ended.returncode == -signal.SIGSEGV


def test_conjugates_are_copied_as_what_they_stand_for(simdev: Any) -> None:
    x = torch.randn(4, dtype=torch.complex64)
    on_device = x.to(DEVICE)
    assert torch.equal(on_device.conj().resolve_conj().cpu(), x.conj().resolve_conj())
    assert torch.equal((on_device.conj() * 2).cpu(), x.conj() * 2)
    assert torch.equal(on_device.conj().imag.cpu(), x.conj().imag.resolve_neg())


def test_timing_events_count_what_the_device_did(simdev: Any, layer: torch.nn.Linear) -> None:
    begin, end = (torch.Event(DEVICE, enable_timing=True) for _ in range(2))
    x = torch.ones(4, 8, device=DEVICE)
    simdev.fault("delay kind=op us=3000")
    with torch.inference_mode():
        begin.record()
        layer(x)
        end.record()
        end.synchronize()
    assert begin.elapsed_time(end) >= 3
    with pytest.raises(ValueError, match="timing"):
        torch.accelerator.current_stream(DEVICE).record_event().elapsed_time(end)


def test_the_same_seed_gives_the_same_delays(simdev: Any, layer: torch.nn.Linear) -> None:
    def delays(seed: int) -> list[tuple[str, int]]:
        synchronize()  # the layer's parameters, and what tests before have left, are on the device
        simdev.fault(f"random seed={seed} max_us=300")
        simdev.trace(True)
        simdev.take_spans()
        with torch.inference_mode(), torch.Stream(DEVICE):
            for _ in range(20):
                layer(torch.ones(4, 8).to(DEVICE)).cpu()
        # Not the events: the last ones are recorded for memory that is freed, and nobody waits for them.
        return [(kind, delay) for _, _, kind, *_, delay in simdev.take_spans() if kind != "event"]

    first, again, other = delays(5), delays(5), delays(6)
    assert first == again and len(first) == len(other) and first != other
    assert any(delay > 0 for _, delay in first)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_counted_for_each_device(simdev: Any) -> None:
    before = [torch.accelerator.memory_allocated(i) for i in range(2)]
    block = torch.empty(1 << 20, dtype=torch.uint8, device="simdev:1")
    assert torch.accelerator.memory_allocated("simdev:1") - before[1] == 1 << 20
    assert torch.accelerator.memory_allocated("simdev:0") == before[0]
    reserved, allocated = torch.accelerator.memory_reserved("simdev:1"), simdev.counters(1)["driver_allocations"]
    del block
    again = torch.empty(1 << 20, dtype=torch.uint8, device="simdev:1")
    assert simdev.counters(1)["driver_allocations"] == allocated, "the cache has it"
    del again
    torch.accelerator.empty_cache()
    assert torch.accelerator.memory_reserved("simdev:1") <= reserved - (1 << 20)
    free, total = torch.accelerator.get_memory_info("simdev:1")
    assert total - free == torch.accelerator.memory_reserved("simdev:1")


def test_a_device_has_no_more_memory_than_its_limit(simdev: Any) -> None:
    torch.accelerator.empty_cache()
    simdev.fault(f"memory device=0 bytes={torch.accelerator.memory_reserved(DEVICE) + (3 << 20)}")
    kept = torch.empty(2 << 20, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError, match=r"simdev out of memory\. Tried to allocate 2097152 bytes"):
        torch.empty(2 << 20, dtype=torch.uint8, device=DEVICE)
    del kept
    torch.empty(3 << 20, dtype=torch.uint8, device=DEVICE)  # what is cached is given back for it
    torch.empty(2 << 20, dtype=torch.uint8, device="simdev:1")


def test_allocations_launches_and_pinned_memory_fail_when_asked_to(simdev: Any, layer: torch.nn.Linear) -> None:
    x = torch.ones(4, 8, device=DEVICE)
    simdev.fault("fail_allocation at=1 count=2")
    torch.empty(4, device=DEVICE)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(4, device=DEVICE)
    torch.empty(4, device=DEVICE)
    simdev.fault("fail_launch device=0")
    with torch.inference_mode(), pytest.raises(torch.AcceleratorError, match="out of memory") as failed:
        layer(x)
    assert code_of(failed.value) == 2
    simdev.fault("pinned bytes=1000")
    with pytest.raises(torch.AcceleratorError, match="out of memory"):
        pinned(1 << 25)  # larger than what other tests have left in the cache


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_broken_device_refuses_everything_and_the_other_goes_on(simdev: Any, layer: torch.nn.Linear) -> None:
    x = torch.ones(4, 8, device=DEVICE)
    synchronize()  # what fills it is an operator, too
    simdev.fault("break device=0 at=1")
    with torch.inference_mode():
        layer(x)
        synchronize()
        layer(x)
        for call in (synchronize, lambda: layer(x), lambda: torch.empty(3, device=DEVICE), x.cpu):
            with pytest.raises(torch.AcceleratorError, match="device-side assert") as failed:
                call()
            assert code_of(failed.value) == 710
        assert torch.ones(3, device="simdev:1").cpu().sum() == 3
    assert simdev.is_broken(0) and not simdev.is_broken(1)


BREAK = """
import simdev
with torch.inference_mode():
    stream = torch.Stream("simdev:0")
    x = torch.ones(3, device="simdev:0")
    x.record_stream(stream)
    simdev.fault("strict_free on=%d")
    simdev.fault("break")
    try:
        (x + 1).cpu()
    except torch.AcceleratorError:
        pass
    del x
print("freed")
"""


def test_freeing_memory_of_a_broken_device_raises_only_if_it_is_strict() -> None:
    assert run(BREAK % 0).stdout == "freed\n"
    strict = run(BREAK % 1)
    assert strict.returncode == -signal.SIGABRT and not strict.stdout


def test_tensors_of_two_devices_are_refused_in_torchs_words(simdev: Any, layer: torch.nn.Linear) -> None:
    for other in ("cpu", "simdev:1"):
        with pytest.raises(RuntimeError, match=f"Expected all tensors to be on the same device.*{other}"):
            layer(torch.ones(4, 8, device=other))


def test_an_unknown_fault_is_an_error(simdev: Any) -> None:
    for line in ("brake", "delay us=3", "delay kind=x us=3"):
        with pytest.raises(RuntimeError, match="simdev: "):
            simdev.fault(line)


# --- graphs -----------------------------------------------------------------------------------------------------------

needs_graphs = pytest.mark.skipif(not hasattr(torch.accelerator, "Graph"), reason="this torch has no generic graphs")


@needs_graphs
def test_a_graph_is_replayed_on_what_its_buffer_holds_then(simdev: Any, layer: torch.nn.Linear) -> None:
    static, stream = torch.zeros(4, 8, device=DEVICE), torch.Stream(DEVICE)
    graph = torch.accelerator.Graph(capture_error_mode="thread_local")
    with torch.inference_mode(), stream:
        with graph:
            out = layer(static)
        for i in range(4):
            static.copy_(torch.full((4, 8), float(i)))
            before = simdev.counters(0)["launches"]
            graph.replay()
            assert simdev.counters(0)["launches"] == before + 1
            torch.testing.assert_close(out.cpu(), layer(static).cpu())


@needs_graphs
@pytest.mark.parametrize(
    ("mode", "is_other_thread", "is_allowed"),
    [("global", True, False), ("thread_local", True, True), ("thread_local", False, False), ("relaxed", True, True)],
)  # fmt: skip
def test_a_capture_forbids_waiting(
    simdev: Any, layer: torch.nn.Linear, mode: Any, is_other_thread: bool, is_allowed: bool
) -> None:
    x, stream = torch.ones(4, 8, device=DEVICE), torch.Stream(DEVICE)
    failed: list[Exception] = []

    def wait() -> None:
        try:
            torch.accelerator.synchronize("simdev:1")
        except torch.AcceleratorError as error:
            failed.append(error)

    def during(call: Callable[[], None]) -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    def capture() -> None:
        with torch.inference_mode(), stream, torch.accelerator.Graph(capture_error_mode=mode):
            layer(x)
            during(wait) if is_other_thread else wait()

    if is_allowed:
        capture()
    else:
        with pytest.raises(torch.AcceleratorError, match="previous error during capture"):
            capture()
    assert bool(failed) != is_allowed
    with torch.inference_mode(), stream, torch.accelerator.Graph(capture_error_mode=mode):
        layer(x)  # the next one is none the worse


@needs_graphs
def test_another_threads_allocation_spoils_a_capture_in_global_mode(simdev: Any, layer: torch.nn.Linear) -> None:
    x, stream = torch.ones(4, 8, device=DEVICE), torch.Stream(DEVICE)
    failed: list[Exception] = []
    sizes = iter((12_345_601, 23_456_702))  # nothing of these sizes is cached

    def allocate() -> None:
        try:
            torch.empty(next(sizes), device=DEVICE)
        except torch.AcceleratorError as error:
            failed.append(error)

    def capture(mode: Any) -> None:
        with torch.inference_mode(), stream, torch.accelerator.Graph(capture_error_mode=mode):
            layer(x)
            thread = threading.Thread(target=allocate)
            thread.start()
            thread.join()

    with pytest.raises(torch.AcceleratorError, match="previous error during capture"):
        capture("global")
    assert failed
    capture("thread_local")
    assert len(failed) == 1


# --- other processes --------------------------------------------------------------------------------------------------


def test_a_child_process_has_the_device_by_itself() -> None:
    ended = run("print(torch.accelerator.device_count(), torch.ones(3, device='simdev:2').cpu().sum().item())",
                SIMDEV_DEVICES="3")  # fmt: skip
    assert ended.stdout == "3 3.0\n", ended.stderr


def test_a_child_process_may_be_given_faults(tmp_path: Path) -> None:
    path = tmp_path / "faults"
    source = f"""
import os, simdev, time
x = torch.ones(3, device='simdev:0')
path = {str(path)!r}
open(path + ".other", "w").write(f"break pid={{os.getpid() + 1}}")
os.rename(path + ".other", path)
open(path + ".new", "w").write(f"break device=0 pid={{os.getpid()}}")
time.sleep(0.05)
assert os.path.exists(path), "the fault of another process was taken"
os.rename(path + ".new", path)
while not os.path.exists(path + ".taken"):
    time.sleep(0.001)
try:
    while True:
        (x + 1).cpu()
except torch.AcceleratorError:
    print("broken", torch.accelerator.get_memory_info(1)[1])
"""
    ended = run(source, SIMDEV_FAULTS=str(path), SIMDEV_START="memory device=1 bytes=5000000; delay kind=h2d us=10")
    assert ended.stdout == "broken 5000000\n", ended.stderr


def test_a_fork_of_a_process_that_has_used_the_device_may_not() -> None:
    source = """
import os
assert not torch.simdev.is_initialized() and not torch.simdev._is_in_bad_fork()
if os.fork() == 0:  # not used yet
    assert torch.ones(3, device="simdev:0").cpu().sum() == 3
    os._exit(0)
assert os.wait()[1] == 0
torch.ones(3, device="simdev:0")
assert torch.simdev.is_initialized()
if os.fork() == 0:
    assert torch.simdev._is_in_bad_fork()
    try:
        torch.ones(3, device="simdev:0")
    except RuntimeError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    ended = run(source)
    assert "Cannot re-initialize simdev in forked subprocess" in ended.stdout and ended.returncode == 0, ended.stderr


def test_it_is_built_again_only_when_something_has_changed() -> None:
    extension = build.built() / build.EXTENSION
    before = extension.stat().st_mtime_ns
    assert build.built() / build.EXTENSION == extension and extension.stat().st_mtime_ns == before
