"""The CUDA driver through ctypes, loaded when first needed: devices, memory, modules, streams, graphs and events.

Not run on a GPU yet: calls are checked against the header's documentation, and in tests against a stand-in that
enforces its rules.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lpsn_tvm.errors import ArtifactError
from lpsn_tvm.targets.cuda_entry_points import INT, OPTIONAL, POINTER, SIGNATURES, SIZE, TEXT, U64, KernelNode
from lpsn_tvm.targets.cuda_errors import OUT_OF_MEMORY, DriverError, explain

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
STREAM_LEGACY = 0
"""The default stream."""
_NON_BLOCKING, _DISABLE_TIMING, _RELAXED = 1, 2, 2
_MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_...; the carveout (9) stays the driver's choice, which by default follows the launched kernel."""
_CLOCK, _PROCESSORS, _L2_BYTES, _MAJOR, _MINOR, _SHARED_OPTIN = 13, 16, 38, 75, 76, 97
"""CU_DEVICE_ATTRIBUTE_..."""
_ERROR_LOG, _ERROR_LOG_BYTES = 5, 6
"""CU_JIT_ERROR_LOG_BUFFER and its size."""
_LOG_BYTES = 8192
NOT_READY = 600


@dataclass(frozen=True)
class Device:
    """One GPU.

    Parameters
    ----------
    index : int
        As torch and CUDA_VISIBLE_DEVICES count.
    name : str
    number : int
        Compute capability: 86 for sm_86.
    handle : int
        The driver's CUdevice.
    multiprocessors, clock_khz, l2_bytes : int
        `clock_khz` is the usual boost clock, not what it runs at now.
    shared_bytes : int
        Shared memory that one block may ask for.
    """

    index: int
    name: str
    number: int
    handle: int
    multiprocessors: int
    clock_khz: int
    l2_bytes: int
    shared_bytes: int


class Driver:
    """The loaded driver; methods raise `DriverError` with the driver's own words where a call fails."""

    _opened: dict[str, Driver] = {}  # noqa: RUF012  (one driver per library and process)
    _is_forked = False

    def __init__(self, library: Any) -> None:
        self._library = library
        self._entries: dict[str, Any] = {}
        known = {name: arguments for name, arguments in OPTIONAL.items() if hasattr(library, name)}
        for name, arguments in (SIGNATURES | known).items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, INT
            self._entries[name] = function
        self.call("cuInit", 0)

    @classmethod
    def open(cls) -> Driver:
        """The driver of this machine, loaded once.

        Raises
        ------
        ArtifactError
            There is none, it is too old, or it sees no GPU.
        """
        if LIBRARY not in cls._opened:
            try:
                library = ctypes.CDLL(LIBRARY)
            except OSError as error:
                raise ArtifactError(
                    f"no CUDA driver on this machine ({LIBRARY} cannot be loaded): running needs an NVIDIA GPU and its "
                    "driver; building, loading and inspecting do not",
                    where="cuda",
                ) from error
            try:
                cls._opened[LIBRARY] = cls(library)
            except AttributeError as error:
                raise ArtifactError(f"the CUDA driver is too old, 12.0 is needed: {error}", where="cuda") from error
        return cls._opened[LIBRARY]

    @classmethod
    def _after_fork(cls) -> None:
        cls._is_forked = bool(cls._opened)

    def call(self, name: str, *arguments: Any) -> None:
        """Call one entry point.

        Raises
        ------
        DriverError
            It does not return CUDA_SUCCESS.
        ArtifactError
            This process was forked from one that had already used the driver.
        """
        if self._is_forked:
            raise ArtifactError(
                "this process was forked from one that had used CUDA, where the driver does not work: start workers "
                'with multiprocessing.get_context("spawn"), or call the module only in them',
                where=name,
            )
        status = self._entries[name](*arguments)
        if status:
            text = TEXT()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            reason = text.value.decode(errors="replace") if text.value else "unknown error"
            raise DriverError(status, explain(status, reason), name)

    def _handle(self, name: str, *arguments: Any) -> int:
        """Call an entry point that writes a handle through its first argument."""
        handle = POINTER()
        self.call(name, ctypes.byref(handle), *arguments)
        return int(handle.value or 0)

    def _number(self, name: str, *arguments: Any) -> int:
        number = INT()
        self.call(name, ctypes.byref(number), *arguments)
        return number.value

    # --- devices and contexts

    def version(self) -> tuple[int, int]:
        """Newest CUDA version that the driver supports: (12, 4)."""
        number = self._number("cuDriverGetVersion")
        return number // 1000, number % 1000 // 10

    def device(self, index: int) -> Device:
        """A GPU by number.

        Raises
        ------
        ArtifactError
            There is no such GPU.
        """
        count = self._number("cuDeviceGetCount")
        if not 0 <= index < count:
            raise ArtifactError(f"there is no GPU {index}; the driver sees {count}", where="cuda")
        handle = self._number("cuDeviceGet", index)
        text = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", text, 256, handle)
        major, minor, processors, clock, l2_bytes, shared = (
            self._number("cuDeviceGetAttribute", attribute, handle)
            for attribute in (_MAJOR, _MINOR, _PROCESSORS, _CLOCK, _L2_BYTES, _SHARED_OPTIN)
        )
        name = text.value.decode(errors="replace")
        return Device(index, name, major * 10 + minor, handle, processors, clock, l2_bytes, shared)

    def context(self, device: Device) -> int:
        """The device's primary context, which torch and others share; to be given back by `release`."""
        return self._handle("cuDevicePrimaryCtxRetain", device.handle)

    def release(self, device: Device) -> None:
        """Give the primary context back; the last one to do so ends it."""
        self.call("cuDevicePrimaryCtxRelease_v2", device.handle)

    def set_current(self, context: int) -> None:
        """Make a context current in this thread (0: none)."""
        self.call("cuCtxSetCurrent", context)

    def enter(self, context: int) -> int:
        """Make a context current in this thread; the one before, for `leave`.

        The CUDA runtime takes its current device from the current context: one that was left behind would move the
        caller's torch to another GPU.
        """
        current = self._handle("cuCtxGetCurrent")
        if current != context:
            self.call("cuCtxSetCurrent", context)
        return current

    def leave(self, context: int, before: int) -> None:
        """Undo `enter`."""
        if before != context:
            self.call("cuCtxSetCurrent", before)

    @contextlib.contextmanager
    def relaxed(self) -> Iterator[None]:
        """Free to allocate, load and wait in this thread although somebody is recording a graph."""
        mode = INT(_RELAXED)
        self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            yield
        finally:
            self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    @contextlib.contextmanager
    def using(self, context: int) -> Iterator[None]:
        """`enter` and `leave`, `relaxed` in between."""
        before = self.enter(context)
        try:
            with self.relaxed():
                yield
        finally:
            self.leave(context, before)

    # --- memory

    def allocate(self, size: int) -> int:
        """Device memory, at least one byte; its address.

        Raises
        ------
        DriverError
            There is not enough; says how much there is.
        """
        address = U64()
        try:
            self.call("cuMemAlloc_v2", ctypes.byref(address), max(size, 1))
        except DriverError as error:
            if error.status != OUT_OF_MEMORY:
                raise
            free, total = SIZE(), SIZE()
            self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
            raise DriverError(
                error.status,
                f"{size:,} bytes of device memory are needed, {free.value:,} of {total.value:,} are free: build for a "
                "smaller batch, or free what other programs hold",
                "cuMemAlloc_v2",
            ) from error
        return int(address.value)

    def free(self, address: int) -> None:
        """Give memory back; waits for the device."""
        self.call("cuMemFree_v2", address)

    def allocate_host(self, size: int) -> int:
        """Page-locked host memory: copies from and to it run beside the host, at full speed."""
        return self._handle("cuMemHostAlloc", max(size, 1), 0)

    def to_device(self, address: int, host: int, size: int, stream: int) -> None:
        """Copy from host memory. Page-locked memory must stay as it is until the copy is done; other memory has been
        read when this returns.
        """
        self.call("cuMemcpyHtoDAsync_v2", address, host, size, stream)

    def to_host(self, host: int, address: int, size: int, stream: int) -> None:
        """Copy to host memory; complete when the stream is."""
        self.call("cuMemcpyDtoHAsync_v2", host, address, size, stream)

    def on_device(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy between device memories."""
        self.call("cuMemcpyDtoDAsync_v2", to, source, size, stream)

    def fill(self, address: int, value: int, size: int, stream: int) -> None:
        """Set every byte of device memory."""
        self.call("cuMemsetD8Async", address, value, size, stream)

    # --- modules and launches

    def module(self, binary: bytes) -> int:
        """Load a fatbinary, cubin or PTX (whose text ends with a zero: bytes objects have one behind them).

        Raises
        ------
        DriverError
            With what the driver's compiler says, where it had to translate PTX.
        """
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options = (INT * 2)(_ERROR_LOG, _ERROR_LOG_BYTES)
        values = (POINTER * 2)(ctypes.addressof(log), _LOG_BYTES)
        image = ctypes.cast(ctypes.c_char_p(binary), POINTER)
        try:
            return self._handle("cuModuleLoadDataEx", image, 2, options, values)
        except DriverError as error:
            said = log.value.decode(errors="replace").strip()
            supported = ".".join(map(str, self.version()))
            message = f"{error.message}; the driver supports CUDA {supported}" + (f"; it says: {said}" if said else "")
            raise DriverError(error.status, message, "cuModuleLoadDataEx") from error

    def function(self, module: int, name: str, shared_bytes: int = 0) -> int:
        """A kernel of a module, loaded onto the device and allowed to use so much dynamic shared memory."""
        function = self._handle("cuModuleGetFunction", module, name.encode())
        if "cuFuncLoad" in self._entries:
            # Else lazy loading would put it off to the first launch.
            self.call("cuFuncLoad", function)
        if shared_bytes:
            # The default limit is 48 KiB less what the kernel declares statically.
            self.call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared_bytes)
        return function

    def launch(
        self,
        function: int,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        stream: int,
        addresses: Sequence[int],
    ) -> None:
        """Launch a kernel whose parameters are all pointers."""
        values = (U64 * len(addresses))(*addresses)
        start = ctypes.addressof(values)
        pointers = (POINTER * len(addresses))(*range(start, start + 8 * len(addresses), 8))
        self.call("cuLaunchKernel", function, *grid, *block, shared_bytes, stream, pointers, None)

    # --- graphs

    def graph(self) -> int:
        """An empty graph."""
        return self._handle("cuGraphCreate", 0)

    def add_kernel(self, graph: int, after: int | None, kernel: KernelNode) -> int:
        """A launch that follows node `after`; its node. Parameters are copied."""
        dependencies = (POINTER * 1)(after) if after is not None else None
        return self._handle(
            "cuGraphAddKernelNode_v2", graph, dependencies, int(after is not None), ctypes.byref(kernel)
        )

    def instantiate(self, graph: int) -> int:
        """The graph, ready to launch."""
        return self._handle("cuGraphInstantiateWithFlags", graph, 0)

    def set_kernel(self, executable: int, node: int, kernel: KernelNode) -> None:
        """Change a node for launches to come; those under way are not affected."""
        self.call("cuGraphExecKernelNodeSetParams_v2", executable, node, ctypes.byref(kernel))

    def upload_graph(self, executable: int, stream: int) -> None:
        """Bring a graph to the device ahead of its first launch."""
        self.call("cuGraphUpload", executable, stream)

    def launch_graph(self, executable: int, stream: int) -> None:
        """Run a graph; a stream that is being recorded does not take one."""
        self.call("cuGraphLaunch", executable, stream)

    # --- streams and events

    def stream(self) -> int:
        """A stream that does not wait for the default one."""
        return self._handle("cuStreamCreate", _NON_BLOCKING)

    def synchronize(self, stream: int) -> None:
        """Wait for everything on a stream."""
        self.call("cuStreamSynchronize", stream)

    def is_capturing(self, stream: int) -> bool:
        """Whether what is put on a stream is recorded into somebody's graph."""
        status = INT()
        self.call("cuStreamIsCapturing", stream, ctypes.byref(status))
        return status.value != 0

    def event(self, *, has_time: bool = True) -> int:
        """An event; without a time it is cheaper to wait for."""
        return self._handle("cuEventCreate", 0 if has_time else _DISABLE_TIMING)

    def record(self, event: int, stream: int) -> None:
        """Note this point of a stream."""
        self.call("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """The stream goes on when the event as last recorded has happened."""
        self.call("cuStreamWaitEvent", stream, event, 0)

    def wait_here(self, event: int) -> None:
        """Wait for an event in this thread."""
        self.call("cuEventSynchronize", event)

    def has_happened(self, event: int) -> bool:
        """Whether an event has happened."""
        try:
            self.call("cuEventQuery", event)
        except DriverError as error:
            if error.status != NOT_READY:
                raise
            return False
        return True

    def milliseconds(self, start: int, stop: int) -> float:
        """Time between two events; waits for the second."""
        elapsed = ctypes.c_float()
        self.call("cuEventSynchronize", stop)
        self.call("cuEventElapsedTime", ctypes.byref(elapsed), start, stop)
        return float(elapsed.value)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Driver._after_fork)
