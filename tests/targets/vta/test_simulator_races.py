"""Units that touch the same tile must be ordered by tokens; queues have limits; every wait must end."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from vta_programs import NOP, Hand, final_nop

from lpsn_tvm.errors import VtaProgramError
from lpsn_tvm.targets.vta.isa import Alu, Finish, Gemm, Instruction, Load, Store
from lpsn_tvm.targets.vta.program import LinkedProgram
from lpsn_tvm.targets.vta.simulator import simulate

ROW: dict[str, Any] = dict(y_size=1, x_size=3, x_stride=3)
# (instruction, region): two rounds of load, product, store through the same tiles, ordered by all tokens.
ROUNDS: list[tuple[Instruction, str | None]] = [
    (Load(memory="uop", **ROW), "uop"),  # 0
    (Load(memory="wgt", y_size=1, x_size=1, x_stride=1), "w"),  # 1
    (Load(memory="inp", **ROW, push_next=True), "x"),  # 2
    (Gemm(reset=True, uop_end=3), None),  # 3
    (Gemm(uop_end=3, pop_prev=True, push_prev=True, push_next=True), None),  # 4
    (Store(**ROW, pop_prev=True, push_prev=True), "y"),  # 5
    (Load(memory="uop", pop_next=True, push_prev=True, **NOP), None),  # 6
    (Load(memory="inp", pop_next=True, **NOP), None),  # 7
    (Load(memory="inp", **ROW, pop_next=True, push_next=True), "y"),  # 8
    (Gemm(uop_end=3, pop_prev=True, push_next=True), None),  # 9
    (Store(**ROW, pop_prev=True, push_prev=True), "y"),  # 10
    (final_nop(), None),  # 11
    (Finish(), None),  # 12
]


def program(*changes: tuple[int, dict[str, Any]], second: str = "y") -> LinkedProgram:
    """The rounds with some fields changed; the second one reads region `second`."""
    hand = Hand().region("x", np.ones(48, np.int8)).region("w", np.eye(16, dtype=np.int8))
    hand.region("y", None, "rw", size=96).uops([(t, t) for t in range(3)])
    edited = dict(changes)
    for index, (instruction, target) in enumerate(ROUNDS):
        hand.add(dataclasses.replace(instruction, **edited.get(index, {})), second if index == 8 else target)
    return hand.link()


def test_all_tokens_in_place() -> None:
    assert simulate(program()).memory["y"] == bytes([2]) * 48 + bytes(48)


OFF = dict(push_prev=False, push_next=False, pop_prev=False, pop_next=False)
RACES: dict[str, tuple[Sequence[tuple[int, dict[str, Any]]], str, str]] = {
    "gemm before its load": (
        [(2, {"push_next": False}), (4, {"pop_prev": False})],
        "y",
        r"instruction 4 .*data race \(read after write\) on INP tile 0: no token orders this instruction and "
        r"instruction 2 of the load unit",
    ),
    "load over what gemm reads": (
        [(4, {"push_prev": False}), (6, {"push_prev": False}), (7, OFF), (8, {"pop_next": False})],
        "y",
        r"instruction 8 .*data race \(read after write\) on DRAM address \d+: .* instruction 5 of the store unit",
    ),
    "load over what gemm reads, from a constant": (
        [(4, {"push_prev": False}), (6, {"push_prev": False}), (7, OFF), (8, {"pop_next": False})],
        "x",
        r"instruction 8 .*data race \(write after read\) on INP tile 0: .* instruction 4 of the compute unit",
    ),
    "store before its gemm": (
        [(4, {"push_next": False}), (5, {"pop_prev": False})],
        "y",
        r"instruction 5 .*data race \(read after write\) on OUT tile 0: .* instruction 4 of the compute unit",
    ),
    "gemm over what store reads": (
        [(5, {"push_prev": False}), (6, {"pop_next": False})],
        "x",
        r"instruction 9 .*data race \(write after read\) on OUT tile 0: .* instruction 5 of the store unit",
    ),
    "load of what store writes": (
        [(5, {"push_prev": False}), (6, {"pop_next": False})],
        "y",
        r"instruction 8 .*data race \(read after write\) on DRAM address \d+: .* instruction 5 of the store unit",
    ),
    "product of what another load brings": (
        [(8, {"push_next": False}), (9, {"pop_prev": False})],
        "y",
        r"instruction 9 .*data race \(read after write\) on INP tile 0: .* instruction 8 of the load unit",
    ),
}


@pytest.mark.parametrize("name", RACES)
def test_race(name: str) -> None:
    changes, second, message = RACES[name]
    with pytest.raises(VtaProgramError, match=message):
        simulate(program(*changes, second=second))


def test_store_over_what_load_reads() -> None:
    """DRAM, write after read: the load of round two may still read when the store of that round writes."""
    hand = Hand().region("y", np.zeros(48, np.int8), "rw").uops([(t, t) for t in range(3)])
    hand.add(Load(memory="uop", **ROW), "uop").add(Load(memory="inp", **ROW), "y")
    hand.add(Gemm(reset=True, uop_end=3)).add(Alu(op="add", use_imm=True, uop_end=3, push_next=True))
    hand.add(Store(**ROW, pop_prev=True, push_prev=True), "y").add(final_nop()).add(Finish())
    with pytest.raises(VtaProgramError, match=r"instruction 4 .*\(write after read\) on DRAM.* 1 of the load unit"):
        simulate(hand.link())


def test_finish_waits_for_every_store() -> None:
    hand = Hand().region("y", None, "w", size=96).uops([(t, t) for t in range(3)])
    hand.add(Load(memory="uop", **ROW), "uop")
    hand.add(Gemm(reset=True, uop_end=3)).add(Alu(op="add", use_imm=True, uop_end=3, push_next=True))
    hand.add(Store(**ROW, pop_prev=True, push_prev=True), "y").add(Store(**ROW, dram=3), "y")
    with pytest.raises(VtaProgramError, match=r"instruction 4 .*FINISH does not wait for this instruction"):
        simulate(hand.add(final_nop()).add(Finish()).link())


def crossed() -> LinkedProgram:
    """Load waits for compute's token, and compute for load's, which comes later in the program."""
    hand = Hand().add(Load(memory="inp", pop_next=True, push_next=True, **NOP))
    hand.add(Load(memory="uop", pop_prev=True, push_prev=True, push_next=True, **NOP))
    return hand.add(Store(pop_prev=True, push_prev=True, **NOP)).add(final_nop()).add(Finish()).link()


def test_pop_before_push_in_program_order() -> None:
    with pytest.raises(
        VtaProgramError,
        match=r"instruction 0 .*the load unit waits for a compute->load token that instruction 1 pushes later: "
        r"fetch is in order",
    ):
        simulate(crossed())


@pytest.mark.parametrize("options", [{"model": None}, {"model": None, "interleaving": 1}, {"functional": False}])
def test_deadlock_says_who_waits_for_what(options: dict[str, Any]) -> None:
    with pytest.raises(VtaProgramError) as caught:
        simulate(crossed(), strict=False, **options)
    text = str(caught.value)
    assert "deadlock: the load unit waits at instruction 0 for a compute->load token" in text
    assert "the compute unit waits at instruction 1 for a load->compute token" in text
    assert "the store unit waits at instruction 2 for a compute->store token" in text


def tokens(count: int) -> LinkedProgram:
    """`count` tokens posted before the other side pops the first one."""
    hand = Hand()
    for _ in range(count):
        hand.add(Load(memory="inp", push_next=True, **NOP))
    for _ in range(count):
        hand.add(Load(memory="uop", pop_prev=True, **NOP))
    hand.add(Load(memory="uop", push_next=True, **NOP)).add(Store(pop_prev=True, push_prev=True, **NOP))
    return hand.add(final_nop()).add(Finish()).link()


def test_token_queue_holds_255() -> None:
    simulate(tokens(255))
    with pytest.raises(VtaProgramError, match=r"instruction 255 .*up to 256 tokens can wait in the load->compute"):
        simulate(tokens(256))


def test_tokens_that_fetch_cannot_let_pile_up() -> None:
    """Load never waits for compute, but its instructions are fetched only as compute's queue of 512 empties."""
    hand = Hand()
    for _ in range(3000):
        hand.add(Load(memory="inp", push_next=True, **NOP)).add(Load(memory="uop", pop_prev=True, **NOP))
        hand.add(Load(memory="uop", **NOP)).add(Load(memory="uop", **NOP))
    hand.add(Load(memory="uop", push_next=True, **NOP)).add(Store(pop_prev=True, push_prev=True, **NOP))
    simulate(hand.add(final_nop()).add(Finish()).link())


def test_full_command_queues_hold_back_fetch_but_not_the_result() -> None:
    """More commands than a queue holds: fetch waits, nothing deadlocks, and the model says how long."""
    hand = Hand().uops([(t, t) for t in range(3)]).add(Load(memory="uop", **ROW), "uop")
    hand.add(Gemm(reset=True, uop_end=3, iter_out=2000)).add(Load(memory="uop", push_prev=True, **NOP))
    for _ in range(700):
        hand.add(Gemm(reset=True, uop_end=3, iter_out=10))
    hand.add(Load(memory="inp", pop_next=True, push_next=True, **NOP)).add(Load(memory="uop", pop_prev=True, **NOP))
    hand.add(Load(memory="uop", push_next=True, **NOP)).add(Store(pop_prev=True, push_prev=True, **NOP))
    result = simulate(hand.add(final_nop()).add(Finish()).link())
    assert result.counters["fetch_queue_wait"] > 1000
