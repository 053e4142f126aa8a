"""What all tests share: the seed that replays random tests, the order, and tests that need an accelerator."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

SEED = int(os.environ.get("PYSERVE_TEST_SEED", "1"))


# A shell that starts the tests in the background has SIGINT ignored. Servers that tests start would inherit that, and
# not hear the Ctrl-C they are sent.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Where it is set, what a process prints is written at once: servers that tests start shall not have it either.
os.environ.pop("PYTHONUNBUFFERED", None)


_ROOT_LEVEL = logging.root.level


@pytest.fixture(autouse=True)
def _records_reach_the_tests() -> Iterator[None]:
    """OpenVINO's converter has the whole process log errors only, and tests after it would see no warnings."""
    logging.root.setLevel(_ROOT_LEVEL)  # each logger forgets what it knows of levels, too
    yield
    silenced = [
        name for name, logger in logging.root.manager.loggerDict.items()
        if name.startswith("pyserve") and isinstance(logger, logging.Logger)
        and (logger.disabled or not logger.propagate or logger.level > logging.WARNING)
    ]  # fmt: skip
    level = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    filters = [each for handler in logging.root.handlers for each in handler.filters]
    for handler in logging.root.handlers:
        handler.filters.clear()
    assert not level and not silenced and not filters, (
        f"it leaves the process without records: {level}, {silenced}, {filters}"
    )


@pytest.fixture
def seed() -> int:
    """For random tests; printed, so that a failure tells how to run it again."""
    print(f"PYSERVE_TEST_SEED={SEED}")
    return SEED


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked ``nightly`` unless ``-m`` names it; any other ``-m`` would replace one of addopts."""
    # What compiles longest begins first: at the end it would keep one process at work while the others have none.
    items.sort(key=lambda item: item.path.name != "test_native.py")
    for item in items:
        if {"accelerator", "simdev"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("accelerator")  # compiles the simulated one, if that has changed
    if "nightly" in config.option.markexpr:
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("nightly") is not None])
    items[:] = [item for item in items if item.get_closest_marker("nightly") is None]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Adds to the report of a failed test that looks for log records why there may have been none."""
    report = yield
    if report.failed and "caplog" in getattr(item, "fixturenames", ()):
        root = logging.root
        handlers = [(type(each).__name__, each.level, each.filters) for each in root.handlers]
        report.sections.append(("logging", f"level {root.level}, disabled {root.manager.disable}, {handlers}"))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Shows each failure when it happens too: of a run that is stopped from outside, the summary never comes."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.when} of {report.nodeid} failed\n{report.longreprtext}", file=sys.__stderr__, flush=True)


def pytest_collection_finish() -> None:
    """Lets Python's garbage collector pass over the objects of torch and of the tests, a million that all stay."""
    gc.collect()
    gc.freeze()
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)  # the other processors have processes of their own


@pytest.fixture
def accelerator() -> Iterator[str]:
    """The name of a device: of the real one where torch has one, else of the simulated one (tests/simdev)."""
    from tests.simdev.device import real_accelerator, simulated

    real = real_accelerator()
    if real is not None:
        yield real
        return
    if os.environ.get("PYSERVE_REQUIRE_GPU") == "1":
        pytest.fail("PYSERVE_REQUIRE_GPU=1, but torch finds no accelerator")
    with simulated():
        yield "simdev:0"


@pytest.fixture
def simdev() -> Iterator[Any]:
    """The simulated accelerator with its delays, faults and counters; its devices are simdev:0 and simdev:1."""
    from tests.simdev.device import real_accelerator, simulated

    if real_accelerator() is not None:
        pytest.skip("torch has a real accelerator, and knows no second one beside it")
    with simulated() as module:
        yield module


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    from tests.simdev.device import real_accelerator  # not above: the process that hands out tests needs no torch

    if real_accelerator() is None:
        if os.environ.get("PYSERVE_REQUIRE_GPU") == "1":
            pytest.fail("PYSERVE_REQUIRE_GPU=1, but torch finds no accelerator")
        pytest.skip("needs a real accelerator")
