"""Small accelerator programs written by hand, and what they must leave, for tests of the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lpsn_tvm.targets.vta.config import PRESETS, VtaConfig
from lpsn_tvm.targets.vta.isa import Alu, Finish, Gemm, Instruction, Load, Store, encode_uops
from lpsn_tvm.targets.vta.program import LinkedProgram, Program, Region, link

CONFIG = PRESETS["pynq"]
NOP = dict(x_size=0, y_size=0)


def final_nop() -> Load:
    """The compute NOP that waits for the store unit."""
    return Load(memory="uop", pop_next=True, **NOP)


@dataclass
class Hand:
    """A program under construction: instructions with the region that each one addresses."""

    config: VtaConfig = CONFIG
    instructions: list[Instruction] = field(default_factory=list)
    targets: list[str | None] = field(default_factory=list)
    regions: dict[str, Region] = field(default_factory=dict)
    uop_rows: list[list[int]] = field(default_factory=list)

    def region(self, name: str, data: np.ndarray | bytes | None, access: str = "r", size: int | None = None) -> Hand:
        raw = data.tobytes() if isinstance(data, np.ndarray) else data
        self.regions[name] = Region(name, len(raw) if raw is not None else int(size or 0), raw, access)  # type: ignore[arg-type]
        return self

    def uops(self, rows: Sequence[Sequence[int]]) -> Hand:
        self.uop_rows = [[*row, *[0] * (3 - len(row))] for row in rows]
        return self.region("uop", encode_uops(np.array(self.uop_rows), self.config))

    def add(self, instruction: Instruction, target: str | None = None) -> Hand:
        self.instructions.append(instruction)
        self.targets.append(target)
        return self

    def link(self) -> LinkedProgram:
        return link(Program(self.config, self.instructions, self.targets, self.regions))


def pack(values: np.ndarray, bits: int) -> bytes:
    """Signed values, low bits first in each byte."""
    flat = values.astype(np.int64).ravel() & ((1 << bits) - 1)
    per_byte = 8 // bits
    shifts = np.arange(per_byte) * bits
    return (flat.reshape(-1, per_byte) << shifts).sum(1).astype(np.uint8).tobytes()


def unpack(data: bytes, bits: int) -> np.ndarray:
    """Inverse of `pack`."""
    per_byte = 8 // bits
    raw = np.frombuffer(data, np.uint8)[:, None] >> (np.arange(per_byte) * bits) & ((1 << bits) - 1)
    return (raw.astype(np.int64).ravel() ^ (1 << (bits - 1))) - (1 << (bits - 1))


@dataclass
class Matmul:
    """y[n, o] = low bits of min(127, (sum_k x[n, k] w[o, k] + bias[o]) >> shift), n tiles, one output block."""

    linked: LinkedProgram
    expected: bytes


def matmul(config: VtaConfig = CONFIG, *, tiles: int = 4, fan_in: int = 2, shift: int = 3, seed: int = 0) -> Matmul:
    """A correct program of one GEMM, one tensor ALU, two immediate ALUs and one STORE."""
    hand, expected = matmul_hand(config, tiles=tiles, fan_in=fan_in, shift=shift, seed=seed)
    return Matmul(hand.link(), expected)


def matmul_hand(
    config: VtaConfig = CONFIG, *, tiles: int = 4, fan_in: int = 2, shift: int = 3, seed: int = 0
) -> tuple[Hand, bytes]:
    """The same program before linking, and the bytes it must leave in "y"."""
    rng = np.random.default_rng(seed)
    low, high = -(1 << (config.inp_bits - 1)), (1 << (config.inp_bits - 1)) - 1
    x = rng.integers(low, high + 1, (fan_in, tiles, config.batch, config.block_in))
    w = rng.integers(
        -(1 << (config.wgt_bits - 1)), 1 << (config.wgt_bits - 1), (fan_in, config.block_out, config.block_in)
    )
    bias = rng.integers(-500, 500, (tiles, config.batch, config.block_out)).astype(np.int32)
    acc = np.einsum("ktbi,koi->tbo", x, w) + bias
    expected = np.minimum(acc >> shift, high)
    hand = Hand(config).region("x", pack(x, config.inp_bits)).region("w", pack(w, config.wgt_bits))
    hand.region("bias", bias).region("y", None, "w", size=tiles * config.out_tile_bytes)
    # Micro-operations: of the GEMM (dst t, src t), of the tensor ALU (dst t, src tiles + t), of immediates (t, t).
    gemm = [(t, t, 0) for t in range(tiles)]
    alu = [(t, tiles + t) for t in range(tiles)]
    immediate = [(t, t) for t in range(tiles)]
    hand.uops([*gemm, *alu, *immediate])
    for instruction, target in _matmul_instructions(tiles, fan_in, shift, high):
        hand.add(instruction, target)
    return hand, pack(expected, config.out_bits)


def _matmul_instructions(tiles: int, fan_in: int, shift: int, high: int) -> list[tuple[Any, str | None]]:
    loops: dict[str, Any] = dict(iter_out=1, iter_in=1)
    return [
        (Load(memory="inp", sram=0, dram=0, y_size=1, x_size=fan_in * tiles, x_stride=fan_in * tiles), "x"),
        (Load(memory="wgt", sram=0, dram=0, y_size=1, x_size=fan_in, x_stride=fan_in, push_next=True), "w"),
        (Load(memory="uop", sram=0, dram=0, y_size=1, x_size=3 * tiles, x_stride=3 * tiles), "uop"),
        (Load(memory="acc", sram=tiles, dram=0, y_size=1, x_size=tiles, x_stride=tiles), "bias"),
        (Gemm(reset=True, uop_begin=0, uop_end=tiles, **loops), None),
        (
            Gemm(uop_begin=0, uop_end=tiles, iter_out=fan_in, iter_in=1, src_out=tiles, wgt_out=1, pop_prev=True),
            None,
        ),
        (Alu(op="add", uop_begin=tiles, uop_end=2 * tiles, **loops), None),
        (Alu(op="shr", use_imm=True, imm=shift, uop_begin=2 * tiles, uop_end=3 * tiles, **loops), None),
        (Alu(op="min", use_imm=True, imm=high, uop_begin=2 * tiles, uop_end=3 * tiles, push_next=True, **loops), None),
        (Store(sram=0, dram=0, y_size=1, x_size=tiles, x_stride=tiles, pop_prev=True, push_prev=True), "y"),
        (final_nop(), None),
        (Finish(), None),
    ]
