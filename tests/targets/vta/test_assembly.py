"""Assembly text: one line per instruction, exactly invertible."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from vta_instructions import instructions

from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.vta.config import PRESETS, VtaConfig
from lpsn_tvm.targets.vta.isa import (
    Alu,
    Finish,
    Gemm,
    Instruction,
    Load,
    Store,
    assemble,
    assemble_program,
    disassemble,
)

CONFIG = PRESETS["pynq"]
LINES = [
    (
        Load(memory="wgt", dram=0x1400, y_size=1, x_size=9, x_stride=9, pop_next=True, push_next=True),
        "load.wgt sram=0 addr=0x140000 rows=1 columns=9 stride=9 | pop_next push_next",
    ),
    (
        Load(memory="inp", sram=16, dram=0x18000, y_size=8, x_size=14, x_stride=14, y_pad_0=1, x_pad_0=1, x_pad_1=1),
        "load.inp sram=16 addr=0x180000 rows=8 columns=14 stride=14 pad_y=1,0 pad_x=1,1",
    ),
    (Gemm(reset=True, uop_end=4, iter_out=14), "gemm reset uops=0:4 loops=14x1"),
    (
        Gemm(uop_begin=4, uop_end=8, iter_out=14, iter_in=14, dst_out=14, dst_in=1, src_out=16, src_in=1, wgt_in=9),
        "gemm uops=4:8 loops=14x14 dst=14,1 src=16,1 wgt=0,9",
    ),
    (
        Alu(op="max", uop_end=1, iter_in=784, dst_in=1, src_in=1, use_imm=True, imm=-128, push_next=True),
        "alu.max uops=0:1 loops=1x784 dst=0,1 src=0,1 imm=-128 | push_next",
    ),
    (Alu(op="max", uop_end=1, use_imm=True), "alu.max uops=0:1 loops=1x1 imm=0"),
    (Alu(op="add", uop_end=1, imm=5), "alu.add uops=0:1 loops=1x1 unused_imm=5"),
    (
        Store(sram=3, dram=0x100, y_size=1, x_size=4, x_stride=4, pop_prev=True),
        "store sram=3 addr=0x1000 rows=1 columns=4 stride=4 | pop_prev",
    ),
    (Load(memory="uop", push_next=True), "nop.uop | push_next"),
    (Store(push_prev=True), "nop.out | push_prev"),
    (Finish(), "finish"),
]


@pytest.mark.parametrize(("instruction", "line"), LINES, ids=[line.split()[0] for _, line in LINES])
def test_lines(instruction: Instruction, line: str) -> None:
    assert disassemble(instruction, CONFIG) == line
    assert assemble(line, CONFIG) == instruction


@pytest.mark.parametrize("key", ["pynq", "pynq-4x8", "pynq-i4"])
def test_round_trip(key: str) -> None:
    config: VtaConfig = PRESETS[key]

    @given(instruction=instructions(config))
    @settings(max_examples=150, derandomize=True, deadline=None)
    def check(instruction: Instruction) -> None:
        line = disassemble(instruction, config)
        assert "\n" not in line
        assert assemble(line, config) == instruction

    check()


def test_program_with_comments() -> None:
    text = "\n".join(["# a program", "", *(f"  {line}  # comment" for _, line in LINES)])
    assert assemble_program(text, CONFIG) == [instruction for instruction, _ in LINES]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "unknown mnemonic ''; known: load.uop"),
        ("load.out", "unknown mnemonic 'load.out'"),
        ("gemm uops=1", "expected uops=N:N, got 'uops=1'"),
        ("gemm uops=a:b", "expected uops=N:N"),
        ("gemm uops=1:2:3", "expected uops=N:N"),
        ("gemm sram=1", "unknown operand 'sram=1'; known: uops, loops, dst, src, wgt, reset"),
        ("finish now", "unknown operand 'now'; known: none"),
        ("alu.max reset", "unknown operand 'reset'"),
        ("store addr=0x8", "addr is no multiple of the 16-byte tile"),
        ("store addr=-0x10", "expected addr=0xN"),
        ("gemm dst=4000,0", "dst_out is 4000, allowed: 0..2047"),
        ("alu.shr imm=-40000", "imm is -40000, allowed: -32768..32767"),
        ("nop.inp | pop_all", "unknown flag 'pop_all'; known: pop_prev, pop_next, push_prev, push_next"),
        ("finish | pop_prev", "pop_prev is True, allowed: 0..0"),
    ],
)
def test_bad_lines(line: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        assemble(line, CONFIG)
