"""A program on a GPU: constants and arena stay on the device, launches are recorded once as a CUDA graph and replayed
by one call.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from lpsn_tvm.errors import ArtifactError
from lpsn_tvm.targets.cuda_driver import Driver
from lpsn_tvm.targets.cuda_program import CudaProgram, Place, best_program

KEPT_GRAPHS = 8
"""Recorded graphs kept, one per set of input addresses: a caller that reuses its tensors pays for recording once."""


def choose_program(programs: Sequence[CudaProgram], number: int, name: str) -> CudaProgram:
    """The program for a GPU.

    Raises
    ------
    ArtifactError
        None runs on it; says what it was compiled for.
    """
    program = best_program(programs, number)
    if program is None:
        built = ", ".join(program.arch for program in programs)
        raise ArtifactError(
            f"was compiled for {built}; {name} is sm_{number}: build it again with -arch=sm_{number}", where="cuda"
        )
    return program


class Runner:
    """One network on one GPU.

    Parameters
    ----------
    programs : sequence of CudaProgram
        For one or several architectures; the best one is taken.
    device : int
        Number of the GPU.
    """

    def __init__(self, programs: Sequence[CudaProgram], device: int = 0) -> None:
        self.driver = Driver.open()
        self.device = self.driver.device(device)
        self.program = choose_program(programs, self.device.number, self.device.name)
        self._context = self.driver.context(self.device)
        self.driver.set_current(self._context)
        # Entry points that give back what was taken, and with what; the last taken goes first.
        self._taken: list[tuple[str, int]] = []
        self._finalizer = weakref.finalize(self, _release, self.driver, self._context, self._taken)
        self._lock = threading.Lock()
        self.stream = self.driver.stream()
        self._taken.append(("cuStreamDestroy_v2", self.stream))
        self._arena = self._allocate(self.program.arena_bytes)
        self._constants = self._allocate(len(self.program.constants))
        self._upload(self._constants, np.frombuffer(self.program.constants, np.uint8))
        self._inputs = tuple(self._allocate(port.size) for port in self.program.inputs)
        self._functions = self._load()
        self._graphs: OrderedDict[tuple[int, ...], int] = OrderedDict()

    def _allocate(self, size: int) -> int:
        address = self.driver.allocate(size)
        self._taken.append(("cuMemFree_v2", address))
        return address

    def _upload(self, address: int, array: np.ndarray) -> None:
        if array.nbytes:
            self.driver.to_device(address, array.ctypes.data, array.nbytes, self.stream)
            self.driver.synchronize(self.stream)

    def _load(self) -> dict[str, int]:
        module = self.driver.module(self.program.binary)
        self._taken.append(("cuModuleUnload", module))
        largest: dict[str, int] = {}
        for launch in self.program.launches:
            largest[launch.kernel] = max(launch.shared_bytes, largest.get(launch.kernel, 0))
        return {name: self.driver.function(module, name, shared) for name, shared in largest.items()}

    @property
    def device_bytes(self) -> int:
        """Device memory of arena, constants and inputs."""
        inputs = sum(port.size for port in self.program.inputs)
        return self.program.arena_bytes + len(self.program.constants) + inputs

    def _address(self, place: Place, inputs: Sequence[int]) -> int:
        if place.region == "input":
            return inputs[place.offset]
        return (self._arena if place.region == "arena" else self._constants) + place.offset

    def _graph(self, inputs: tuple[int, ...]) -> int:
        """The recorded launches that read these inputs."""
        if inputs in self._graphs:
            self._graphs.move_to_end(inputs)
            return self._graphs[inputs]
        if len(self._graphs) >= KEPT_GRAPHS:
            self.driver.synchronize(self.stream)
            oldest = self._graphs.popitem(last=False)[1]
            self._taken.remove(("cuGraphExecDestroy", oldest))
            self.driver.destroy_graph(oldest)
        self.driver.begin_capture(self.stream)
        for launch in self.program.launches:
            addresses = [self._address(place, inputs) for place in launch.arguments]
            function = self._functions[launch.kernel]
            self.driver.launch(function, launch.grid, launch.block, launch.shared_bytes, self.stream, addresses)
        self._graphs[inputs] = self.driver.end_capture(self.stream)
        self._taken.append(("cuGraphExecDestroy", self._graphs[inputs]))
        return self._graphs[inputs]

    def prepare(self) -> None:
        """Record the launches that read the runner's own inputs."""
        self.driver.set_current(self._context)
        if self.program.launches:
            self._graph(self._inputs)

    def enqueue(self, inputs: Sequence[int] | None = None) -> None:
        """Put one run on the stream.

        Parameters
        ----------
        inputs : sequence of int, optional
            Device addresses to read from; the runner's own buffers by default.
        """
        if self.program.launches:
            self.driver.launch_graph(self._graph(tuple(inputs or self._inputs)), self.stream)

    def __call__(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Numpy in, numpy out; threads take turns."""
        results = [np.empty(port.shape, port.dtype) for port in self.program.outputs]
        with self._lock:
            self.driver.set_current(self._context)
            # Held until the copies are done.
            held = [np.ascontiguousarray(array) for array in arrays]
            for array, address in zip(held, self._inputs, strict=True):
                self.driver.to_device(address, array.ctypes.data, array.nbytes, self.stream)
            self.enqueue()
            for result, port in zip(results, self.program.outputs, strict=True):
                address = self._address(port.place, self._inputs)
                self.driver.to_host(result.ctypes.data, address, port.size, self.stream)
            self.driver.synchronize(self.stream)
        return results

    def run_on_device(self, inputs: Sequence[int], outputs: Sequence[int], caller: int) -> None:
        """Read device tensors and write device tensors, in order with the caller's stream, without waiting.

        Parameters
        ----------
        inputs, outputs : sequence of int
            Addresses of plain, contiguous tensors of the compiled shapes.
        caller : int
            The stream that made the inputs and will read the outputs (0: the default stream).
        """
        driver = self.driver
        with self._lock:
            driver.set_current(self._context)
            self._order(caller, self.stream)
            self.enqueue(inputs)
            for to, port in zip(outputs, self.program.outputs, strict=True):
                driver.on_device(to, self._address(port.place, inputs), port.size, self.stream)
            self._order(self.stream, caller)

    def _order(self, first: int, then: int) -> None:
        """What comes on stream `then` waits for what is on stream `first`."""
        event = self.driver.event()
        self.driver.record(event, first)
        self.driver.wait(then, event)
        self.driver.destroy_event(event)

    def milliseconds(self, repeats: int, warmup: int) -> list[float]:
        """Device time of each of `repeats` runs on the runner's own input buffers, from events."""
        driver = self.driver
        driver.set_current(self._context)
        start, stop = driver.event(), driver.event()
        times = []
        for index in range(warmup + repeats):
            driver.record(start, self.stream)
            self.enqueue()
            driver.record(stop, self.stream)
            elapsed = driver.milliseconds(start, stop)
            if index >= warmup:
                times.append(elapsed)
        driver.destroy_event(start)
        driver.destroy_event(stop)
        return times

    def close(self) -> None:
        """Give everything back (done when the runner is collected, too)."""
        self._finalizer()


def _release(driver: Driver, context: int, taken: list[tuple[str, int]]) -> None:
    try:
        driver.set_current(context)
        while taken:
            driver.call(*taken.pop())
    except ArtifactError:
        taken.clear()  # The driver is shutting down and has freed everything.
