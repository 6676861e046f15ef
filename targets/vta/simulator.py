"""The embedded accelerator: strict checks, functional execution and cycle counts of a linked program.

Strict checks refuse what the hardware designs do not agree on; see `simulate`. The compiled core works on the encoded
instructions and on the bytes of the regions, so what is simulated is what a board would read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lpsn_tvm.errors import LpsnError, TargetError, VtaProgramError
from lpsn_tvm.targets.vta.cycle_model import CycleModel, CycleModelStruct, cycle_model, model_struct
from lpsn_tvm.targets.vta.simulator_library import library

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig
    from lpsn_tvm.targets.vta.program import LinkedProgram, LinkedRegion

UNITS = ("load", "compute", "store")
COUNTERS = (
    "cycles load_instructions store_instructions gemm_instructions alu_instructions nop_instructions "
    "finish_instructions gemm_uops reset_uops alu_uops insn_bytes_read uop_bytes_read wgt_bytes_read inp_bytes_read "
    "acc_bytes_read out_bytes_written load_busy compute_busy store_busy load_to_compute_wait compute_to_load_wait "
    "compute_to_store_wait store_to_compute_wait load_fetch_wait compute_fetch_wait store_fetch_wait "
    "load_memory_wait compute_memory_wait fetch_queue_wait"
).split()
"""Names of the counters; cycles are 0 without a cycle model.

`*_busy`: executing. `a_to_b_wait`: stall for a token of that queue. `*_fetch_wait`: stall for an instruction.
`*_memory_wait`: of the busy cycles, waiting for the read port. `fetch_queue_wait`: fetch finds a command queue full.
"""

_READ, _WRITE, _INSTRUCTIONS = 1, 2, 4
_ACCESS = {"r": _READ, "w": _WRITE, "rw": _READ | _WRITE}


@dataclass(frozen=True)
class Timeline:
    """When each instruction executed.

    Parameters
    ----------
    unit : uint8[n]
        Index into `UNITS`, by instruction.
    start, end : int64[n]
        Cycles.
    kind : tuple of str
        "load.inp", "gemm", "alu", "store", "nop", ... of each instruction.
    marks : sequence of (instruction index, name)
        Where each operator begins.
    """

    unit: NDArray[np.uint8]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    kind: tuple[str, ...]
    marks: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class SimulationResult:
    """What a run left behind.

    Parameters
    ----------
    memory : dict of region name to bytes
        Contents at the end of every region that has any.
    cycles : int
        0 without a cycle model.
    counters : dict of str to int
        By name, see `COUNTERS`.
    timeline : Timeline or None
    """

    memory: dict[str, bytes]
    cycles: int
    counters: dict[str, int]
    timeline: Timeline | None = None

    @property
    def utilization(self) -> float:
        """GEMM micro-operations (resets not counted) per cycle, 0..1."""
        return self.counters["gemm_uops"] / self.cycles if self.cycles else 0.0

    @property
    def dram_bytes(self) -> int:
        """Bytes read and written, instructions included."""
        return sum(value for name, value in self.counters.items() if name.endswith(("bytes_read", "bytes_written")))


class _Config(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "isa_version batch block_in block_out inp_bits wgt_bits out_bits log_uop_depth log_inp_depth "
            "log_wgt_depth log_acc_depth uop_depth"
        ).split()
    ]


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in "addr size access defined".split()] + [("data", ctypes.c_void_p)]


class _Request(ctypes.Structure):
    _fields_ = [
        ("config", ctypes.POINTER(_Config)),
        ("instructions", ctypes.c_char_p),
        ("instruction_count", ctypes.c_int64),
        ("instruction_addr", ctypes.c_int64),
        ("regions", ctypes.POINTER(_Region)),
        ("region_count", ctypes.c_int64),
        ("model", ctypes.POINTER(CycleModelStruct)),
        *((name, ctypes.c_int64) for name in "functional strict interleaved seed".split()),
        ("counters", ctypes.c_void_p),
        ("timeline", ctypes.c_void_p),
        ("failed_index", ctypes.c_int64),
        ("message", ctypes.c_char_p),
        ("message_size", ctypes.c_int64),
    ]


def simulate(
    linked: LinkedProgram,
    *,
    inputs: Mapping[str, bytes] | None = None,
    model: str | CycleModel | None = "rtl",
    functional: bool = True,
    strict: bool = True,
    interleaving: int | None = None,
    timeline: bool = False,
) -> SimulationResult:
    """Run a linked program.

    Parameters
    ----------
    linked : LinkedProgram
        Instructions and regions at their addresses.
    inputs : mapping of region name to bytes
        Contents of regions before the start, each as long as its region; they replace the region's own data.
    model : "rtl", "pynq", CycleModel or None
        Cycle model; None counts no cycles.
    functional : bool
        Compute the values. Without it the core only checks (if strict) and counts.
    strict : bool
        Refuse a program that breaks a rule of the hardware: ranges, alignment, access rights, data never written,
        hazards, data races between units, token and queue rules, shift amounts, overflow of int32.
    interleaving : int, optional
        Seed: execute the units in a random order that the tokens permit. A correct program gives the same bytes.
    timeline : bool
        Keep start and end of every instruction (needs a cycle model).

    Raises
    ------
    VtaProgramError
        A rule is broken; names instruction index, disassembly and rule.
    TargetError
        An input does not fit its region, or the compiled core is missing.
    """
    chosen = None if model is None else cycle_model(model)
    if timeline and chosen is None:
        raise TargetError("a timeline needs a cycle model", where="simulate")
    memory = _Memory(linked, inputs or {}, functional)
    counters = np.zeros(len(COUNTERS), np.int64)
    times = np.zeros((linked.insn_count, 2), np.int64) if timeline else None
    request = _request(linked, memory, chosen, counters, times)
    request.functional, request.strict = functional, strict
    request.interleaved, request.seed = interleaving is not None, (interleaving or 0) & 0x7FFFFFFFFFFFFFFF
    _call(linked, request)
    named = dict(zip(COUNTERS, counters.tolist(), strict=True))
    shown = None if times is None else _timeline(linked, times)
    return SimulationResult(memory.contents(), named["cycles"], named, shown)


def _request(
    linked: LinkedProgram,
    memory: _Memory,
    model: CycleModel | None,
    counters: NDArray[np.int64],
    times: NDArray[np.int64] | None,
) -> _Request:
    """The core's view of the arguments; it keeps alive what it points to."""
    return _Request(
        config=ctypes.pointer(_config(linked.config)),
        instructions=linked.insn,
        instruction_count=len(linked.insn) // 16,
        instruction_addr=linked.insn_addr,
        regions=memory.table,
        region_count=len(memory.table),
        model=None if model is None else ctypes.pointer(model_struct(model, linked.config)),
        counters=counters.ctypes.data,
        timeline=None if times is None else times.ctypes.data,
    )


def _call(linked: LinkedProgram, request: _Request) -> None:
    message = ctypes.create_string_buffer(2048)
    request.message, request.message_size = ctypes.cast(message, ctypes.c_char_p), len(message)
    request.failed_index = -1
    status = library().vta_simulate(ctypes.byref(request))
    if status:
        _refuse(linked, status, int(request.failed_index), message.value.decode(errors="replace"))


def _config(config: VtaConfig) -> _Config:
    return _Config(
        isa_version=1 if config.isa_version == "0.0.1" else 2,
        batch=config.batch,
        block_in=config.block_in,
        block_out=config.block_out,
        inp_bits=config.inp_bits,
        wgt_bits=config.wgt_bits,
        out_bits=config.out_bits,
        log_uop_depth=config.uop_index_bits,
        log_inp_depth=config.inp_index_bits,
        log_wgt_depth=config.wgt_index_bits,
        log_acc_depth=config.acc_index_bits,
        uop_depth=config.uop_depth,
    )


class _Memory:
    """The regions' bytes: shared where the program only reads, copied where it writes."""

    def __init__(self, linked: LinkedProgram, inputs: Mapping[str, bytes], functional: bool) -> None:
        unknown = sorted(set(inputs) - set(linked.regions))
        if unknown:
            raise TargetError(f"there is no such region; regions: {', '.join(linked.regions)}", where=unknown[0])
        self.arrays: dict[str, NDArray[np.uint8]] = {}
        self.given: dict[str, bytes] = {}
        self._alive: list[NDArray[np.uint8]] = []  # the core holds bare addresses
        rows = []
        for name, region in linked.regions.items():
            if region.addr == linked.insn_addr:
                continue  # the instructions, as a program directory lists them
            rows.append(self._row(name, region, inputs.get(name, region.data), functional))
        rows.append(_Region(linked.insn_addr, len(linked.insn), _READ | _INSTRUCTIONS, 1, None))
        self.table = (_Region * len(rows))(*rows)

    def _row(self, name: str, region: LinkedRegion, data: bytes | None, functional: bool) -> Any:
        access = _ACCESS[region.access]
        if data is not None and len(data) != region.size:
            raise TargetError(f"has {region.size} bytes, got {len(data)}", where=f"region {name!r}")
        if data is not None:
            self.given[name] = data
        # A run without values takes it that the caller will provide what the program only reads.
        defined = data is not None or (not functional and access == _READ)
        if data is None and not functional:
            return _Region(region.addr, region.size, access, defined, None)
        if access & _WRITE:
            array = np.zeros(region.size, np.uint8) if data is None else np.frombuffer(data, np.uint8).copy()
            self.arrays[name] = array
        else:
            array = np.zeros(region.size, np.uint8) if data is None else np.frombuffer(data, np.uint8)
        self._alive.append(array)
        return _Region(region.addr, region.size, access, defined, array.ctypes.data)

    def contents(self) -> dict[str, bytes]:
        """Bytes of every region that has any."""
        return self.given | {name: array.tobytes() for name, array in self.arrays.items()}


def _refuse(linked: LinkedProgram, status: int, index: int, message: str) -> None:
    if status != 1:
        raise TargetError(message, where="VTA simulator")
    if not 0 <= index < linked.insn_count:
        raise VtaProgramError(message, where="program")
    raise VtaProgramError(message, where=f"instruction {index} ({_text(linked, index)})")


def _text(linked: LinkedProgram, index: int) -> str:
    from lpsn_tvm.targets.vta.isa import decode, disassemble

    word = linked.insn[16 * index : 16 * index + 16]
    try:
        return disassemble(decode(word, linked.config)[0], linked.config)
    except LpsnError:  # what the strict checks refuse need not decode
        return f"0x{int.from_bytes(word, 'little'):032x}"


def _timeline(linked: LinkedProgram, times: NDArray[np.int64]) -> Timeline:
    from lpsn_tvm.targets.vta.isa import Alu, Finish, Gemm, Load, decode

    units, kinds = np.zeros(len(times), np.uint8), []
    for index, insn in enumerate(decode(linked.insn, linked.config)):
        compute = isinstance(insn, (Gemm, Alu, Finish)) or (isinstance(insn, Load) and insn.memory in ("uop", "acc"))
        units[index] = 1 if compute else 0 if isinstance(insn, Load) else 2
        if isinstance(insn, Gemm):
            kinds.append("reset" if insn.reset else "gemm")
        elif isinstance(insn, (Alu, Finish)):
            kinds.append(type(insn).__name__.lower())
        elif insn.x_size == 0:
            kinds.append("nop")
        else:
            kinds.append(f"load.{insn.memory}" if isinstance(insn, Load) else "store")
    return Timeline(units, times[:, 0].copy(), times[:, 1].copy(), tuple(kinds), tuple(linked.marks))
