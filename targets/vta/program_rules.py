"""Memory rules of a linked program: regions apart and aligned, transfers inside them, nothing read before it exists.

Tokens, hazards and the other rules of the hardware are the simulator's business; here is what a loader relies on.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.vta.config import VtaConfig
from lpsn_tvm.targets.vta.isa import Finish, Load, Store, decode, disassemble
from lpsn_tvm.targets.vta.program import ADDRESS_LIMIT, INSTRUCTIONS, PAGE, LinkedProgram, LinkedRegion, tile_bytes

MAX_TRANSFER = 32 << 20
"""Bytes that one LOAD or STORE may move."""
_ACCESS = ("r", "w", "rw")


def check_memory(program: LinkedProgram) -> None:
    """Refuse a program that breaks a rule of its own memory map.

    Instructions are followed in program order, which is the order that its tokens enforce between the units.

    Raises
    ------
    CompileError
        Regions overlap, are misaligned or end beyond 2**32; a row of a transfer leaves its region, goes against its
        access, or reads what nothing has written; FINISH is not the last instruction and the only one.
    ArtifactError
        The instructions cannot be decoded.
    """
    check_regions(program)
    instructions = decode(program.insn, program.config)
    finishes = [index for index, instruction in enumerate(instructions) if isinstance(instruction, Finish)]
    if finishes != [len(instructions) - 1]:
        raise CompileError(
            f"FINISH must be the last instruction and the only one; found at {finishes} of {len(instructions)}",
            where="instructions",
        )
    memory = _Memory(program)
    for index, instruction in enumerate(instructions):
        if isinstance(instruction, (Load, Store)) and instruction.x_size and instruction.y_size:
            problem = memory.transfer(instruction)
            if problem:
                raise CompileError(
                    f"{problem} (`{disassemble(instruction, program.config)}`)", where=f"instruction {index}"
                )


def check_regions(program: LinkedProgram) -> None:
    """The rules about regions alone; see `check_memory`."""
    if INSTRUCTIONS in program.regions:
        raise CompileError("is the name of the instructions' own region", where=f"region {INSTRUCTIONS!r}")
    if program.insn_addr % PAGE:
        raise CompileError(f"instructions at 0x{program.insn_addr:x} are not aligned to {PAGE}", where=INSTRUCTIONS)
    spans = [(program.insn_addr, len(program.insn), INSTRUCTIONS)]
    for name, region in program.regions.items():
        where = f"region {name!r}"
        if region.access not in _ACCESS:
            raise CompileError(f"access is {region.access!r}, allowed: {', '.join(_ACCESS)}", where=where)
        if region.data is not None and len(region.data) != region.size:
            raise CompileError(f"has {len(region.data)} bytes of data, not {region.size}", where=where)
        spans.append((region.addr, region.size, name))
    spans.sort()
    for addr, size, name in spans:
        if addr < 0 or size < 0 or addr + size > ADDRESS_LIMIT:
            raise CompileError(f"0x{addr:x} + {size} bytes is not below 2**32", where=f"region {name!r}")
    filled = [span for span in spans if span[1]]
    for (addr, size, name), (following, _, other) in pairwise(filled):
        if addr + size > following:
            raise CompileError(f"0x{addr:x} + {size} bytes overlaps region {other!r}", where=f"region {name!r}")


class _Memory:
    """Which bytes hold a value, as the instructions go by."""

    def __init__(self, program: LinkedProgram) -> None:
        self._config: VtaConfig = program.config
        self._regions = sorted(program.regions.values(), key=lambda region: region.addr)
        self._starts = np.array([region.addr for region in self._regions], np.int64)
        # Only regions without contents need it.
        self._defined: Mapping[str, npt.NDArray[np.bool_]] = {
            region.name: np.zeros(region.size, np.bool_) for region in self._regions if region.data is None
        }

    def transfer(self, instruction: Load | Store) -> str | None:
        """What is wrong with the transfer, if anything; a store defines its bytes."""
        tile = tile_bytes(instruction, self._config)
        rows, columns, stride = instruction.y_size, instruction.x_size * tile, instruction.x_stride * tile
        first = instruction.dram * tile
        if rows * columns > MAX_TRANSFER:
            return f"moves {rows * columns} bytes, at most {MAX_TRANSFER} are allowed"
        if self._holds(first, (rows - 1) * stride + columns):
            return self._rows(instruction, first, rows, columns, stride)
        for row in range(rows):  # rows in several regions
            if not self._holds(first + row * stride, columns):
                return f"row {row} at 0x{first + row * stride:x} of {columns} bytes is not inside one region"
            problem = self._rows(instruction, first + row * stride, 1, columns, 0)
            if problem:
                return problem
        return None

    def _region(self, address: int) -> LinkedRegion | None:
        """The last region that starts at or before an address (of equal starts, the one that is not empty)."""
        index = int(np.searchsorted(self._starts, address, side="right")) - 1
        while index > 0 and not self._regions[index].size:
            index -= 1
        return self._regions[index] if index >= 0 else None

    def _holds(self, address: int, size: int) -> bool:
        region = self._region(address)
        return region is not None and address + size <= region.addr + region.size

    def _rows(self, instruction: Load | Store, first: int, rows: int, columns: int, stride: int) -> str | None:
        """The same for rows that are all in one region."""
        region, tile = self._region(first), tile_bytes(instruction, self._config)
        assert region is not None
        writes = isinstance(instruction, Store)
        if region.addr % tile:
            return f"region {region.name!r} at 0x{region.addr:x} is not aligned to its tile of {tile} bytes"
        if ("w" if writes else "r") not in region.access:
            return (
                f"region {region.name!r} has access {region.access!r}: it cannot be {'written' if writes else 'read'}"
            )
        defined = self._defined.get(region.name)
        if defined is None:
            return None
        offset = first - region.addr
        for part in _slices(defined, offset, rows, columns, stride):
            if writes:
                part[...] = True
            elif not part.all():
                return f"reads bytes of region {region.name!r} that nothing has written"
        return None


def _slices(array: npt.NDArray[Any], first: int, rows: int, columns: int, stride: int) -> list[npt.NDArray[Any]]:
    """Views of the rows: all but the last as one matrix, and the last (behind it the array may end)."""
    if stride == columns:
        return [array[first : first + rows * columns]]
    if stride < columns:  # rows overlap
        return [array[first + row * stride : first + row * stride + columns] for row in range(rows)]
    last = first + (rows - 1) * stride
    return [array[first:last].reshape(rows - 1, stride)[:, :columns], array[last : last + columns]]
