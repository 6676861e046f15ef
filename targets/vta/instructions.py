"""Instructions of the accelerator as values, independent of how a build encodes them.

Source: the public VTA hardware repository (include/vta/hw_spec.h).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Memory = Literal["uop", "wgt", "inp", "acc"]
AluKind = Literal["min", "max", "add", "shr"]


@dataclass
class Flags:
    """Dependence tokens. For compute, prev is load and next is store; load has only next flags, store only prev."""

    pop_prev: bool = False
    pop_next: bool = False
    push_prev: bool = False
    push_next: bool = False


@dataclass
class Load(Flags):
    """DRAM -> SRAM, `y_size` rows of `x_size` tiles, rows `x_stride` tiles apart in DRAM, zeros around (inp only).

    `dram` is a tile address (physical byte address / tile bytes); before linking, tiles from the region's start.
    `x_size` 0 makes it a NOP. Load unit: inp, wgt. Compute unit: uop, acc.
    """

    memory: Memory = "inp"
    sram: int = 0
    dram: int = 0
    y_size: int = 0
    x_size: int = 0
    x_stride: int = 0
    y_pad_0: int = 0
    y_pad_1: int = 0
    x_pad_0: int = 0
    x_pad_1: int = 0


@dataclass
class Store(Flags):
    """OUT SRAM -> DRAM, `y_size` rows of `x_size` tiles, rows `x_stride` tiles apart in DRAM. `x_size` 0: NOP."""

    sram: int = 0
    dram: int = 0
    y_size: int = 0
    x_size: int = 0
    x_stride: int = 0


@dataclass
class Gemm(Flags):
    """for i < iter_out, j < iter_in, uop in [uop_begin, uop_end): acc[dst + i*dst_out + j*dst_in] += inp x wgt^T, or =
    0 with `reset`.
    """

    reset: bool = False
    uop_begin: int = 0
    uop_end: int = 0
    iter_out: int = 1
    iter_in: int = 1
    dst_out: int = 0
    dst_in: int = 0
    src_out: int = 0
    src_in: int = 0
    wgt_out: int = 0
    wgt_in: int = 0


@dataclass
class Alu(Flags):
    """The same loops: acc[dst] = op(acc[dst], imm) or op(acc[dst], acc[src])."""

    op: AluKind = "add"
    uop_begin: int = 0
    uop_end: int = 0
    iter_out: int = 1
    iter_in: int = 1
    dst_out: int = 0
    dst_in: int = 0
    src_out: int = 0
    src_in: int = 0
    use_imm: bool = False
    imm: int = 0


@dataclass
class Finish(Flags):
    """The last instruction; it has no flags."""


Instruction = Load | Store | Gemm | Alu | Finish
