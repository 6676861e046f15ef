"""One compiled kernel as a Python callable on numpy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_emulation.build import build_library
from cuda_emulation.translate import Signature, kernels

Array = npt.NDArray[Any]
ORDERS = ("forward", "reversed", "random")
MAX_SHARED = 232448
_GUARD = 1 << 16


class EmulationError(Exception):
    """A launch broke a rule: a race, an access outside of the arrays, a deadlock; or it was called wrongly."""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint32),
        ("order", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("poison", ctypes.c_uint32),
        ("check_accesses", ctypes.c_int32),
        ("check_blocks", ctypes.c_int32),
        ("arguments", ctypes.c_uint64),
        ("arrays", ctypes.c_uint64),
        ("array_count", ctypes.c_uint32),
    )


class _Region(ctypes.Structure):
    _fields_ = (("address", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


class _Parameter(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_int32), ("is_pointer", ctypes.c_int32), ("is_float", ctypes.c_int32))


def _misalignment(array: Array) -> int:
    """Where a view begins within its allocation, modulo the alignment of device allocations."""
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    return (array.ctypes.data - root.ctypes.data) % 256


class _DeviceMemory:
    """Copies of the arrays, far apart from each other; what owns its memory is aligned as a device allocation is."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        self.arrays = arrays
        starts, end = [], _GUARD
        for array in arrays:
            starts.append(end + _misalignment(array))
            end += -(-array.nbytes // 256) * 256 + 256 + _GUARD
        self.memory = np.full(end + 256, 0xA5, np.uint8)
        base = -self.memory.ctypes.data % 256
        self.parts = [
            self.memory[base + start : base + start + array.nbytes] for start, array in zip(starts, arrays, strict=True)
        ]
        for part, array in zip(self.parts, arrays, strict=True):
            part[:] = array.reshape(-1).view(np.uint8)

    def copy_back(self) -> None:
        for part, array in zip(self.parts, self.arrays, strict=True):
            if array.flags.writeable:
                array.reshape(-1).view(np.uint8)[:] = part


_Key = tuple[int, int]


def _key(array: Array) -> _Key:
    """What makes two arguments the same memory: address and bytes."""
    return array.ctypes.data, array.nbytes


def _distinct(arguments: Sequence[Any]) -> dict[_Key, Array]:
    """The arrays by memory. Arrays that overlap in part would be torn apart on the emulated device: refused."""
    found = {_key(a): a for a in arguments if isinstance(a, np.ndarray)}
    end = 0
    for (start, size), array in sorted(found.items(), key=lambda item: item[0]):
        if not array.flags.c_contiguous:
            raise EmulationError("arrays must be contiguous")
        if start < end and size:
            raise EmulationError("two arguments overlap in part; give the same array, or arrays apart")
        end = max(end, start + size)
    return found


def _three(size: int | Sequence[int]) -> tuple[int, int, int]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise EmulationError(f"a grid or block has 1 to 3 positive sizes, not {sizes}")
    return (*sizes, 1, 1)[:3]  # type: ignore[return-value]


@dataclass(frozen=True)
class EmulatedKernel:
    """A kernel of a library that `compile_kernel` made."""

    name: str
    library: ctypes.CDLL
    parameters: tuple[_Parameter, ...]
    signature: Signature
    checked: bool

    def __call__(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        dynamic_shared: int,
        *arguments: Array | np.generic | float,
        order: str = "forward",
        seed: int = 0,
        poison: int = 0xA5,
        check_blocks: bool = True,
    ) -> None:
        """Run every block of one launch.

        Parameters
        ----------
        grid, block : int or sequence of int
            Sizes in x, y, z.
        dynamic_shared : int
            Bytes of dynamic shared memory.
        arguments : contiguous arrays and numbers
            In the kernel's order. The same array given twice is one array.
        order : str
            In which order the threads between two barriers run, and the blocks: "forward", "reversed" or "random".
        poison : int
            Byte that shared memory is filled with.
        check_blocks : bool
            Report memory that two blocks touch, one of them writing, without atomics. Off for kernels where the last
            block reads what others left behind a fence.

        Raises
        ------
        EmulationError
            The kernel broke a rule; arrays then keep their values.
        """
        grid, block = _three(grid), _three(block)
        self._check_sizes(block, dynamic_shared, len(arguments))
        unique = _distinct(arguments)
        memory = _DeviceMemory(list(unique.values()))
        places = {key: part.ctypes.data for key, part in zip(unique, memory.parts, strict=True)}
        values = [self._value(i, argument, places) for i, argument in enumerate(arguments)]
        pointers = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(value) for value in values))
        regions = (_Region * max(len(unique), 1))(*(_Region(part.ctypes.data, part.nbytes) for part in memory.parts))
        launch = _Launch(
            grid, block, dynamic_shared, ORDERS.index(order), seed, poison, self.checked, check_blocks,
            ctypes.addressof(pointers), ctypes.addressof(regions), len(unique),
        )  # fmt: skip
        message = ctypes.create_string_buffer(1024)
        run = getattr(self.library, f"emu_launch_{self.name}")
        if run(ctypes.byref(launch), message, ctypes.c_size_t(len(message))):
            raise EmulationError(f"{self.name}: {message.value.decode()}")
        memory.copy_back()

    def run_all_orders(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        dynamic_shared: int,
        *arguments: Array | np.generic | float,
        seeds: Sequence[int] = (1,),
        **options: Any,
    ) -> None:
        """Run in every order and with different poison; the results must agree.

        Raises
        ------
        EmulationError
            An array depends on the order of the threads or on memory that was never written.
        """
        before = {key: array.copy() for key, array in _distinct(arguments).items()}
        self(grid, block, dynamic_shared, *arguments, **options)
        runs = [("reversed", 0, 0x5A), *(("random", seed, 0x3C ^ seed & 0xFF) for seed in seeds)]
        for order, seed, poison in runs:
            again = {key: array.copy() for key, array in before.items()}
            given = [again[_key(a)] if isinstance(a, np.ndarray) else a for a in arguments]
            self(grid, block, dynamic_shared, *given, order=order, seed=seed, poison=poison, **options)
            for position, (got, want) in enumerate(zip(given, arguments, strict=True)):
                if isinstance(want, np.ndarray) and isinstance(got, np.ndarray) and got.tobytes() != want.tobytes():
                    raise EmulationError(f"{self.name}: argument {position} differs when threads run {order}")

    def _check_sizes(self, block: tuple[int, int, int], dynamic_shared: int, count: int) -> None:
        threads = block[0] * block[1] * block[2]
        limit = min(1024, self.signature.max_threads or 1024)
        if threads > limit:
            raise EmulationError(f"{self.name}: {threads} threads per block, allowed are {limit}")
        if not 0 <= dynamic_shared <= MAX_SHARED:
            raise EmulationError(f"{self.name}: {dynamic_shared} bytes of dynamic shared memory, most are {MAX_SHARED}")
        if count != len(self.parameters):
            raise EmulationError(f"{self.name} takes {len(self.parameters)} arguments, {count} were given")

    def _value(self, index: int, argument: Any, places: dict[_Key, int]) -> Any:
        """The argument as memory that the launch reads `bytes` of."""
        parameter = self.parameters[index]
        if isinstance(argument, np.ndarray) != bool(parameter.is_pointer):
            wanted = "an array" if parameter.is_pointer else "a number"
            raise EmulationError(f"{self.name}: argument {index} must be {wanted}")
        if parameter.is_pointer:
            return ctypes.c_uint64(places[_key(argument)])
        number = {
            (4, 1): ctypes.c_float, (8, 1): ctypes.c_double, (8, 0): ctypes.c_int64, (4, 0): ctypes.c_int32,
            (2, 0): ctypes.c_int16, (1, 0): ctypes.c_int8,
        }[parameter.bytes, parameter.is_float]  # fmt: skip
        value: Any = float(argument) if parameter.is_float else int(argument)
        return number(value)


@cache
def compile_kernel(
    source: str, name: str, *, arch: int = 80, checked: bool = True, contract: bool = False
) -> EmulatedKernel:
    """Compile a kernel of a CUDA source for the host.

    Parameters
    ----------
    source : str
        CUDA C++, as TVM's `inspect_source()` gives it or hand-written.
    name : str
        Name of a `__global__` function.
    arch : int
        Compute capability that the source sees, for example 75 or 80.
    checked : bool
        Look at every memory access (about ten times slower).
    contract : bool
        Fuse products and sums where nvcc may; a bit-exact kernel must not notice.

    Raises
    ------
    UnknownInstructionError
        Inline assembly that the emulation does not know.
    EmulationError
        There is no such kernel.
    """
    known = kernels(source)
    if name not in known:
        raise EmulationError(f"no kernel {name!r}; the source has {', '.join(sorted(known)) or 'none'}")
    library = ctypes.CDLL(str(build_library(source, arch=arch, checked=checked, contract=contract)))
    parameters = (_Parameter * 64)()
    count = getattr(library, f"emu_describe_{name}")(parameters)
    return EmulatedKernel(name, library, tuple(parameters[:count]), known[name], checked)
