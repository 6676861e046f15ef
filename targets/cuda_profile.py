"""How long a network and each of its kernels take on a GPU, from CUDA events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lpsn_tvm.targets.cuda_graphs import Graphs
from lpsn_tvm.targets.cuda_runner import Runner

STEADY = 0.02
"""Warm-up is over when the median of a round changes by less than this fraction."""
WARM_UP_ROUNDS = 20
LEAST_SWEEP_BYTES = 64 << 20
"""Filling so much takes a GPU long enough for the host to queue the first launches behind it."""


@dataclass(frozen=True)
class Timing:
    """Times of single runs.

    Parameters
    ----------
    milliseconds : tuple of float
        One per run.
    device : str
    clock_mhz : float
        The GPU's usual boost clock; what it ran at is not known to the driver.
    """

    milliseconds: tuple[float, ...]
    device: str
    clock_mhz: float

    @property
    def median(self) -> float:
        """Median milliseconds."""
        return statistics.median(self.milliseconds)

    @property
    def best(self) -> float:
        """Least milliseconds."""
        return min(self.milliseconds)


@dataclass(frozen=True)
class KernelTime:
    """One launch of a network, timed by itself.

    Parameters
    ----------
    layer : str
        The variable of the network that it computes.
    kernel : str
    milliseconds : float
        Mean over back-to-back launches, which find their data in the second-level cache where it fits.
    bytes : int
        Of its operands and results, each counted once.
    operations : int
        2 x MACs.
    """

    layer: str
    kernel: str
    milliseconds: float
    bytes: int
    operations: int

    def roofline_share(self, bytes_per_second: float, operations_per_second: float) -> float:
        """The least time that its bytes and operations need at these measured rates, as a fraction of its time."""
        least = max(self.bytes / bytes_per_second, self.operations / operations_per_second)
        return least / (self.milliseconds * 1e-3)


class Stopwatch:
    """Events, and memory to sweep the second-level cache with; for one `with` block."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.driver, self.stream = runner, runner.driver, runner.stream
        self._taken: list[tuple[str, int]] = []

    def __enter__(self) -> Stopwatch:
        self.size = max(2 * self.runner.device.l2_bytes, LEAST_SWEEP_BYTES)
        self.area = self.driver.allocate(self.size)
        self._taken.append(("cuMemFree_v2", self.area))
        return self

    def __exit__(self, *_: object) -> None:
        while self._taken:
            self.driver.call(*self._taken.pop())

    def sweep(self) -> None:
        """Fill the second-level cache with something else; the host gets ahead meanwhile."""
        self.driver.fill(self.area, 0, self.size, self.stream)

    def pairs(self, count: int) -> list[tuple[int, int]]:
        """Pairs of events."""
        found = []
        for _ in range(count):
            start, stop = self.driver.event(), self.driver.event()
            self._taken += [("cuEventDestroy_v2", start), ("cuEventDestroy_v2", stop)]
            found.append((start, stop))
        return found

    def times(self, executable: int, pairs: Sequence[tuple[int, int]], *, is_cold: bool) -> list[float]:
        """Milliseconds of one launch per pair. All are queued before the first is waited for: an event on an idle
        stream would count the host's time up to the launch as well.
        """
        self.sweep()
        for start, stop in pairs:
            if is_cold:
                self.sweep()
            self.driver.record(start, self.stream)
            self.driver.launch_graph(executable, self.stream)
            self.driver.record(stop, self.stream)
        return [self.driver.milliseconds(start, stop) for start, stop in pairs]


def time_network(runner: Runner, repeats: int, warmup: int, *, is_cold: bool = False) -> Timing:
    """Device time of runs on the runner's own memory: no copies from or to the host.

    Parameters
    ----------
    runner : Runner
        The network.
    repeats, warmup : int
        Runs that count; runs per round before them: rounds go on until they are steady.
    is_cold : bool
        Sweep the second-level cache before each run.
    """

    def work() -> list[float]:
        runner.follow(runner.stream)
        executable = runner.graphs.executable(runner.own_addresses)
        with Stopwatch(runner) as watch:
            if warmup > 0:
                _warm_up(watch, executable, warmup, is_cold)
            return watch.times(executable, watch.pairs(repeats), is_cold=is_cold)

    return _timing(runner, runner.inside(work))


def _warm_up(watch: Stopwatch, executable: int, count: int, is_cold: bool) -> None:
    pairs = watch.pairs(count)
    before = 0.0
    for _ in range(WARM_UP_ROUNDS):
        now = statistics.median(watch.times(executable, pairs, is_cold=is_cold))
        if abs(now - before) <= STEADY * now:
            return
        before = now


def time_calls(runner: Runner, repeats: int, warmup: int) -> Timing:
    """Wall-clock time of calls with numpy arrays: copies in, run, copies out."""
    arrays = [np.zeros(port.shape, port.dtype) for port in runner.program.inputs]
    times = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        runner(arrays)
        times.append((time.perf_counter() - start) * 1e3)
    return _timing(runner, times[warmup:])


def _timing(runner: Runner, times: Sequence[float]) -> Timing:
    return Timing(tuple(times), runner.device.name, runner.device.clock_khz / 1e3)


def profile(runner: Runner, launches: int = 20, repeats: int = 5) -> list[KernelTime]:
    """Time every kernel by itself, in the order of the network.

    Parameters
    ----------
    runner : Runner
        The network.
    launches : int
        Launches of the same kernel in one graph: neither the host nor the resolution of events counts then.
    repeats : int
        Graph launches, of which the median counts.
    """

    def work() -> list[KernelTime]:
        runner.follow(runner.stream)
        found = []
        with Stopwatch(runner) as watch:
            pairs = watch.pairs(repeats)
            for prepared in runner.graphs.launches:
                prepared.point_to(runner.own_addresses)
                taken: list[tuple[str, int]] = []
                try:
                    executable = Graphs(watch.driver, [prepared] * launches, taken).executable(runner.own_addresses)
                    watch.times(executable, pairs[:1], is_cold=False)
                    times = watch.times(executable, pairs, is_cold=False)
                finally:
                    while taken:
                        watch.driver.call(*taken.pop())
                launch = prepared.launch
                milliseconds = statistics.median(times) / launches
                found.append(KernelTime(launch.name, launch.kernel, milliseconds, launch.bytes, launch.operations))
        return found

    result: list[KernelTime] = runner.inside(work)
    return result
