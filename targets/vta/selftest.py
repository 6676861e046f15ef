"""Small programs that a board runs first: one that finds out which instruction set a bitstream speaks, and one whose
result is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lpsn_tvm.targets.vta.builder import ProgramBuilder
from lpsn_tvm.targets.vta.isa import Finish, Instruction, Load, Store
from lpsn_tvm.targets.vta.layout import pack_integers
from lpsn_tvm.targets.vta.program import Program

if TYPE_CHECKING:
    from lpsn_tvm.targets.vta.config import VtaConfig

ROWS, DEPTH, SHIFT = 4, 2, 3


def probe(config: VtaConfig) -> Program:
    """A program of version 0.0.1 that ends there and hangs on version 0.0.2, and that touches no memory.

    The first instruction, a LOAD of INP that transfers nothing, has SRAM address 1. Version 0.0.2 reads that bit as the
    third bit of the memory id and hands the instruction to the compute unit; the token that the next instruction waits
    for never comes.
    """
    instructions: list[Instruction] = [
        Load(memory="inp", sram=1, push_next=True),
        Load(memory="uop", pop_prev=True, push_next=True),
        Store(pop_prev=True, push_prev=True),
        Load(memory="uop", pop_next=True),
        Finish(),
    ]
    return Program(config, instructions, [None] * len(instructions), {})


def known_answer(config: VtaConfig) -> tuple[Program, bytes]:
    """A program that uses every unit (loads, GEMM, ALU, store), and the bytes it must leave in region "output".

    `out = clip((bias + x @ w.T + 1) >> 3)` for 4 rows of tiles, 2 input blocks deep.
    """
    rng = np.random.default_rng(2024)
    limit = 1 << (config.inp_bits - 1)
    # Small weights: most results lie within the limits, some are clipped.
    x = rng.integers(-limit, limit, (ROWS, DEPTH, config.batch, config.block_in))
    weight = rng.integers(-2, 2, (DEPTH, config.block_out, config.block_in))
    bias = rng.integers(-limit, limit, (ROWS, config.batch, config.block_out)).astype("<i4")
    acc = bias + np.einsum("rkbi,koi->rbo", x, weight)
    expected = np.clip((acc + 1) >> SHIFT, -limit, limit - 1)
    builder = ProgramBuilder(config)
    for name, data in (
        ("input", pack_integers(x, config.inp_bits)),
        ("weight", pack_integers(weight, config.wgt_bits)),
        ("bias", bias.tobytes()),
    ):
        builder.region(name, len(data), data=data)
    builder.region("output", ROWS * config.out_tile_bytes, access="w")
    builder.load("inp", 0, "input", 0, columns=ROWS * DEPTH)
    builder.load("wgt", 0, "weight", 0, columns=DEPTH)
    builder.load("acc", 0, "bias", 0, columns=ROWS)
    rows = np.arange(ROWS)
    builder.gemm(np.stack([rows, rows * DEPTH, 0 * rows], axis=1), [(DEPTH, 0, 1, 1)])
    pairs = np.stack([rows, rows], axis=1)
    for kind, immediate in (("add", 1), ("shr", SHIFT), ("max", -limit), ("min", limit - 1)):
        builder.alu(kind, pairs, immediate=immediate)  # type: ignore[arg-type]
    builder.store(0, "output", 0, columns=ROWS)
    return builder.finish(), pack_integers(expected, config.out_bits)
