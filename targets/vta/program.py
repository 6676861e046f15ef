"""A compiled accelerator program: instructions, memory regions, and where each instruction points; `link` fixes
addresses.

Before linking, the `dram` field of an instruction counts tiles from the start of its region, so that a program can be
placed wherever a runner has allocated memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.vta.isa import Instruction, Load, Store, encode

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

Access = Literal["r", "w", "rw"]
INSTRUCTIONS = "insn"
PAGE = 4096
ADDRESS_LIMIT = 1 << 32
DEFAULT_BASE = 0x100000


@dataclass(frozen=True)
class Region:
    """A piece of memory that a program uses.

    Parameters
    ----------
    name : str
    size : int
        Bytes.
    data : bytes or None
        Contents before the start; None: undefined until written.
    access : {"r", "w", "rw"}
        What the program may do with it.
    """

    name: str
    size: int
    data: bytes | None = None
    access: Access = "r"


@dataclass(frozen=True)
class LinkedRegion(Region):
    """A region at a physical byte address."""

    addr: int = 0


@dataclass(frozen=True)
class Program:
    """A relocatable program.

    Parameters
    ----------
    config : VtaConfig
    instructions : sequence of Instruction
        `dram` in tiles from the start of the region.
    targets : sequence of str or None
        Region that instruction i's `dram` refers to; None where it has none (or transfers nothing).
    regions : mapping of name to Region
        Everything but the instructions themselves.
    marks : sequence of (instruction index, name)
        Where each operator's instructions begin.
    """

    config: VtaConfig
    instructions: Sequence[Instruction]
    targets: Sequence[str | None]
    regions: Mapping[str, Region]
    marks: Sequence[tuple[int, str]] = ()


@dataclass(frozen=True)
class LinkedProgram:
    """A program at fixed addresses, ready to run: `insn` are the encoded instructions at byte address `insn_addr`."""

    config: VtaConfig
    insn: bytes
    insn_addr: int
    regions: Mapping[str, LinkedRegion]
    marks: Sequence[tuple[int, str]] = field(default=())

    @property
    def insn_count(self) -> int:
        """Number of instructions."""
        return len(self.insn) // 16


def tile_bytes(instruction: Load | Store, config: VtaConfig) -> int:
    """Bytes per unit of the instruction's `dram` field."""
    if isinstance(instruction, Store):
        return config.out_tile_bytes
    return {
        "uop": config.uop_tile_bytes,
        "wgt": config.wgt_tile_bytes,
        "inp": config.inp_tile_bytes,
        "acc": config.acc_tile_bytes,
    }[instruction.memory]


def place(program: Program, base: int = DEFAULT_BASE) -> dict[str, int]:
    """Byte addresses one after the other from `base`, pages apart: instructions first (`"insn"`), then every region.

    Raises
    ------
    CompileError
        They do not fit below 2**32.
    """
    addresses, address = {}, _aligned(base)
    sizes = {INSTRUCTIONS: 16 * len(program.instructions)} | {r.name: r.size for r in program.regions.values()}
    for name, size in sizes.items():
        addresses[name] = address
        address = _aligned(address + max(size, 1))
    if address > ADDRESS_LIMIT:
        raise CompileError(f"the program needs {address - base} bytes; addresses end at 2**32", where="link")
    return addresses


def link(program: Program, addresses: Mapping[str, int] | None = None, *, base: int = DEFAULT_BASE) -> LinkedProgram:
    """The program at given byte addresses (one per region and `"insn"`, each a multiple of 4096), or from `base` on.

    Raises
    ------
    CompileError
        An address is missing or not aligned, or a field does not fit its instruction.
    """
    addresses = place(program, base) if addresses is None else addresses
    for name in (INSTRUCTIONS, *program.regions):
        if name not in addresses or addresses[name] % PAGE:
            raise CompileError(f"needs an address that is a multiple of {PAGE}", where=f"region {name!r}")
    linked = [
        replace(instruction, dram=instruction.dram + addresses[target] // tile_bytes(instruction, program.config))
        if target is not None and isinstance(instruction, (Load, Store))
        else instruction
        for instruction, target in zip(program.instructions, program.targets, strict=True)
    ]
    regions = {
        region.name: LinkedRegion(region.name, region.size, region.data, region.access, addresses[region.name])
        for region in program.regions.values()
    }
    return LinkedProgram(
        program.config, encode(linked, program.config), addresses[INSTRUCTIONS], regions, tuple(program.marks)
    )


def _aligned(address: int) -> int:
    return -(-address // PAGE) * PAGE
