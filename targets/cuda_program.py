"""What a compiled network is on a GPU: kernel launches over one planned arena, constants, machine code; and its form in
a file. Needs numpy only.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from lpsn_tvm.errors import ArtifactError

Region = Literal["arena", "constants", "input"]
ALIGNMENT = 256
"""Bytes; what cuMemAlloc guarantees, and more than any vector access needs."""


@dataclass(frozen=True)
class Place:
    """Where a buffer of `size` bytes lies: so many bytes into the arena or the constants, or input number `offset`."""

    region: Region
    offset: int
    size: int


@dataclass(frozen=True)
class Port:
    """An input or output of the network as the device sees it: plain memory of `shape` and `dtype`."""

    shape: tuple[int, ...]
    dtype: str
    place: Place

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class KernelLaunch:
    """One launch; all parameters of the kernel are pointers.

    Parameters
    ----------
    kernel : str
        Symbol in the machine code.
    grid, block : tuple of int
        Three extents each.
    shared_bytes : int
        Dynamic shared memory.
    arguments : tuple of Place
    name : str
        The network's variable that it computes (a layer's node), for reports.
    bytes : int
        What it reads and writes at least: the size of every buffer that it is given, once.
    operations : int
        Multiplications and additions of the layer (2 x MACs); 0 for what only moves or rescales numbers.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[Place, ...]
    name: str = ""
    bytes: int = 0
    operations: int = 0


@dataclass(frozen=True)
class CudaProgram:
    """A network for one architecture.

    Parameters
    ----------
    arch : str
        "sm_86".
    launches : tuple of KernelLaunch
        In order, on one stream.
    inputs, outputs : tuple of Port
    arena_bytes : int
        Device memory for everything that lives during a call.
    constants : bytes
        Packed weights, biases, scales and tables.
    binary : bytes
        Fatbinary for `cuModuleLoadData`.
    has_ptx : bool
        Whether newer architectures can translate it.
    toolkit : str
        CUDA version of the compiler that made the machine code, "13.0"; "" where that is not known.
    """

    arch: str
    launches: tuple[KernelLaunch, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    arena_bytes: int
    constants: bytes = field(repr=False)
    binary: bytes = field(repr=False)
    has_ptx: bool = False
    toolkit: str = ""

    @property
    def number(self) -> int:
        """86 for sm_86."""
        return arch_number(self.arch)

    def misses(self, driver: tuple[int, int]) -> str:
        """What a driver that supports CUDA (major, minor) lacks, in words; "" for nothing.

        Machine code runs with drivers of its toolkit's major version and later ones.
        Source: NVIDIA, "CUDA Compatibility", Minor Version Compatibility.
        """
        major = int(self.toolkit.partition(".")[0] or 0)
        if driver[0] >= major:
            return ""
        return (
            f"built with CUDA {self.toolkit}, which needs a driver for CUDA {major}.0 or later; this one is for "
            f"{driver[0]}.{driver[1]}: update it, or build with the nvcc of CUDA {driver[0]}"
        )


def arch_number(arch: str) -> int:
    """86 for "sm_86"."""
    return int(arch.removeprefix("sm_").rstrip("af"))


EMBEDDED = (53, 62, 72, 87, 101, 110)
"""Compute capabilities of Jetson and Drive modules: machine code for others does not run there, nor theirs elsewhere.

Source: CUDA C++ Programming Guide, "Binary Compatibility".
"""


def best_program(programs: Iterable[CudaProgram], number: int) -> CudaProgram | None:
    """The program that runs best on compute capability `number`; None where none runs.

    Machine code runs on its own architecture and on later ones of the same generation (sm_80 on sm_86; not from or to
    `EMBEDDED` ones), PTX on any later one; what was compiled for sm_90a runs on sm_90 alone, for sm_100f within its
    generation.
    """

    def is_runnable(program: CudaProgram) -> bool:
        if program.arch.endswith("a"):
            return program.number == number
        is_same_generation = program.number // 10 == number // 10
        if program.number != number and (program.number in EMBEDDED or number in EMBEDDED):
            is_same_generation = False
        return program.number <= number and (is_same_generation or (program.has_ptx and not program.arch.endswith("f")))

    runnable = [program for program in programs if is_runnable(program)]
    return max(runnable, key=lambda program: program.number, default=None)


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


# --- files


def programs_to_files(programs: Iterable[CudaProgram]) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """(manifest records, binary members); constants that are equal are stored once."""
    records: list[dict[str, Any]] = []
    members: dict[str, bytes] = {}
    for program in programs:
        constants = next((n for n, d in members.items() if d == program.constants), f"{program.arch}.constants.bin")
        binary = f"{program.arch}.fatbin"
        members[constants], members[binary] = program.constants, program.binary
        record = {
            "arch": program.arch,
            "arena_bytes": program.arena_bytes,
            "has_ptx": program.has_ptx,
            "toolkit": program.toolkit,
            "constants": constants,
            "binary": binary,
            "inputs": [asdict(port) for port in program.inputs],
            "outputs": [asdict(port) for port in program.outputs],
            "launches": [_launch_record(launch) for launch in program.launches],
        }
        records.append(record)
    return records, members


def _launch_record(launch: KernelLaunch) -> dict[str, Any]:
    arguments = [[place.region, place.offset, place.size] for place in launch.arguments]
    return {**asdict(launch), "arguments": arguments}


def programs_from_files(records: Iterable[Mapping[str, Any]], members: Mapping[str, bytes]) -> tuple[CudaProgram, ...]:
    """Inverse of `programs_to_files`.

    Raises
    ------
    KeyError, TypeError, ValueError
        Something is missing or of the wrong form, or a buffer lies outside its region.
    """
    return tuple(_program(record, members) for record in records)


def _program(record: Mapping[str, Any], members: Mapping[str, bytes]) -> CudaProgram:
    program = CudaProgram(
        arch=str(record["arch"]),
        launches=tuple(_launch(item) for item in record["launches"]),
        inputs=tuple(_port(item) for item in record["inputs"]),
        outputs=tuple(_port(item) for item in record["outputs"]),
        arena_bytes=int(record["arena_bytes"]),
        constants=members[record["constants"]],
        binary=members[record["binary"]],
        has_ptx=bool(record["has_ptx"]),
        toolkit=_version(record.get("toolkit", "")),
    )
    places = [place for launch in program.launches for place in launch.arguments]
    for place in (*places, *(port.place for port in (*program.inputs, *program.outputs))):
        _check(place, program)
    return program


def _check(place: Place, program: CudaProgram) -> None:
    """A file that was made up must not make kernels write outside of their memory."""
    if place.region == "input":
        is_inside = 0 <= place.offset < len(program.inputs) and place.size <= program.inputs[place.offset].size
    else:
        limit = program.arena_bytes if place.region == "arena" else len(program.constants)
        is_inside = 0 <= place.offset and place.size >= 0 and place.offset + place.size <= limit
    if place.region not in ("arena", "constants", "input") or not is_inside:
        raise ValueError(f"a buffer of {place.size} bytes at {place.offset} does not fit {place.region}")


def _version(value: Any) -> str:
    if re.fullmatch(r"(\d+\.\d+)?", str(value)) is None:
        raise ValueError(f"{value!r} is no version")
    return str(value)


def _port(record: Mapping[str, Any]) -> Port:
    shape = tuple(int(extent) for extent in record["shape"])
    place = Place(record["place"]["region"], int(record["place"]["offset"]), int(record["place"]["size"]))
    return Port(shape, str(np.dtype(record["dtype"])), place)


def _three(values: Any) -> tuple[int, int, int]:
    x, y, z = (int(value) for value in values)
    return x, y, z


def _launch(record: Mapping[str, Any]) -> KernelLaunch:
    return KernelLaunch(
        kernel=str(record["kernel"]),
        grid=_three(record["grid"]),
        block=_three(record["block"]),
        shared_bytes=int(record["shared_bytes"]),
        arguments=tuple(Place(region, int(at), int(size)) for region, at, size in record["arguments"]),
        name=str(record["name"]),
        bytes=int(record.get("bytes", 0)),
        operations=int(record.get("operations", 0)),
    )


class Packer:
    """Arrays one after the other, aligned; equal ones once."""

    def __init__(self) -> None:
        self._blob = io.BytesIO()
        self._known: dict[tuple[str, bytes], int] = {}

    def add(self, array: np.ndarray) -> int:
        """Offset of the array's bytes."""
        data = np.ascontiguousarray(array).tobytes()
        key = (str(array.dtype), data)
        if key not in self._known:
            self._blob.write(b"\0" * (-self._blob.tell() % ALIGNMENT))
            self._known[key] = self._blob.tell()
            self._blob.write(data)
        return self._known[key]

    def bytes(self) -> bytes:
        """All of them."""
        return self._blob.getvalue()
