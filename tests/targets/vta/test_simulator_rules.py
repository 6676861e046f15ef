"""Every rule of the hardware: a program that breaks it is refused with the instruction and the rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from vta_programs import CONFIG, NOP, Hand, final_nop, matmul_hand

from lpsn_tvm.errors import LpsnError, VtaProgramError
from lpsn_tvm.targets.vta.isa import Finish, Gemm, Load, Store, encode
from lpsn_tvm.targets.vta.program import LinkedProgram
from lpsn_tvm.targets.vta.simulator import simulate

# Instructions of the base program, see vta_programs.
INP, WGT, UOP, ACC, RESET, GEMM, ADD, SHR, MIN, STORE, WAIT, FINISH = range(12)


def change(index: int, **fields: Any) -> Callable[[Hand], None]:
    def apply(hand: Hand) -> None:
        hand.instructions[index] = dataclasses.replace(hand.instructions[index], **fields)

    return apply


def uop(row: int, *values: int) -> Callable[[Hand], None]:
    """Another micro-operation: rows 0-3 GEMM, 4-7 tensor ALU, 8-11 immediate ALU."""

    def apply(hand: Hand) -> None:
        hand.uop_rows[row] = [*values, *[0] * (3 - len(values))]
        hand.uops(hand.uop_rows)

    return apply


def both(*changes: Callable[[Hand], None]) -> Callable[[Hand], None]:
    def apply(hand: Hand) -> None:
        for each in changes:
            each(hand)

    return apply


def access(name: str, value: str) -> Callable[[Hand], None]:
    def apply(hand: Hand) -> None:
        hand.regions[name] = dataclasses.replace(hand.regions[name], access=value)  # type: ignore[arg-type]

    return apply


def undefined(name: str) -> Callable[[Hand], None]:
    def apply(hand: Hand) -> None:
        hand.regions[name] = dataclasses.replace(hand.regions[name], data=None)

    return apply


RULES: dict[str, tuple[Callable[[Hand], None], str]] = {
    "inp out of range": (change(INP, sram=2044), r"instruction 0 .*INP tiles 2044..2051 are out of range.* 2048"),
    "wgt out of range": (change(WGT, sram=1023), r"instruction 1 .*WGT tiles 1023..1024 are out of range.* 1024"),
    "uop buffer": (change(UOP, sram=2040), r"instruction 2 .*UOP tiles 2040..2051 are out of range.* 2048"),
    "acc out of range": (change(ACC, sram=2046), r"instruction 3 .*ACC tiles 2046..2049 are out of range.* 2048"),
    "store out of range": (change(STORE, sram=2046), r"instruction 9 .*OUT tiles 2046..2049 are out of range"),
    "pads out of range": (change(INP, sram=2039, x_pad_1=2), r"INP tiles 2039..2048 are out of range"),
    "gemm dst range": (
        both(uop(3, 2047, 3, 0), change(RESET, iter_out=2, dst_out=1)),
        r"instruction 4 .*ACC tile 2048 is out of range: the buffer has 2048",
    ),
    "gemm src range": (
        both(change(INP, sram=2040), *(uop(t, t, 2040 + t, 0) for t in range(4)), change(GEMM, src_out=5)),
        r"instruction 5 .*INP tile 2048 is out of range",
    ),
    "gemm wgt depth": (
        both(change(WGT, sram=1022), *(uop(t, t, t, 1023) for t in range(4))),
        r"instruction 5 .*WGT tile 1024 is out of range: the buffer has 1024",
    ),
    "gemm wgt range": (uop(3, 3, 3, 1023), r"instruction 5 .*WGT tile 1023, which was never written"),
    "alu range": (change(ADD, iter_out=2, src_out=2044), r"instruction 6 .*ACC tile 2048 is out of range"),
    "no region": (change(INP, dram=1 << 20), r"instruction 0 .*DRAM row \[.*\) lies in no memory region"),
    "past region": (change(INP, dram=1), r"instruction 0 .*runs past the end of its memory region"),
    "row past region": (
        change(INP, y_size=2, x_size=4, x_stride=5),
        r"instruction 0 .*runs past the end of its memory region",
    ),
    "store past region": (change(STORE, dram=1), r"instruction 9 .*runs past the end of its memory region"),
    "undefined input": (undefined("x"), r"instruction 0 .*reads DRAM address \d+, which was never written"),
    "undefined uops": (undefined("uop"), r"instruction 2 .*reads DRAM address \d+, which was never written"),
    "read of write-only": (access("x", "w"), r"instruction 0 .*LOAD reads the write-only region"),
    "write to read-only": (access("y", "r"), r"instruction 9 .*STORE writes into the read-only region"),
    "inp never written": (change(INP, x_size=7), r"instruction 5 .*reads INP tile 7, which was never written"),
    "wgt never written": (change(WGT, x_size=1), r"instruction 5 .*reads WGT tile 1, which was never written"),
    "acc never written": (change(RESET, uop_end=3), r"instruction 5 .*accumulates into ACC tile 3, which was never"),
    "alu never written": (change(ACC, x_size=3), r"instruction 6 .*reads ACC tile 7, which was never written"),
    "uop never loaded": (change(UOP, x_size=11), r"instruction 7 .*micro-operation 11, which was never loaded"),
    "uop range": (change(GEMM, uop_begin=2047, uop_end=2050), r"micro-operations 2047..2049 are out of range.* 2048"),
    "no uop": (change(GEMM, uop_begin=4, uop_end=4), r"instruction 5 .*no micro-operation: uop_end > uop_begin"),
    "no iteration": (change(ADD, iter_in=0), r"instruction 6 .*no micro-operation.*iter_in >= 1"),
    "store never written": (change(STORE, sram=30), r"instruction 9 .*stores OUT tile 30, which was never written"),
    "store only loaded": (change(STORE, sram=4), r"instruction 9 .*stores OUT tile 4, which was only loaded"),
    "shift above 15": (change(SHR, imm=16), r"instruction 7 .*SHR by 16: amounts are 0..15; split larger shifts"),
    "shift below 0": (change(SHR, imm=-1), r"instruction 7 .*SHR by -1: amounts are 0..15"),
    "immediate src": (uop(9, 1, 2), r"instruction 7 .*needs src = dst in micro-operation 9"),
    "immediate factors": (change(MIN, iter_in=2, dst_in=4), r"instruction 8 .*needs equal dst and src factors"),
    "tensor shift": (change(ADD, op="shr"), r"instruction 6 .*SHR by -?\d+ in ACC tile 0: amounts are 0..15"),
    "pads on wgt": (change(WGT, y_pad_0=1), r"instruction 1 .*padding on a WGT load: only INP loads may pad"),
    "pads on acc": (change(ACC, x_pad_1=1), r"instruction 3 .*padding on a ACC load: only INP loads may pad"),
    "pads on a nop": (change(WAIT, x_pad_0=2), r"instruction 10 .*a NOP \(x_size 0\) has no padding"),
    "no rows": (change(INP, y_size=0), r"instruction 0 .*y_size is 0: a NOP has x_size 0"),
    "gemm recurrence": (uop(2, 0, 2, 0), r"instruction 4 .*ACC tile 0 recurs within 2 preceding micro-operations"),
    "alu recurrence": (uop(6, 0, 6), r"instruction 6 .*ACC tile 0 recurs within 2 preceding micro-operations"),
    "alu source recurrence": (uop(5, 1, 0), r"instruction 6 .*ACC tile 0 recurs within 2 preceding"),
    "transfer size": (
        change(INP, y_size=4096, x_size=1024, x_stride=1),
        r"instruction 0 .*transfers 67108864 bytes; one transfer has at most 32 MB",
    ),
    "load has no prev": (change(INP, pop_prev=True), r"instruction 0 .*the load unit has no pop_prev flag"),
    "load pushes prev": (change(WGT, push_prev=True), r"instruction 1 .*the load unit has no push_prev flag"),
    "store has no next": (change(STORE, pop_next=True), r"instruction 9 .*the store unit has no pop_next flag"),
    "store pushes next": (change(STORE, push_next=True), r"instruction 9 .*the store unit has no push_next flag"),
    "finish flags": (change(WAIT, pop_next=False), r"instruction 11 .*FINISH must follow a compute NOP that pops"),
    "token never pushed": (
        change(WGT, push_next=False),
        r"instruction 5 .*the compute unit waits for a load->compute token that no instruction pushes: deadlock",
    ),
    "token left over": (change(MIN, push_prev=True), r"instruction 8 .*a token is left in the compute->load queue"),
    "last store unordered": (
        change(STORE, push_prev=False),
        r"instruction 10 .*waits for a store->compute token that no instruction pushes: deadlock",
    ),
}


def base() -> Hand:
    hand, _ = matmul_hand(CONFIG)
    return hand


@pytest.mark.parametrize("name", RULES)
def test_refuses(name: str) -> None:
    hand = base()
    simulate(hand.link())
    mutate, message = RULES[name]
    mutate(hand)
    with pytest.raises(VtaProgramError, match=message):
        simulate(hand.link())


def test_the_error_names_the_disassembly_and_is_ours() -> None:
    hand = base()
    RULES["shift above 15"][0](hand)
    with pytest.raises(LpsnError, match=r"^instruction 7 \(alu\.shr .*imm=16.*\): SHR by 16"):
        simulate(hand.link())


def test_without_strict_most_rules_are_not_asked() -> None:
    hand = base()
    change(SHR, imm=16)(hand)
    assert simulate(hand.link(), strict=False).memory["y"]


def patched(linked: LinkedProgram, index: int, bit: int) -> LinkedProgram:
    word = int.from_bytes(linked.insn[16 * index : 16 * index + 16], "little") ^ (1 << bit)
    data = linked.insn[: 16 * index] + word.to_bytes(16, "little") + linked.insn[16 * index + 16 :]
    return dataclasses.replace(linked, insn=data)


@pytest.mark.parametrize(
    ("index", "bit", "message"),
    [
        (INP, 63, r"instruction 0 .*reserved bits are set"),
        (RESET, 63, r"instruction 4 .*reserved bits are set"),
        (FINISH, 100, r"instruction 11 .*reserved bits are set"),
        (FINISH, 3, r"instruction 11 .*FINISH has no dependence flags"),
        (STORE, 64 + 48, r"instruction 9 .*STORE has no padding"),
        (ADD, 7, r"instruction 6 .*ALU has no reset"),
    ],
)
def test_refuses_bits(index: int, bit: int, message: str) -> None:
    with pytest.raises(VtaProgramError, match=message):
        simulate(patched(base().link(), index, bit))


def test_unknown_opcode() -> None:
    linked = patched(patched(base().link(), RESET, 0), RESET, 2)
    with pytest.raises(VtaProgramError, match=r"instruction 4 \(0x[0-9a-f]{32}\): unknown opcode 7"):
        simulate(linked)


def test_finish_is_last_and_only_there() -> None:
    linked = base().link()
    with pytest.raises(VtaProgramError, match=r"instruction 10 .*FINISH is missing"):
        simulate(dataclasses.replace(linked, insn=linked.insn[:-16]))
    with pytest.raises(VtaProgramError, match=r"instruction 11 .*a FINISH before the end"):
        simulate(dataclasses.replace(linked, insn=linked.insn + encode([Finish()], CONFIG)))
    with pytest.raises(VtaProgramError, match=r"program: FINISH is missing"):
        simulate(dataclasses.replace(linked, insn=b""))


def test_stores_only_reset() -> None:
    hand = Hand().region("y", None, "w", size=64).uops([(t, t) for t in range(4)])
    hand.add(Load(memory="uop", y_size=1, x_size=4, x_stride=4), "uop")
    hand.add(Gemm(reset=True, uop_end=4, push_next=True))
    hand.add(Store(y_size=1, x_size=4, x_stride=4, pop_prev=True, push_prev=True), "y")
    with pytest.raises(VtaProgramError, match=r"instruction 2 .*stores OUT tile 0, which was only reset"):
        simulate(hand.add(final_nop()).add(Finish()).link())


def test_the_instruction_region_is_nobodys() -> None:
    linked = base().link()
    stores = base()
    stores.instructions[STORE] = dataclasses.replace(stores.instructions[STORE], dram=linked.insn_addr // 16)
    stores.targets[STORE] = None
    with pytest.raises(VtaProgramError, match=r"instruction 9 .*STORE writes into the instruction region"):
        simulate(stores.link())
    loads = base()
    loads.instructions[INP] = dataclasses.replace(loads.instructions[INP], dram=linked.insn_addr // 16)
    loads.targets[INP] = None
    with pytest.raises(VtaProgramError, match=r"instruction 0 .*LOAD reads the instruction region"):
        simulate(loads.link())


def moved(linked: LinkedProgram, name: str, addr: int, data: bytes | None = None) -> LinkedProgram:
    region = dataclasses.replace(linked.regions[name], addr=addr)
    if data is not None:
        region = dataclasses.replace(region, data=data, size=len(data))
    return dataclasses.replace(linked, regions={**linked.regions, name: region})


def test_regions_do_not_overlap_and_are_aligned() -> None:
    linked = base().link()
    with pytest.raises(VtaProgramError, match=r"program: the regions at \d+ and \d+ overlap"):
        simulate(moved(linked, "w", linked.regions["x"].addr + 64))
    with pytest.raises(VtaProgramError, match=r"instruction 1 .*is not aligned: its region starts at"):
        simulate(moved(linked, "w", linked.regions["w"].addr - 64, bytes(640)))
    with pytest.raises(VtaProgramError, match=r"program: the regions at \d+ and \d+ overlap"):
        simulate(moved(linked, "y", linked.insn_addr + 64))
    with pytest.raises(VtaProgramError, match=r"does not lie below 2\^32"):
        simulate(moved(linked, "y", (1 << 32) - 16))


def test_overflow_of_an_accumulator() -> None:
    hand = base()
    bias = np.full(64, np.iinfo(np.int32).max, np.int32)
    hand.region("bias", bias)
    with pytest.raises(
        VtaProgramError, match=r"instruction 6 .*ACC tile \d leaves the range of int32: \d+ \+ 2147483647"
    ):
        simulate(hand.link())
    products = Hand().region("x", np.full(48, -128, np.int8)).region("w", np.full(256, -128, np.int8))
    products.region("a", np.full(48, np.iinfo(np.int32).max - 16 * 16384 + 1, np.int32))
    products.uops([(t, t) for t in range(3)])
    products.add(Load(memory="inp", y_size=1, x_size=3, x_stride=3), "x")
    products.add(Load(memory="wgt", y_size=1, x_size=1, x_stride=1, push_next=True), "w")
    products.add(Load(memory="acc", y_size=1, x_size=3, x_stride=3), "a")
    products.add(Load(memory="uop", y_size=1, x_size=3, x_stride=3), "uop")
    products.add(Gemm(uop_end=3, pop_prev=True, push_next=True)).add(Store(pop_prev=True, push_prev=True, **NOP))
    products.add(final_nop()).add(Finish())
    with pytest.raises(VtaProgramError, match=r"instruction 4 .*an accumulator leaves the range of int32"):
        simulate(products.link())
    products.region("a", np.full(48, np.iinfo(np.int32).max - 16 * 16384, np.int32))
    simulate(products.link())


def test_three_distinct_accumulators_are_enough() -> None:
    hand = base()
    for row, values in {2: (2, 2, 0), 3: (0, 3, 0)}.items():
        uop(row, *values)(hand)
    change(RESET, uop_end=3)(hand)
    change(GEMM, uop_end=3)(hand)
    change(ADD, uop_end=7)(hand)
    change(SHR, uop_end=11)(hand)
    change(MIN, uop_end=11)(hand)
    change(STORE, x_size=3, x_stride=3)(hand)
    simulate(hand.link())
