"""A program on a GPU: constants and arena stay on the device, a run is the launch of one CUDA graph."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lpsn_tvm.errors import ArtifactError
from lpsn_tvm.targets.cuda_driver import STREAM_LEGACY, Driver
from lpsn_tvm.targets.cuda_errors import DriverError, is_dead
from lpsn_tvm.targets.cuda_graphs import Graphs, copied_outputs, prepare
from lpsn_tvm.targets.cuda_program import CudaProgram, Place, Port, choose_program
from lpsn_tvm.targets.cuda_staging import Staging

VECTOR_BYTES = 16
"""Kernels read and write so many bytes at once; tensors that begin elsewhere go through the runner's own memory."""


class Runner:
    """One network on one GPU; threads take turns. With LPSN_TVM_STEPWISE=1 in the environment kernels are launched one
    by one, and an error names the layer.

    Parameters
    ----------
    programs : sequence of CudaProgram
        For one or several architectures; the best one is taken.
    device : int
        Number of the GPU.

    Raises
    ------
    ArtifactError
        No driver, no such GPU, no program that runs on it, or not enough device memory.
    """

    def __init__(self, programs: Sequence[CudaProgram], device: int = 0) -> None:
        self.driver = Driver.open()
        self.device = self.driver.device(device)
        self.program = choose_program(programs, self.device.number, self.device.name)
        self.batch = self.program.inputs[0].shape[0]
        self._warn_of_translation()
        self.lock = threading.Lock()
        self._failure: str | None = None
        self._is_stepwise = os.environ.get("LPSN_TVM_STEPWISE", "") not in ("", "0")
        self.context = self.driver.context(self.device)
        # Entry points that give back what was taken, and with what; the last taken goes first.
        self.taken: list[tuple[str, int]] = [("cuDevicePrimaryCtxRelease_v2", self.device.handle)]
        self._finalizer = weakref.finalize(self, _release, self.driver, self.context, self.taken)
        try:
            with self.driver.using(self.context):
                self._load()
        except ArtifactError:
            self.close()
            raise

    def _warn_of_translation(self) -> None:
        if self.program.number // 10 != self.device.number // 10:
            warnings.warn(
                f"no machine code for sm_{self.device.number} ({self.device.name}) in the module: the driver "
                f"translates its PTX of {self.program.arch}, which takes seconds to minutes the first time (it keeps "
                f"the result), and instructions that only newer GPUs have stay unused; build with "
                f"-arch=sm_{self.device.number} where this release knows it",
                stacklevel=4,
            )

    def _load(self) -> None:
        driver, program, taken = self.driver, self.program, self.taken
        self.stream = driver.stream()
        taken.append(("cuStreamDestroy_v2", self.stream))
        self._arena = self._allocate(program.arena_bytes)
        self._constants = self._allocate(len(program.constants))
        self._inputs = tuple(self._allocate(port.size) for port in program.inputs)
        self._outputs = tuple(self._allocate(port.size) for port in program.outputs)
        # Recorded after every run: other streams wait for it, since all runs share the arena.
        self._done = driver.event(has_time=False)
        taken.append(("cuEventDestroy_v2", self._done))
        self._last = self.stream
        largest = max(port.size for port in (*program.inputs, *program.outputs))
        self._staging = Staging(driver, max(largest, len(program.constants)), taken)
        self._staging.upload([(np.frombuffer(program.constants, np.uint8), self._constants)], self.stream)
        driver.synchronize(self.stream)
        launches = prepare(program, self._functions(), self._arena, self._constants)
        self.graphs = Graphs(driver, launches, taken)
        self._copied = copied_outputs(program)
        # What must live until a run is over, the run's event, and events to use again.
        self._held: deque[tuple[int, Any]] = deque()
        self._events: list[int] = []

    def _allocate(self, size: int) -> int:
        address = self.driver.allocate(size)
        self.taken.append(("cuMemFree_v2", address))
        return address

    def _functions(self) -> dict[str, int]:
        module = self._module()
        self.taken.append(("cuModuleUnload", module))
        largest: dict[str, int] = {}
        for launch in self.program.launches:
            largest[launch.kernel] = max(launch.shared_bytes, largest.get(launch.kernel, 0))
        limit = self.device.shared_bytes
        for name, shared in largest.items():
            if shared > limit:
                raise ArtifactError(
                    f"needs {shared} bytes of shared memory in a block, {self.device.name} has {limit}: build it with "
                    f"-arch=sm_{self.device.number}",
                    where=name,
                )
        return {name: self.driver.function(module, name, shared) for name, shared in largest.items()}

    def _module(self) -> int:
        try:
            return self.driver.module(self.program.binary)
        except DriverError as error:
            reason = self.program.misses(self.driver.version())
            if not reason:
                raise
            raise DriverError(error.status, f"the module was {reason} ({error.message})", "cuda") from error

    @property
    def device_bytes(self) -> int:
        """Device memory of arena, constants, inputs and outputs."""
        ports = sum(port.size for port in (*self.program.inputs, *self.program.outputs))
        return self.program.arena_bytes + len(self.program.constants) + ports

    @property
    def own_addresses(self) -> tuple[int, ...]:
        """The runner's own inputs and outputs."""
        return self._inputs + self._outputs

    def inside(self, work: Callable[[], Any]) -> Any:
        """Do something with the GPU, alone and with its context current.

        Raises
        ------
        ArtifactError
            The driver refuses, or an earlier failure left the context dead.
        """
        with self.lock:
            self._check()
            try:
                with self.driver.using(self.context):
                    return work()
            except ArtifactError as error:
                self._note(error)
                raise

    def _check(self) -> None:
        if self._failure is not None:
            raise ArtifactError(f"the GPU cannot be used any more since: {self._failure}", where="cuda")

    def _note(self, error: ArtifactError) -> None:
        if is_dead(error):
            self._failure = str(error)

    def prepare(self) -> None:
        """Build the graph over the runner's own memory and bring it to the device."""

        def work() -> None:
            self.driver.upload_graph(self.graphs.executable(self.own_addresses), self.stream)
            self.driver.synchronize(self.stream)

        self.inside(work)

    def __call__(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Numpy of the compiled batch size in, numpy out."""
        results = [np.empty(port.shape, port.dtype) for port in self.program.outputs]

        def work() -> None:
            self.follow(self.stream)
            sources = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]
            self._staging.upload(list(zip(sources, self._inputs, strict=True)), self.stream)
            self.enqueue(self.own_addresses, self.stream)
            targets = [result.reshape(-1).view(np.uint8) for result in results]
            self._staging.download(list(zip(targets, self._outputs, strict=True)), self.stream)

        self.inside(work)
        return results

    def follow(self, stream: int) -> None:
        """What comes next on `stream` waits for the run before, if that was on another stream.

        A handle says which stream it is only where nobody can destroy the stream: others' handles may come back as a
        new stream's while work of the old one is still under way, and that of each thread's own is the same in all.
        """
        if stream != self._last or stream not in (STREAM_LEGACY, self.stream):
            self.driver.wait(stream, self._done)
            self._last = stream

    def enqueue(self, addresses: tuple[int, ...], stream: int) -> None:
        """Put one run on a stream.

        Parameters
        ----------
        addresses : tuple of int
            Device addresses of inputs, then of outputs.
        stream : int
            Where it goes.
        """
        if self._is_stepwise:
            self.graphs.run_stepwise(addresses, stream)
        elif self.program.launches:
            self.driver.launch_graph(self.graphs.executable(addresses), stream)
        if self._copied:
            self._copy_outputs(addresses, stream)

    def _copy_outputs(self, addresses: tuple[int, ...], stream: int) -> None:
        for index in self._copied:
            port = self.program.outputs[index]
            source = self._source(port.place, index, addresses)
            self.driver.on_device(addresses[len(self._inputs) + index], source, port.size, stream)

    def _source(self, place: Place, index: int, addresses: tuple[int, ...]) -> int:
        if place.region == "input":
            return addresses[place.offset]
        first = next(i for i, port in enumerate(self.program.outputs) if port.place == place)
        if first != index and first not in self._copied:
            return addresses[len(self._inputs) + first]
        return (self._arena if place.region == "arena" else self._constants) + place.offset

    # --- the caller's tensors

    def run_on_device(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        stream: int,
        count: int | None = None,
        *,
        after: Sequence[int] = (),
        held: Any = None,
    ) -> None:
        """Read device tensors and write device tensors on the caller's stream, without waiting.

        Parameters
        ----------
        inputs, outputs : sequence of int
            Addresses of plain, contiguous tensors.
        stream : int
            Where the work goes (0: the default stream).
        count : int, optional
            Samples; the compiled batch size by default. More are run in pieces, fewer are filled up.
        after : sequence of int
            Other streams that the inputs come from.
        held : object, optional
            Kept alive until the run is over.
        """
        # As `inside`, spelled out: this is where the host's time counts.
        driver = self.driver
        with self.lock:
            self._check()
            before = driver.enter(self.context)
            try:
                for other in after:
                    self._order(other, stream)
                if stream and driver.is_capturing(stream):
                    self._record(inputs, outputs, stream, self.batch if count is None else count)
                    return
                self.follow(stream)
                if count is None or count == self.batch:
                    self._run_piece((*inputs, *outputs), stream, self.batch)
                else:
                    self._run_pieces(inputs, outputs, stream, count)
                driver.record(self._done, stream)
                if held is not None or self._held:
                    self._hold(held, stream)
            except ArtifactError as error:
                self._note(error)
                raise
            finally:
                if before != self.context:
                    driver.leave(self.context, before)

    def _run_pieces(self, inputs: Sequence[int], outputs: Sequence[int], stream: int, count: int) -> None:
        ports = (*self.program.inputs, *self.program.outputs)
        for start in range(0, count, self.batch):
            offsets = (self._bytes(port, start) for port in ports)
            addresses = tuple(a + offset for a, offset in zip((*inputs, *outputs), offsets, strict=True))
            self._run_piece(addresses, stream, min(self.batch, count - start))

    def _run_piece(self, addresses: tuple[int, ...], stream: int, count: int) -> None:
        """At most the compiled batch size; in place where all is there and aligned."""
        if count == self.batch and _are_aligned(addresses):
            self.enqueue(addresses, stream)
            return
        known = len(self._inputs)
        for port, own, address in zip(self.program.inputs, self._inputs, addresses[:known], strict=True):
            self.driver.on_device(own, address, self._bytes(port, count), stream)
        self.enqueue(self.own_addresses, stream)
        for port, own, address in zip(self.program.outputs, self._outputs, addresses[known:], strict=True):
            self.driver.on_device(address, own, self._bytes(port, count), stream)

    def _bytes(self, port: Port, count: int) -> int:
        """Of so many samples; where the first axis is not the batch, whole batches."""
        return port.size * count // self.batch

    def _record(self, inputs: Sequence[int], outputs: Sequence[int], stream: int, count: int) -> None:
        """Put the launches one by one on a stream that is being recorded into the caller's graph, which a graph cannot
        be put on.
        """
        addresses = (*inputs, *outputs)
        if count != self.batch or not _are_aligned(addresses):
            raise ArtifactError(
                f"a graph can be recorded for the compiled batch size, {self.batch}, and aligned tensors only",
                where="module call",
            )
        for prepared in self.graphs.launches:
            self.graphs.launch_alone(prepared, addresses, stream)
        self._copy_outputs(addresses, stream)

    def _order(self, first: int, then: int) -> None:
        event = self._event()
        self.driver.record(event, first)
        self.driver.wait(then, event)
        self._events.append(event)

    def order(self, first: int, then: int) -> None:
        """What comes on stream `then` waits for what is on stream `first`."""
        self.inside(lambda: self._order(first, then))

    def _event(self) -> int:
        if self._events:
            return self._events.pop()
        event = self.driver.event(has_time=False)
        self.taken.append(("cuEventDestroy_v2", event))
        return event

    def _hold(self, held: Any, stream: int) -> None:
        with self.driver.relaxed():
            while self._held and self.driver.has_happened(self._held[0][0]):
                self._events.append(self._held.popleft()[0])
        if held is not None:
            event = self._event()
            self.driver.record(event, stream)
            self._held.append((event, held))

    def allocate(self, size: int) -> int:
        """Device memory for somebody else, to be given back by `free`."""
        with self.lock, self.driver.using(self.context):
            return self.driver.allocate(size)

    def free(self, address: int) -> None:
        """Give such memory back; waits for the device."""
        with self.driver.using(self.context):
            self.driver.free(address)

    def read(self, array: np.ndarray, address: int, stream: int) -> None:
        """Copy device memory to a host array, after what is on the stream."""

        def work() -> None:
            self.driver.to_host(array.ctypes.data, address, array.nbytes, stream)
            self.driver.synchronize(stream)

        self.inside(work)

    def close(self) -> None:
        """Give everything back (done when the runner is collected, too)."""
        self._finalizer()


def _are_aligned(addresses: Sequence[int]) -> bool:
    bits = 0
    for address in addresses:
        bits |= address
    return bits % VECTOR_BYTES == 0


def _release(driver: Driver, context: int, taken: list[tuple[str, int]]) -> None:
    try:
        with driver.using(context):
            for name, handle in taken:
                if name == "cuEventDestroy_v2":
                    driver.wait_here(handle)
                elif name == "cuStreamDestroy_v2":
                    driver.synchronize(handle)
            # The context itself goes last, and after it is no longer current.
            while len(taken) > 1:
                driver.call(*taken.pop())
        while taken:
            driver.call(*taken.pop())
    except ArtifactError:
        taken.clear()  # The driver is shutting down, or the context is dead: it has freed everything.
