"""Times of networks and kernels: what is launched, what is waited for, what comes out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cuda_modules import SmallNetwork, feed
from fake_driver import FakeDriver

from lpsn_tvm.targets.cuda_profile import KernelTime

KERNEL_MS = 0.01
"""What every launch takes on the stand-in."""


def test_a_benchmark_is_warm_and_queues_all_runs(network: SmallNetwork, driver: FakeDriver) -> None:
    module = network.module()
    module.prepare()
    before = len(driver.calls)
    assert module.benchmark(repeats=3, warmup=1) == pytest.approx(KERNEL_MS * len(network.program.launches))
    calls = driver.calls[before:]
    assert calls.count("cuGraphLaunch") == 3 + 2, "three runs after two rounds of warm-up"
    last = [index for index, name in enumerate(calls) if name == "cuGraphLaunch"][-3:]
    assert "cuEventSynchronize" not in calls[last[0] : last[-1]], "nothing waits between the runs"


def test_a_cold_benchmark_sweeps_before_each_run(network: SmallNetwork, driver: FakeDriver) -> None:
    timing = network.module().measure(repeats=4, warmup=0, is_cold=True)
    assert driver.calls.count("cuMemsetD8Async") == 1 + 4
    assert timing.device == "Test GPU" and timing.clock_mhz == 1700
    assert len(timing.milliseconds) == 4
    assert timing.best <= timing.median


def test_whole_calls_are_timed_on_the_host(network: SmallNetwork, driver: FakeDriver) -> None:
    timing = network.module().measure(repeats=2, warmup=1, with_copies=True)
    assert driver.calls.count("cuGraphLaunch") == driver.calls.count("cuMemcpyDtoHAsync_v2") == 3
    assert len(timing.milliseconds) == 2 and timing.median > 0


def test_a_profile_has_every_kernel(network: SmallNetwork, driver: FakeDriver) -> None:
    module = network.module()
    module.prepare()
    live = driver.live
    times = module.profile(launches=3, repeats=2)
    assert [(time.layer, time.kernel) for time in times] == [
        (launch.name, launch.kernel) for launch in network.program.launches
    ]
    assert [time.milliseconds for time in times] == pytest.approx([KERNEL_MS] * len(times))
    assert [time.bytes for time in times] == [launch.bytes for launch in network.program.launches]
    assert any(time.operations for time in times)
    assert driver.live == live, "graphs and events are given back"
    np.testing.assert_array_equal(module(feed()), network.reference(feed()))


def test_shares_of_the_roofline() -> None:
    time = KernelTime("layer", "kernel", milliseconds=2.0, bytes=10**9, operations=10**12)
    assert time.roofline_share(1e12, 1e16) == pytest.approx(0.5), "bound by its bytes"
    assert time.roofline_share(1e15, 1e15) == pytest.approx(0.5), "bound by its operations"
    assert dataclasses.replace(time, milliseconds=1.0).roofline_share(1e12, 1e16) == pytest.approx(1.0)
