"""A candidate for GPUs with its arguments in device memory; runs where neither TVM nor torch is.

Not run on a GPU yet: the calls are checked against a stand-in for the driver.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from lpsn_tvm.errors import ArtifactError, TuningError
from lpsn_tvm.schedules.kernel import Array
from lpsn_tvm.targets.cuda_driver import Device, Driver
from lpsn_tvm.targets.cuda_program import Place, best_program
from lpsn_tvm.tuning.candidate_file import CandidateFile

LEAST_SWEEP_BYTES, SWEEPS = 64 << 20, 4
"""Once is enough for the cache. The others keep the GPU busy until the host has put the timed launches behind them: a
GPU that waits would count the host's time (estimated, not measured: 150 us of copies for 50 us of calls).
"""
JUNK = 0x5A


@cache
def _gpu() -> tuple[Driver, Device, int, int]:
    """Driver, the first visible GPU, its context (current from here on), a stream."""
    driver = Driver.open()
    device = driver.device(0)
    context = driver.context(device)
    driver.set_current(context)
    return driver, device, context, driver.stream()


@cache
def _sweep_area() -> tuple[int, int]:
    """(address, bytes) of device memory that is larger than the second-level cache."""
    driver, device, _, _ = _gpu()
    size = max(2 * device.l2_bytes, LEAST_SWEEP_BYTES)
    return driver.allocate(size), size


def describe_gpu() -> dict[str, Any]:
    """Name, compute capability and driver."""
    driver, device, _, _ = _gpu()
    version = ""
    with suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text().split("Kernel Module", 1)[-1].split()
        version = next((f", driver {word}" for word in words if word[:1].isdigit()), "")
    major, minor = driver.version()
    return {"name": f"GPU {device.name}{version}, CUDA {major}.{minor}", "number": device.number}


class CudaSubject:
    """A loaded program with memory of its own."""

    def __init__(self, candidate: CandidateFile, inputs: Sequence[Array]) -> None:
        self._driver, device, context, self._stream = _gpu()
        self._driver.set_current(context)
        program = candidate.program
        if program is None or best_program((program,), device.number) is None:
            built = "nothing" if program is None else program.arch
            raise TuningError(f"was compiled for {built}; {device.name} is sm_{device.number}")
        self._program, self._spec = program, candidate.out
        self._taken: list[tuple[str, int]] = []
        self._finalizer = weakref.finalize(self, _release, self._driver, self._taken)
        self._arena = self._allocate(program.arena_bytes)
        self._constants = self._stored(np.frombuffer(program.constants, np.uint8))
        self._originals = [self._stored(np.ascontiguousarray(array)) for array in inputs]
        self._inputs = [self._allocate(array.nbytes) for array in inputs]
        module = self._driver.module(program.binary)
        self._taken.append(("cuModuleUnload", module))
        self._launches = [
            (
                self._driver.function(module, launch.kernel, launch.shared_bytes),
                launch.grid,
                launch.block,
                launch.shared_bytes,
                self._stream,
                [self._address(place) for place in launch.arguments],
            )
            for launch in program.launches
        ]
        self._start, self._stop = self._driver.event(), self._driver.event()
        self._taken += [("cuEventDestroy_v2", self._start), ("cuEventDestroy_v2", self._stop)]

    def _allocate(self, size: int) -> int:
        address = self._driver.allocate(size)
        self._taken.append(("cuMemFree_v2", address))
        return address

    def _stored(self, array: Array) -> int:
        address = self._allocate(array.nbytes)
        if array.nbytes:
            self._driver.to_device(address, array.ctypes.data, array.nbytes, self._stream)
            self._driver.synchronize(self._stream)
        return address

    def _address(self, place: Place) -> int:
        if place.region == "input":
            return self._inputs[place.offset]
        return (self._arena if place.region == "arena" else self._constants) + place.offset

    def _write_inputs(self) -> None:
        for own, original, port in zip(self._inputs, self._originals, self._program.inputs, strict=True):
            self._driver.on_device(own, original, port.size, self._stream)

    def sample(self) -> float:
        """Seconds of one call, from events; the host runs ahead while the GPU sweeps its cache."""
        driver, stream = self._driver, self._stream
        address, size = _sweep_area()
        for _ in range(SWEEPS):
            driver.on_device(address, address + size // 2, size // 2, stream)
        self._write_inputs()
        driver.record(self._start, stream)
        for launch in self._launches:
            driver.launch(*launch)
        driver.record(self._stop, stream)
        return driver.milliseconds(self._start, self._stop) / 1e3

    def output(self) -> Array:
        """What one call writes, in logical shape; workspaces hold junk before, too."""
        driver, stream = self._driver, self._stream
        self._write_inputs()
        junk = np.full(self._program.arena_bytes, JUNK, np.uint8)
        if junk.nbytes:
            driver.to_device(self._arena, junk.ctypes.data, junk.nbytes, stream)
        for launch in self._launches:
            driver.launch(*launch)
        (port,) = self._program.outputs
        result = np.empty(port.shape, port.dtype)
        driver.to_host(result.ctypes.data, self._address(port.place), port.size, stream)
        driver.synchronize(stream)
        return self._spec.unpack(result)


def _release(driver: Driver, taken: list[tuple[str, int]]) -> None:
    with suppress(ArtifactError):  # After a fault nothing can be given back; the process ends soon.
        while taken:
            driver.call(*taken.pop())
