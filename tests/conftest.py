"""A test that hangs ends its process with the stacks of all threads; pytest-xdist then names the test and goes on.

Random examples are the same in every run, however busy the machine is. Others, where a test does not say
`derandomize` itself: `pytest --hypothesis-profile=search`, and `--hypothesis-seed=1` with it for those of a seed.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

_ANY_SPEED: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("fixed", derandomize=True, **_ANY_SPEED)
settings.register_profile("search", derandomize=False, **_ANY_SPEED)
# Before the modules of tests are imported: their own settings begin with these.
settings.load_profile("fixed")

SECONDS, SLOW_SECONDS = 300.0, 3600.0
"""The slowest fast test takes some seconds on one core; what is slow builds big networks."""

_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the real stderr: tests run with another one."""
    config.stash[_stderr] = os.dup(sys.__stderr__.fileno() if sys.__stderr__ else 2)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[_stderr])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Covers fixtures too, and threads that no exception would reach."""
    limit = SLOW_SECONDS if item.get_closest_marker("slow") else SECONDS
    faulthandler.dump_traceback_later(limit, exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
