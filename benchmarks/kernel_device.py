"""Kernels on a GPU, one set of launches at a time, with memory that shows what was written where it may not be. Needs
numpy, the driver and this package: neither tvm nor torch.

Not run on a GPU so far: checked against the stand-in for the driver that the tests use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lpsn_tvm.targets.cuda_driver import Driver
from lpsn_tvm.targets.cuda_errors import is_dead

Array = npt.NDArray[Any]
GUARD_BYTES = 1 << 16
GUARD = 0xA5
_ALIGNMENT = 256
"""Bytes; what cuMemAlloc guarantees."""


class Launch(Protocol):
    """One launch; parameters are pointers to buffers by name."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[Any, ...]


class GuardError(Exception):
    """A kernel wrote outside of its buffers."""


class KernelDevice:
    """One GPU.

    Parameters
    ----------
    index : int
        As the driver counts.
    has_guards : bool
        One allocation for all buffers, 64 KiB between them that must keep their bytes. Without: an allocation per
        buffer of exactly its size, for compute-sanitizer.
    """

    def __init__(self, index: int = 0, *, has_guards: bool = True) -> None:
        self.driver, self.has_guards = Driver.open(), has_guards
        self.device = self.driver.device(index)
        self.context = self.driver.context(self.device)
        with self.driver.using(self.context):
            self.stream = self.driver.stream()
        self._modules: dict[str, int] = {}

    def close(self) -> None:
        """Give everything back."""
        with self.driver.using(self.context):
            for module in self._modules.values():
                self.driver.call("cuModuleUnload", module)
            self.driver.call("cuStreamDestroy_v2", self.stream)
        self._modules.clear()
        self.driver.release(self.device)

    def run(self, binary: bytes, launches: Sequence[Launch], buffers: Mapping[Any, Array]) -> None:
        """Run launches one after another.

        Parameters
        ----------
        binary : bytes
            Machine code with the kernels.
        buffers : mapping of argument to contiguous ndarray
            Device memory by what launches call it, as far from a multiple of 256 bytes as the view is within its array;
            the same array twice is one buffer. What the kernels made of it is written back to writeable arrays.

        Raises
        ------
        GuardError
            Bytes around a buffer changed.
        DriverError
            A kernel failed, or the driver refused it; `cuda_errors.is_dead` says whether the process is lost.
        """
        with self.driver.using(self.context):
            memory = _Memory(self, buffers)
            try:
                for launch in launches:
                    function = self.driver.function(self._module(binary), launch.kernel, launch.shared_bytes)
                    arguments = [memory.addresses[name] for name in launch.arguments]
                    self.driver.launch(function, launch.grid, launch.block, launch.shared_bytes, self.stream, arguments)
                self.driver.synchronize(self.stream)
                memory.read_back()
            except BaseException as error:
                if not is_dead(error):
                    memory.free()
                raise
            memory.free()

    def _module(self, binary: bytes) -> int:
        digest = hashlib.sha256(binary).hexdigest()
        if digest not in self._modules:
            self._modules[digest] = self.driver.module(binary)
        return self._modules[digest]


def misalignment(array: Array) -> int:
    """Where a view begins within its array, modulo the alignment of device allocations."""
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    return (array.ctypes.data - root.ctypes.data) % _ALIGNMENT


class _Memory:
    """Device memory of one call."""

    def __init__(self, device: KernelDevice, buffers: Mapping[Any, Array]) -> None:
        self.device, self.driver = device, device.driver
        distinct = {(array.ctypes.data, array.nbytes): array for array in buffers.values()}
        self.names = {(array.ctypes.data, array.nbytes): name for name, array in buffers.items()}
        self.arrays = list(distinct.values())
        self.allocations: list[int] = []
        self.parts: list[tuple[int, Array]] = []
        """Address and host image of every allocation."""
        try:
            starts = self._together() if device.has_guards else self._apart()
        except BaseException:
            self.free()
            raise
        where = dict(zip(distinct, starts, strict=True))
        self.addresses = {name: where[array.ctypes.data, array.nbytes] for name, array in buffers.items()}

    def _allocate(self, size: int) -> int:
        self.allocations.append(self.driver.allocate(size))
        return self.allocations[-1]

    def _upload(self, address: int, image: Array) -> None:
        self.parts.append((address, image))
        if image.nbytes:
            self.driver.to_device(address, image.ctypes.data, image.nbytes, self.device.stream)

    def _together(self) -> list[int]:
        """One allocation with guards; the buffers' addresses."""
        self.starts, end = [], GUARD_BYTES
        for array in self.arrays:
            self.starts.append(end + misalignment(array))
            end = -(-(self.starts[-1] + array.nbytes) // _ALIGNMENT) * _ALIGNMENT + GUARD_BYTES
        image = np.full(end, GUARD, np.uint8)
        for start, array in zip(self.starts, self.arrays, strict=True):
            image[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        address = self._allocate(end)
        self._upload(address, image)
        return [address + start for start in self.starts]

    def _apart(self) -> list[int]:
        """One allocation per buffer."""
        found = []
        for array in self.arrays:
            offset = misalignment(array)
            image = np.concatenate([np.full(offset, GUARD, np.uint8), array.reshape(-1).view(np.uint8)])
            address = self._allocate(image.nbytes)
            self._upload(address, image)
            found.append(address + offset)
        return found

    def read_back(self) -> None:
        """Bring the results to the arrays, after a look at the guards."""
        images = []
        for address, before in self.parts:
            image = np.empty_like(before)
            if image.nbytes:
                self.driver.to_host(image.ctypes.data, address, image.nbytes, self.device.stream)
            images.append(image)
        self.driver.synchronize(self.device.stream)
        if self.device.has_guards:
            self._check_guards(images[0])
            found = [images[0][start : start + a.nbytes] for start, a in zip(self.starts, self.arrays, strict=True)]
        else:
            found = [image[misalignment(a) :] for image, a in zip(images, self.arrays, strict=True)]
        for array, part in zip(self.arrays, found, strict=True):
            if array.flags.writeable:
                array.reshape(-1).view(np.uint8)[:] = part

    def _check_guards(self, image: Array) -> None:
        is_guard = np.ones(image.size, bool)
        for start, array in zip(self.starts, self.arrays, strict=True):
            is_guard[start : start + array.nbytes] = False
        wrong = np.flatnonzero(is_guard & (image != GUARD))
        if not wrong.size:
            return
        first = int(wrong[0])
        spans = zip(self.starts, self.arrays, strict=True)
        start, array = min(spans, key=lambda s: min(abs(s[0] - first), abs(s[0] + s[1].nbytes - first)))
        name = self.names[array.ctypes.data, array.nbytes]
        place = f"{start - first} bytes before" if first < start else f"{first - start - array.nbytes} bytes behind"
        raise GuardError(
            f"{wrong.size} bytes outside of all buffers were written, the first {place} {name!r} ({array.nbytes} bytes)"
        )

    def free(self) -> None:
        """Give the memory back."""
        for address in self.allocations:
            self.driver.free(address)
        self.allocations.clear()


def fitting_arch(archs: Sequence[str], number: int) -> str | None:
    """Which of the architectures' machine code a GPU of compute capability `number` runs: the newest of the same major
    version that is not newer than it. None: none.
    """
    numbers = {int(arch.removeprefix("sm_").rstrip("af")): arch for arch in archs}
    fitting = [n for n in numbers if n // 10 == number // 10 and n <= number]
    return numbers[max(fitting)] if fitting else None
