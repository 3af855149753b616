"""What holds for every test: stacks of a hang, leaks shown where they arise, ``--nightly``."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# A machine that stalls for a second is no failure of what is tested; pytest-timeout ends what hangs. All else is as in
# hypothesis's own profile, which is another one where CI is set.
settings.register_profile("fusemig", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fusemig")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--nightly`` and ``--matrix-seed``."""
    parser.addoption(
        "--nightly", action="store_true", help="also run what takes too long for every run, and more of it"
    )
    parser.addoption(
        "--matrix-seed",
        type=int,
        default=os.environ.get("FUSEMIG_MATRIX_SEED"),
        help="play one run of tests/property/test_fault_matrix.py again",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Have SIGUSR1 print the stacks of all threads: `kill -USR1` tells where a test hangs."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what may take long; skip what is marked ``nightly`` unless it was asked for."""
    # So that at the end no worker is left alone with one of these.
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)
    if config.getoption("--nightly"):
        return
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.skip(reason="only with --nightly"))


def pytest_collection_finish() -> None:
    """Have the collecting of garbage after each test look at what tests made, and not at all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Collect garbage, so that a ResourceWarning (an error here) belongs to the test that leaked."""
    gc.collect()


@pytest.fixture(scope="session")
def nightly(pytestconfig: pytest.Config) -> bool:
    """Tell whether this run may take its time."""
    return bool(pytestconfig.getoption("--nightly"))


@pytest.fixture
def matrix_seed(pytestconfig: pytest.Config) -> int | None:
    """Give the one seed to be played, if one was named."""
    seed: int | None = pytestconfig.getoption("--matrix-seed")
    return seed
