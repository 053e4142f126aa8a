"""What all tests share: the seed that replays random tests, the order, and tests that need an accelerator."""

from __future__ import annotations

import gc
import os
import signal

import pytest

SEED = int(os.environ.get("PYSERVE_TEST_SEED", "1"))


# A shell that starts the tests in the background has SIGINT ignored. Servers that tests start would inherit that, and
# not hear the Ctrl-C they are sent.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Where it is set, what a process prints is written at once: servers that tests start shall not have it either.
os.environ.pop("PYTHONUNBUFFERED", None)


@pytest.fixture
def seed() -> int:
    """For random tests; printed, so that a failure tells how to run it again."""
    print(f"PYSERVE_TEST_SEED={SEED}")
    return SEED


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked ``nightly`` unless ``-m`` names it; any other ``-m`` would replace one of addopts."""
    # What compiles longest begins first: at the end it would keep one process at work while the others have none.
    items.sort(key=lambda item: item.path.name != "test_native.py")
    if "nightly" in config.option.markexpr:
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("nightly") is not None])
    items[:] = [item for item in items if item.get_closest_marker("nightly") is None]


def pytest_collection_finish() -> None:
    """Lets Python's garbage collector pass over the objects of torch and of the tests, a million that all stay."""
    gc.collect()
    gc.freeze()
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)  # the other processors have processes of their own


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    import torch  # not above: the process that hands out tests needs none

    if not torch.cuda.is_available():
        if os.environ.get("PYSERVE_REQUIRE_GPU") == "1":
            pytest.fail("PYSERVE_REQUIRE_GPU=1, but torch finds no accelerator")
        pytest.skip("needs an accelerator")
