"""Fixtures of the tests that run modules for GPUs on a stand-in for the driver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from cuda_modules import SmallNetwork, small_network
from fake_driver import FakeDriver

from lpsn_tvm.targets import cuda_driver


@pytest.fixture
def network() -> SmallNetwork:
    return small_network()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: Any) -> FakeDriver:
    return FakeDriver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(compiled: FakeDriver, network: SmallNetwork, monkeypatch: Any) -> Iterator[FakeDriver]:
    """The stand-in; no test may break a rule of the driver."""
    compiled.reset()
    compiled.run_source(network.source, network.program.launches, {port.place for port in network.program.outputs})
    monkeypatch.setattr(cuda_driver, "LIBRARY", str(compiled.path))
    yield compiled
    assert not compiled.errors
    assert not compiled.violations
