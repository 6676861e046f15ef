"""The simulator computes what a plain numpy model computes, in every order that tokens permit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vta_programs import CONFIG, NOP, Hand, final_nop, matmul, pack, unpack
from vta_reference import ReferenceMachine

from lpsn_tvm.errors import TargetError
from lpsn_tvm.targets.vta.builder import ProgramBuilder
from lpsn_tvm.targets.vta.config import PRESETS, VtaConfig
from lpsn_tvm.targets.vta.isa import Alu, Finish, Gemm, Load, Store
from lpsn_tvm.targets.vta.program import LinkedProgram, link
from lpsn_tvm.targets.vta.simulator import simulate


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("interleaving", [None, 0, 1, 2])
def test_matmul(name: str, interleaving: int | None) -> None:
    case = matmul(PRESETS[name])
    assert simulate(case.linked, interleaving=interleaving).memory["y"] == case.expected


@pytest.mark.parametrize("options", [{"strict": False}, {"model": None}, {"model": None, "strict": False}])
def test_matmul_with_options(options: dict[str, Any]) -> None:
    case = matmul()
    result = simulate(case.linked, **options)
    assert result.memory["y"] == case.expected
    assert (result.cycles > 0) == ("model" not in options)


@pytest.mark.parametrize("bits", [4, 8])
def test_out_takes_the_low_bits_and_wraps(bits: int) -> None:
    config = PRESETS["pynq-i4" if bits == 4 else "pynq"]
    values = np.array([-(1 << 31), -129, -9, -8, -1, 0, 7, 8, 15, 16, 127, 128, 255, 256, 1 << 20, (1 << 31) - 1])
    hand = Hand(config).region("a", values.astype(np.int32)).region("y", None, "w", size=config.out_tile_bytes)
    hand.uops([(0, 0)])
    hand.add(Load(memory="uop", y_size=1, x_size=1, x_stride=1), "uop")
    hand.add(Load(memory="acc", y_size=1, x_size=1, x_stride=1), "a")
    hand.add(Alu(op="add", use_imm=True, imm=0, uop_end=1, push_next=True))
    hand.add(Store(y_size=1, x_size=1, x_stride=1, pop_prev=True, push_prev=True), "y")
    result = simulate(hand.add(final_nop()).add(Finish()).link())
    assert result.memory["y"] == pack(values, bits)
    low = values & ((1 << bits) - 1)
    assert unpack(result.memory["y"], bits).tolist() == np.where(low >> (bits - 1), low - (1 << bits), low).tolist()


def test_four_bit_values_lie_low_bits_first() -> None:
    assert pack(np.array([1, -2, 7, -8]), 4) == bytes([0xE1, 0x87])
    assert unpack(bytes([0xE1, 0x87]), 4).tolist() == [1, -2, 7, -8]


def test_loading_acc_leaves_out_to_the_store_unit() -> None:
    """OUT is a buffer of its own: a load into ACC may overtake the STORE of what an ALU wrote there before."""
    config = CONFIG
    hand = Hand(config).region("a", np.arange(32, dtype=np.int32)).region("y", None, "w", size=2 * 16)
    hand.uops([(0, 0)])
    load, store = dict(memory="acc", y_size=1, x_size=1, x_stride=1), dict(y_size=1, x_size=1, x_stride=1)
    alu: dict[str, Any] = dict(op="add", use_imm=True, imm=0, uop_end=1)
    hand.add(Load(memory="uop", y_size=1, x_size=1, x_stride=1), "uop")
    hand.add(Load(**load), "a").add(Alu(**alu, push_next=True))
    hand.add(Store(**store, pop_prev=True, push_prev=True), "y")
    hand.add(Load(**load, dram=1), "a").add(Alu(**alu, pop_next=True, push_next=True))
    hand.add(Store(**store, dram=1, pop_prev=True, push_prev=True), "y").add(final_nop()).add(Finish())
    linked = hand.link()
    for seed in range(20):
        assert simulate(linked, interleaving=seed).memory["y"] == np.arange(32, dtype=np.int8).tobytes()


@pytest.mark.parametrize("pads", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (2, 1, 1, 3)])
def test_padding_writes_zeros_over_what_was_there(pads: tuple[int, int, int, int]) -> None:
    top, bottom, left, right = pads
    rows, columns = 2 + top + bottom, 3 + left + right
    count = rows * columns
    hand = Hand().region("x", np.full(count * 16, 7, np.int8)).region("w", np.eye(16, dtype=np.int8))
    hand.region("y", None, "w", size=count * 16).uops([(t, t) for t in range(count)])
    hand.add(Load(memory="uop", y_size=1, x_size=count, x_stride=count), "uop")
    hand.add(Load(memory="inp", y_size=1, x_size=count, x_stride=count), "x")
    padding = dict(y_pad_0=top, y_pad_1=bottom, x_pad_0=left, x_pad_1=right)
    hand.add(Load(memory="inp", y_size=2, x_size=3, x_stride=3, **padding), "x")
    hand.add(Load(memory="wgt", y_size=1, x_size=1, x_stride=1, push_next=True), "w")
    hand.add(Gemm(reset=True, uop_end=count)).add(Gemm(uop_end=count, pop_prev=True, push_next=True))
    hand.add(Store(y_size=1, x_size=count, x_stride=count, pop_prev=True, push_prev=True), "y")
    expected = np.pad(np.full((2, 3, 16), 7, np.int8), ((top, bottom), (left, right), (0, 0)))
    assert simulate(hand.add(final_nop()).add(Finish()).link()).memory["y"] == expected.tobytes()


def random_program(config: VtaConfig, rng: np.random.Generator) -> tuple[LinkedProgram, dict[str, bytes]]:
    """Loads, matrix products, vector operations and stores at random places; the builder inserts the tokens."""
    builder = ProgramBuilder(config)
    tiles, high = 24, 1 << (config.inp_bits - 1)
    x = rng.integers(-high, high, (tiles, config.batch, config.block_in))
    w = rng.integers(-2, 2, (8, config.block_out, config.block_in))
    bias = rng.integers(-9000, 9000, (8, config.batch, config.block_out)).astype(np.int32)
    amounts = rng.integers(0, 16, (8, config.batch, config.block_out)).astype(np.int32)
    builder.region("x", tiles * config.inp_tile_bytes)
    for name, data in {"w": pack(w, config.wgt_bits), "b": bias.tobytes(), "s": amounts.tobytes()}.items():
        builder.region(name, len(data), data=data)
    builder.region("t", tiles * config.out_tile_bytes, data=pack(x, config.out_bits), access="rw")
    for _ in range(rng.integers(1, 6)):
        random_operator(builder, rng)
    return link(builder.finish()), {"x": pack(x, config.inp_bits)}


def random_operator(builder: ProgramBuilder, rng: np.random.Generator) -> None:
    rows, columns, slot = int(rng.integers(1, 4)), int(rng.integers(3, 6)), int(rng.integers(0, 3)) * 40
    pads = tuple(int(value) for value in rng.integers(0, 2, 4))
    width, count = columns + pads[2] + pads[3], rows * columns
    source = str(rng.choice(["x", "t"]))
    stride = columns if rng.random() < 0.5 else 7
    builder.load("inp", slot, source, int(rng.integers(0, 3)), rows=rows, columns=columns, stride=stride, pads=pads)
    builder.load("wgt", slot, "w", 0, columns=8)
    builder.load("acc", 200, "b", 0, columns=8)
    builder.load("acc", 208, "s", 0, columns=8)
    uops = np.array([[slot + r * columns, slot + (r + pads[0]) * width + pads[2], slot] for r in range(rows)])
    dst = np.stack([slot + np.arange(count)] * 2, 1)
    builder.gemm(uops, [(columns, 1, 1, 0)], reset=True)
    builder.gemm(uops, [(int(rng.integers(1, 9)), 0, 0, 1), (columns, 1, 1, 0)])
    fixed = dst.copy()
    fixed[:, 1] = 200 + np.arange(count) % 8
    builder.alu(rng.choice(["add", "min", "max"]), fixed)
    fixed[:, 1] += 8
    builder.alu("shr", fixed)
    builder.alu("max", dst, immediate=-int(rng.integers(0, 99)))
    builder.store(slot, "t", int(rng.integers(0, 3)), rows=rows, columns=columns, stride=7)


@settings(max_examples=24, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(PRESETS)), st.integers(0, 1 << 20))
def test_random_programs_equal_numpy_in_ten_orders(name: str, seed: int) -> None:
    linked, inputs = random_program(PRESETS[name], np.random.default_rng(seed))
    expected = ReferenceMachine(linked, inputs).run()
    result = simulate(linked, inputs=inputs)
    assert {key: result.memory[key] for key in expected} == expected
    for order in range(10):
        assert simulate(linked, inputs=inputs, interleaving=order, model=None).memory == result.memory


def test_orders_differ_and_show_a_race() -> None:
    """Without its token the store may come first: some interleaving leaves other bytes."""
    case = matmul()
    hand = Hand().region("y", None, "w", size=64).uops([(t, t) for t in range(4)])
    hand.add(Load(memory="uop", y_size=1, x_size=4, x_stride=4), "uop")
    hand.add(Gemm(reset=True, uop_end=4)).add(Alu(op="add", use_imm=True, imm=5, uop_end=4))
    hand.add(Store(y_size=1, x_size=4, x_stride=4, push_prev=True), "y").add(final_nop()).add(Finish())
    left = {simulate(hand.link(), strict=False, interleaving=seed).memory["y"] for seed in range(20)}
    assert left == {bytes(64), bytes([5]) * 64}
    assert simulate(case.linked, interleaving=3).memory["y"] == case.expected


def test_inputs_replace_data_and_must_fit() -> None:
    case = matmul()
    zeros = {"x": bytes(len(case.linked.regions["x"].data or b""))}
    assert simulate(case.linked, inputs=zeros).memory["y"] != case.expected
    with pytest.raises(TargetError, match=r"region 'x': has 128 bytes, got 3"):
        simulate(case.linked, inputs={"x": b"abc"})
    with pytest.raises(TargetError, match=r"no such region; regions: .*bias"):
        simulate(case.linked, inputs={"z": b"abc"})


def test_timing_only_needs_no_inputs() -> None:
    case = matmul()
    with_values = simulate(case.linked)
    without = simulate(case.linked, functional=False)
    assert without.cycles == with_values.cycles and without.counters == with_values.counters


def test_counters() -> None:
    counters = simulate(matmul(tiles=4, fan_in=2).linked).counters
    assert counters["gemm_uops"] == 8 and counters["reset_uops"] == 4 and counters["alu_uops"] == 12
    assert counters["inp_bytes_read"] == 8 * 16 and counters["wgt_bytes_read"] == 2 * 256
    assert counters["acc_bytes_read"] == 4 * 64 and counters["uop_bytes_read"] == 12 * 4
    assert counters["out_bytes_written"] == 4 * 16 and counters["insn_bytes_read"] == 12 * 16
    assert counters["load_instructions"] == 4 and counters["nop_instructions"] == 1


def test_nops_do_nothing() -> None:
    hand = Hand().add(Load(memory="inp", push_next=True, **NOP)).add(Load(memory="acc", pop_prev=True, **NOP))
    hand.add(Load(memory="uop", push_next=True, **NOP)).add(Store(pop_prev=True, push_prev=True, **NOP))
    result = simulate(hand.add(final_nop()).add(Finish()).link())
    assert result.counters["nop_instructions"] == 5 and result.memory == {}
