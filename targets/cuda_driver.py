"""The CUDA driver through ctypes, loaded when first needed: devices, memory, modules, streams, graphs and events.

Not run on a GPU yet: calls and their arguments are checked against a recording stand-in in the tests.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lpsn_tvm.errors import ArtifactError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
MAX_DYNAMIC_SHARED, COMPUTE_MAJOR, COMPUTE_MINOR = 8, 75, 76
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES; CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
CAPTURE_THREAD_LOCAL, NON_BLOCKING, DEFAULT = 1, 1, 0
STATIC_SHARED_LIMIT = 48 * 1024

_INT, _UINT, _SIZE, _POINTER, _U64, _TEXT = (
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_uint64,
    ctypes.c_char_p,
)
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_UINT,),
    "cuGetErrorString": (_INT, ctypes.POINTER(_TEXT)),
    "cuDeviceGetCount": (ctypes.POINTER(_INT),),
    "cuDeviceGet": (ctypes.POINTER(_INT), _INT),
    "cuDeviceGetName": (_TEXT, _INT, _INT),
    "cuDeviceGetAttribute": (ctypes.POINTER(_INT), _INT, _INT),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(_POINTER), _INT),
    "cuCtxSetCurrent": (_POINTER,),
    "cuModuleLoadData": (ctypes.POINTER(_POINTER), _POINTER),
    "cuModuleUnload": (_POINTER,),
    "cuModuleGetFunction": (ctypes.POINTER(_POINTER), _POINTER, _TEXT),
    "cuFuncSetAttribute": (_POINTER, _INT, _INT),
    "cuMemAlloc_v2": (ctypes.POINTER(_U64), _SIZE),
    "cuMemFree_v2": (_U64,),
    "cuMemcpyHtoDAsync_v2": (_U64, _POINTER, _SIZE, _POINTER),
    "cuMemcpyDtoHAsync_v2": (_POINTER, _U64, _SIZE, _POINTER),
    "cuMemcpyDtoDAsync_v2": (_U64, _U64, _SIZE, _POINTER),
    "cuStreamCreate": (ctypes.POINTER(_POINTER), _UINT),
    "cuStreamDestroy_v2": (_POINTER,),
    "cuStreamSynchronize": (_POINTER,),
    "cuStreamWaitEvent": (_POINTER, _POINTER, _UINT),
    "cuLaunchKernel": (_POINTER, *(_UINT,) * 7, _POINTER, ctypes.POINTER(_POINTER), ctypes.POINTER(_POINTER)),
    "cuStreamBeginCapture_v2": (_POINTER, _INT),
    "cuStreamEndCapture": (_POINTER, ctypes.POINTER(_POINTER)),
    "cuGraphInstantiateWithFlags": (ctypes.POINTER(_POINTER), _POINTER, _U64),
    "cuGraphLaunch": (_POINTER, _POINTER),
    "cuGraphDestroy": (_POINTER,),
    "cuGraphExecDestroy": (_POINTER,),
    "cuEventCreate": (ctypes.POINTER(_POINTER), _UINT),
    "cuEventRecord": (_POINTER, _POINTER),
    "cuEventSynchronize": (_POINTER,),
    "cuEventElapsedTime": (ctypes.POINTER(ctypes.c_float), _POINTER, _POINTER),
    "cuEventDestroy_v2": (_POINTER,),
}
"""Entry point -> C types of its arguments; every one returns a CUresult."""


@dataclass(frozen=True)
class Device:
    """One GPU."""

    index: int
    name: str
    number: int
    """Compute capability: 86 for sm_86."""


class Driver:
    """The loaded driver; methods raise `ArtifactError` with the driver's own words where a call fails."""

    _opened: dict[str, Driver] = {}  # noqa: RUF012  (one driver per library and process)

    def __init__(self, library: Any) -> None:
        self._library = library
        for name, arguments in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, _INT
        self._current: set[int] = set()
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
                    "driver, building and loading do not",
                    where="cuda",
                ) from error
            try:
                cls._opened[LIBRARY] = cls(library)
            except AttributeError as error:
                raise ArtifactError(f"the CUDA driver is too old, 12.0 is needed: {error}", where="cuda") from error
        return cls._opened[LIBRARY]

    def call(self, name: str, *arguments: Any) -> None:
        """Call one entry point.

        Raises
        ------
        ArtifactError
            It does not return CUDA_SUCCESS.
        """
        status = int(getattr(self._library, name)(*arguments))
        if status:
            text = _TEXT()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            reason = text.value.decode(errors="replace") if text.value else "unknown error"
            raise ArtifactError(f"the CUDA driver reports error {status}, {reason}", where=name)

    def _handle(self, name: str, *arguments: Any) -> int:
        """Call an entry point that writes a handle through its first argument."""
        handle = _POINTER()
        self.call(name, ctypes.byref(handle), *arguments)
        return int(handle.value or 0)

    def device(self, index: int) -> Device:
        """A GPU by number.

        Raises
        ------
        ArtifactError
            There is no such GPU.
        """
        count, device = _INT(), _INT()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        if not 0 <= index < count.value:
            raise ArtifactError(f"there is no GPU {index}; the driver sees {count.value}", where="cuda")
        self.call("cuDeviceGet", ctypes.byref(device), index)
        text = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", text, 256, device)
        numbers = []
        for attribute in (COMPUTE_MAJOR, COMPUTE_MINOR):
            value = _INT()
            self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        return Device(device.value, text.value.decode(errors="replace"), numbers[0] * 10 + numbers[1])

    def context(self, device: Device) -> int:
        """The device's primary context, which torch and others share; to be made current in every thread."""
        return self._handle("cuDevicePrimaryCtxRetain", device.index)

    def set_current(self, context: int) -> None:
        """Make a context current in this thread."""
        self.call("cuCtxSetCurrent", context)

    def allocate(self, size: int) -> int:
        """Device memory, at least one byte; its address."""
        address = _U64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), max(size, 1))
        return int(address.value)

    def free(self, address: int) -> None:
        """Give memory back."""
        self.call("cuMemFree_v2", address)

    def to_device(self, address: int, host: int, size: int, stream: int) -> None:
        """Copy from host memory."""
        self.call("cuMemcpyHtoDAsync_v2", address, host, size, stream)

    def to_host(self, host: int, address: int, size: int, stream: int) -> None:
        """Copy to host memory."""
        self.call("cuMemcpyDtoHAsync_v2", host, address, size, stream)

    def on_device(self, to: int, source: int, size: int, stream: int) -> None:
        """Copy between device memories."""
        self.call("cuMemcpyDtoDAsync_v2", to, source, size, stream)

    def module(self, binary: bytes) -> int:
        """Load a fatbinary, cubin or PTX."""
        return self._handle("cuModuleLoadData", ctypes.cast(ctypes.c_char_p(binary), _POINTER))

    def function(self, module: int, name: str, shared_bytes: int = 0) -> int:
        """A kernel of a module, allowed to use so much dynamic shared memory."""
        function = self._handle("cuModuleGetFunction", module, name.encode())
        if shared_bytes > STATIC_SHARED_LIMIT:
            self.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared_bytes)
        return function

    def stream(self) -> int:
        """A stream that does not wait for the default one."""
        return self._handle("cuStreamCreate", NON_BLOCKING)

    def synchronize(self, stream: int) -> None:
        """Wait for everything on a stream."""
        self.call("cuStreamSynchronize", stream)

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
        values = [_U64(address) for address in addresses]
        pointers = (_POINTER * len(values))(*(ctypes.addressof(value) for value in values))
        self.call("cuLaunchKernel", function, *grid, *block, shared_bytes, stream, pointers, None)

    def begin_capture(self, stream: int) -> None:
        """From now on, what is put on the stream is recorded and not run."""
        self.call("cuStreamBeginCapture_v2", stream, CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """What was recorded, ready to launch."""
        graph = _POINTER()
        self.call("cuStreamEndCapture", stream, ctypes.byref(graph))
        try:
            return self._handle("cuGraphInstantiateWithFlags", graph, DEFAULT)
        finally:
            self.call("cuGraphDestroy", graph)

    def launch_graph(self, graph: int, stream: int) -> None:
        """Run a recorded graph."""
        self.call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Forget a recorded graph."""
        self.call("cuGraphExecDestroy", graph)

    def event(self) -> int:
        """An event that takes the time."""
        return self._handle("cuEventCreate", DEFAULT)

    def record(self, event: int, stream: int) -> None:
        """Note the time at this point of a stream."""
        self.call("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """The stream goes on when the event has happened."""
        self.call("cuStreamWaitEvent", stream, event, DEFAULT)

    def milliseconds(self, start: int, stop: int) -> float:
        """Time between two events; waits for the second."""
        elapsed = ctypes.c_float()
        self.call("cuEventSynchronize", stop)
        self.call("cuEventElapsedTime", ctypes.byref(elapsed), start, stop)
        return float(elapsed.value)

    def destroy_event(self, event: int) -> None:
        """Give an event back."""
        self.call("cuEventDestroy_v2", event)
