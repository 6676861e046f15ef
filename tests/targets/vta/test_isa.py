"""Instruction encoding: golden words from the bit tables, exact round trips, refusals."""

from __future__ import annotations

import struct
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vta_instructions import instructions

from lpsn_tvm.errors import ArtifactError, CompileError
from lpsn_tvm.targets.vta.config import PRESETS, VtaConfig
from lpsn_tvm.targets.vta.isa import (
    Alu,
    Finish,
    Gemm,
    Instruction,
    Load,
    Store,
    decode,
    decode_uops,
    encode,
    encode_uops,
)

V1, V2 = PRESETS["pynq"], PRESETS["pynq-0.0.2"]
SMALL = VtaConfig(log_uop_buff_size=9, log_inp_buff_size=10, log_wgt_buff_size=12, log_acc_buff_size=11)
GEOMETRIES = [*PRESETS.values(), SMALL, replace(SMALL, isa_version="0.0.2", log_inp_buff_size=12)]
GEOMETRY_IDS = [*PRESETS, "small", "small-0.0.2"]


def _words(instruction: Instruction, config: VtaConfig) -> tuple[int, int]:
    low, high = struct.unpack("<QQ", encode([instruction], config))
    return low, high


EXTENT = 8 | 14 << 16 | 28 << 32
LOAD = Load(
    pop_next=True, push_next=True, memory="inp", sram=0x123, dram=0x89ABCDEF, y_size=8, x_size=14, x_stride=28,
    y_pad_0=1, y_pad_1=2, x_pad_0=3, x_pad_1=15,
)  # fmt: skip
STORE = Store(pop_prev=True, push_prev=True, sram=77, dram=0x10002000, y_size=8, x_size=14, x_stride=28)
GEMM = Gemm(
    pop_prev=True, push_next=True, reset=True, uop_begin=5, uop_end=8192, iter_out=16383, iter_in=3,
    dst_out=2047, dst_in=1, src_out=2, src_in=2046, wgt_out=1023, wgt_in=9,
)  # fmt: skip
ALU = Alu(
    push_prev=True, op="shr", uop_begin=1, uop_end=2, iter_out=3, iter_in=4, dst_out=5, dst_in=6, src_out=7, src_in=8,
    use_imm=True, imm=-3,
)  # fmt: skip
PADS = 1 << 48 | 2 << 52 | 3 << 56 | 15 << 60
LOOPS = 1 << 8 | 2 << 21 | 3 << 35 | 4 << 49
FACTORS = 5 | 6 << 11 | 7 << 22 | 8 << 33
GEMM_LOW = 2 | 1 << 3 | 1 << 6 | 1 << 7 | 5 << 8 | 8192 << 21 | 16383 << 35 | 3 << 49
GEMM_HIGH = 2047 | 1 << 11 | 2 << 22 | 2046 << 33 | 1023 << 44 | 9 << 54
GOLDEN: list[tuple[str, Instruction, VtaConfig, int, int]] = [
    ("load", LOAD, V1, 0 | 1 << 4 | 1 << 6 | 2 << 7 | 0x123 << 9 | 0x89ABCDEF << 25, EXTENT | PADS),
    ("load", LOAD, V2, 0 | 1 << 4 | 1 << 6 | 2 << 7 | 0x123 << 10 | 0x89ABCDEF << 26, EXTENT | PADS),
    # Two bits cannot hold the output buffer's id 4.
    ("store", STORE, V1, 1 | 1 << 3 | 1 << 5 | 77 << 9 | 0x10002000 << 25, EXTENT),
    ("store", STORE, V2, 1 | 1 << 3 | 1 << 5 | 4 << 7 | 77 << 10 | 0x10002000 << 26, EXTENT),
    ("gemm", GEMM, V1, GEMM_LOW, GEMM_HIGH),
    ("gemm", GEMM, V2, GEMM_LOW, GEMM_HIGH),
    ("alu", ALU, V1, 4 | 1 << 5 | LOOPS, FACTORS | 3 << 44 | 1 << 46 | 0xFFFD << 47),
    ("alu", ALU, V2, 4 | 1 << 5 | LOOPS, FACTORS | 3 << 44 | 1 << 47 | 0xFFFD << 48),
    ("finish", Finish(), V1, 3, 0),
    ("nop", Load(memory="uop", pop_next=True), V2, 1 << 4, 0),
]


@pytest.mark.parametrize(
    ("instruction", "config", "low", "high"),
    [golden[1:] for golden in GOLDEN],
    ids=[f"{name}-{config.isa_version}" for name, _, config, _, _ in GOLDEN],
)
def test_golden_words(instruction: Instruction, config: VtaConfig, low: int, high: int) -> None:
    assert [hex(word) for word in _words(instruction, config)] == [hex(low), hex(high)]
    assert decode(struct.pack("<QQ", low, high), config) == [instruction]


def test_golden_words_of_a_small_geometry() -> None:
    """uop 7, inp 6, wgt 4, acc 5 bits: every field after them moves."""
    assert (SMALL.uop_index_bits, SMALL.inp_index_bits, SMALL.wgt_index_bits, SMALL.acc_index_bits) == (7, 6, 4, 5)
    gemm = Gemm(uop_begin=3, uop_end=128, iter_out=2, iter_in=5, dst_out=31, dst_in=1, src_out=63, src_in=2, wgt_in=15)
    low = 2 | 3 << 8 | 128 << 15 | 2 << 23 | 5 << 37
    assert _words(gemm, SMALL) == (low, 31 | 1 << 5 | 63 << 10 | 2 << 16 | 15 << 26)
    alu = Alu(op="max", uop_end=1, dst_out=1, dst_in=2, src_out=3, src_in=31, use_imm=True, imm=-32768)
    high = 1 | 2 << 5 | 3 << 10 | 31 << 15 | 1 << 20 | 1 << 22 | 0x8000 << 23
    assert _words(alu, SMALL) == (4 | 1 << 15 | 1 << 23 | 1 << 37, high)
    assert encode_uops(np.array([[31, 63, 15], [1, 2, 3]]), SMALL).tolist() == [
        31 | 63 << 5 | 15 << 11,
        1 | 2 << 5 | 3 << 11,
    ]


def test_golden_micro_ops() -> None:
    assert encode_uops(np.array([[1, 2, 3], [2047, 2047, 1023]]), V1).tolist() == [1 | 2 << 11 | 3 << 22, 0xFFFFFFFF]
    assert encode_uops(np.zeros((0, 3), np.int64), V1).shape == (0,)


@pytest.mark.parametrize("config", GEOMETRIES, ids=GEOMETRY_IDS)
def test_round_trip(config: VtaConfig) -> None:
    @given(program=st.lists(instructions(config), max_size=8))
    @settings(max_examples=60, derandomize=True, deadline=None)
    def check(program: list[Instruction]) -> None:
        data = encode(program, config)
        assert len(data) == 16 * len(program)
        assert decode(data, config) == program

    check()


@given(words=st.lists(st.integers(0, 2**32 - 1), max_size=20))
@settings(max_examples=50, derandomize=True)
def test_micro_op_round_trip(words: list[int]) -> None:
    """The default micro-op has no spare bit, so any word is one."""
    data = np.array(words, np.uint32)
    np.testing.assert_array_equal(encode_uops(decode_uops(data, V1), V1), data)


def test_versions_differ() -> None:
    """Nothing but GEMM and FINISH decodes under the other version into what it was."""
    for instruction in (LOAD, STORE, ALU):
        data = encode([instruction], V1)
        try:
            assert decode(data, V2) != [instruction]
        except ArtifactError as error:
            assert "isa_version 0.0.2" in str(error)


@pytest.mark.parametrize("config", GEOMETRIES, ids=GEOMETRY_IDS)
def test_every_field_is_range_checked(config: VtaConfig) -> None:
    limits = {
        Load: {"sram": 2**16, "dram": 2**32, "y_size": 2**16, "x_size": 2**16, "x_stride": 2**16, "y_pad_0": 16,
               "y_pad_1": 16, "x_pad_0": 16, "x_pad_1": 16, "pop_prev": 2},
        Store: {"sram": 2**16, "dram": 2**32, "y_size": 2**16, "x_size": 2**16, "x_stride": 2**16, "push_next": 2},
        Gemm: {"uop_begin": 4 * 2**config.log_uop_buff_size // 16, "uop_end": 2 * 2**config.log_uop_buff_size // 4,
               "iter_out": 2**14, "iter_in": 2**14, "dst_out": config.acc_depth, "dst_in": config.acc_depth,
               "src_out": config.inp_depth, "src_in": config.inp_depth, "wgt_out": config.wgt_depth,
               "wgt_in": config.wgt_depth, "reset": 2},
        Alu: {"dst_out": config.acc_depth, "src_in": config.acc_depth, "imm": 2**15, "use_imm": 2},
    }  # fmt: skip
    for kind, fields in limits.items():
        for name, limit in fields.items():
            encode([kind(**{name: limit - 1})], config)
            lowest = -(2**15) if name == "imm" else 0
            for value in (limit, lowest - 1):
                with pytest.raises(
                    CompileError, match=rf"instruction 1: {kind.__name__}: {name} is {value}, allowed: {lowest}.."
                ):
                    encode([Finish(), kind(**{name: value})], config)


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        (Alu(op="mul"), "op is 'mul', allowed: min, max, add, shr"),  # type: ignore[arg-type]
        (Load(memory="out"), "memory is 'out', allowed: uop, wgt, inp, acc"),  # type: ignore[arg-type]
        (Load(memory=[]), "memory is "),  # type: ignore[arg-type]
        (Load(sram=1.5), "sram is 1.5, allowed: 0..65535"),  # type: ignore[arg-type]
        (Load(sram="1"), "sram is '1'"),  # type: ignore[arg-type]
        (Load(dram=2**70), "dram is 1180591620717411303424"),
        (Load(sram=[1]), r"sram is \[1\]"),  # type: ignore[arg-type]
        (Finish(pop_prev=True), "Finish: pop_prev is True, allowed: 0..0"),
        ("gemm", "not an instruction: 'gemm'"),
    ],
)
def test_what_cannot_be_encoded(instruction: Any, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        encode([instruction], V1)


def test_numpy_values_are_values() -> None:
    expected = encode([Load(sram=3, y_size=2, pop_prev=True)], V1)
    mixed = Load(sram=np.uint64(3), y_size=np.int8(2), pop_prev=np.bool_(True))  # type: ignore[arg-type]
    assert encode([mixed], V1) == expected


@pytest.mark.parametrize(
    ("low", "high", "config", "message"),
    [
        (5, 0, V1, "opcode 5 is unknown"),
        (7, 0, V2, "opcode 7 is unknown"),
        (3 | 1 << 3, 0, V1, "Finish: bits 0x8 of word 0"),
        (3, 1, V1, "Finish: bits 0x1 of word 1"),
        (0 | 4 << 7, 0, V2, "memory 4 is unknown"),
        (1, 0, V2, "Store: bits 0x200 of word 0"),
        (1 | 4 << 7, 1 << 48, V2, "Store: bits 0x1000000000000 of word 1"),
        (0 | 1 << 58, 0, V2, "Load: bits 0x400000000000000 of word 0"),
        (2 | 1 << 63, 0, V1, "Gemm: bits"),
        (4 | 1 << 7, 0, V1, "Alu: bits 0x80 of word 0"),
        (4, 4 << 44, V2, "op 4 is unknown"),
        (4, 1 << 63, V1, "Alu: bits 0x8000000000000000 of word 1"),
    ],
)
def test_what_cannot_be_decoded(low: int, high: int, config: VtaConfig, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"instruction 1: {message}"):
        decode(struct.pack("<QQQQ", 3, 0, low, high), config)


def test_half_an_instruction() -> None:
    with pytest.raises(ArtifactError, match="17 bytes, not a multiple of 16"):
        decode(bytes(17), V1)
    assert decode(b"", V1) == []


@pytest.mark.parametrize(
    ("uops", "message"),
    [
        (np.array([[0, 0, 0], [2048, 0, 0]]), "micro-op 1: dst is 2048, allowed: 0..2047"),
        (np.array([[0, -1, 0]]), "micro-op 0: src is -1"),
        (np.array([[0, 0, 1024]]), "micro-op 0: wgt is 1024, allowed: 0..1023"),
        (np.array([[0, 0]]), r"expected integers \[n, 3\], got int64\[1, 2\]"),
        (np.array([[0.0, 0, 0]]), r"expected integers"),
    ],
)
def test_micro_ops_that_do_not_fit(uops: Any, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        encode_uops(uops, V1)


def test_speed() -> None:
    """30,000 instructions in well under half a second (ten times the usual time allowed here)."""
    program: list[Instruction] = [LOAD, GEMM, ALU, STORE] * 7500
    start = time.process_time()
    assert len(decode(encode(program, V1), V1)) == 30000
    assert time.process_time() - start < 2
