"""Cycles of single instructions, of transfers that share the port, and of units that wait for each other."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from vta_programs import CONFIG, NOP, Hand, final_nop
from vta_stepper import Stepper

from lpsn_tvm.errors import TargetError
from lpsn_tvm.targets.vta.cycle_model import MODELS, CycleModel, cycle_model
from lpsn_tvm.targets.vta.isa import Alu, Finish, Gemm, Instruction, Load, Store
from lpsn_tvm.targets.vta.program import LinkedProgram
from lpsn_tvm.targets.vta.simulator import SimulationResult, simulate

LATENCY = 16  # of the memory; the engine before it adds 3
COUNT = 200


def run(hand: Hand, model: str | CycleModel = "rtl") -> SimulationResult:
    hand.add(Load(memory="uop", push_next=True, **NOP)).add(Store(pop_prev=True, push_prev=True, **NOP))
    return simulate(hand.add(final_nop()).add(Finish()).link(), model=model, timeline=True)


def period(instruction: Instruction, region: str | None = None, model: str | CycleModel = "rtl") -> int:
    """Cycles from the start of an instruction to the start of the same instruction after it."""
    hand = Hand().region("x", np.zeros(1 << 19, np.int8)).region("y", None, "w", size=1 << 16)
    hand.uops([(t, t if t < COUNT else t - COUNT, 0) for t in range(2 * COUNT)])
    hand.add(Load(memory="uop", y_size=1, x_size=2 * COUNT, x_stride=2 * COUNT), "uop")
    hand.add(Gemm(reset=True, uop_end=2 * COUNT))
    hand.add(Load(memory="inp", y_size=1, x_size=2 * COUNT, x_stride=2 * COUNT), "x")
    hand.add(Load(memory="wgt", y_size=1, x_size=1, x_stride=1, push_next=True), "x")
    hand.add(Gemm(uop_end=2 * COUNT, pop_prev=True))
    hand.add(Alu(op="add", use_imm=True, uop_end=COUNT, push_prev=True, push_next=True))
    hand.add(Load(memory="inp", pop_next=True, **NOP)).add(Store(pop_prev=True, **NOP))
    first = len(hand.instructions)
    for _ in range(3):
        hand.add(dataclasses.replace(instruction), region)
    timeline = run(hand, model).timeline
    assert timeline is not None
    starts = timeline.start[first : first + 3]
    assert starts[2] - starts[1] == starts[1] - starts[0]
    return int(starts[2] - starts[1])


TENSOR: dict[str, Any] = dict(op="max", uop_begin=COUNT, uop_end=2 * COUNT)
IMMEDIATE: dict[str, Any] = dict(op="max", use_imm=True, uop_end=COUNT)


def load(memory: Any, tiles: int, rows: int = 1, **fields: Any) -> Load:
    return Load(memory=memory, y_size=rows, x_size=tiles, x_stride=tiles, **fields)


COARSE: dict[str, tuple[Instruction, str | None, float]] = {
    "gemm": (Gemm(uop_end=COUNT), None, 9 + COUNT),
    "gemm, loops": (Gemm(uop_end=COUNT, iter_out=3, iter_in=2), None, 9 + 6 * COUNT),
    "gemm reset": (Gemm(reset=True, uop_end=COUNT), None, 9 + COUNT),
    "alu immediate": (Alu(**IMMEDIATE), None, 9 + COUNT),
    "alu tensor": (Alu(**TENSOR), None, 2 * COUNT),
    "load inp": (load("inp", 100), "x", 2 * 100 + LATENCY + 7),
    "load inp, rows": (load("inp", 10, 10), "x", 2 * 100 + LATENCY + 7),
    "load wgt": (load("wgt", 10), "x", 32 * 10 + LATENCY + 7),
    "load acc": (load("acc", 50), "x", 8 * 50 + LATENCY + 7),
    "load uop": (load("uop", 400), "uop", 0.5 * 400 + LATENCY + 7),
    "store": (Store(y_size=1, x_size=100, x_stride=100), "y", 3 * 100),
    "store, rows of 4 tiles": (Store(y_size=20, x_size=4, x_stride=8), "y", 18 * 20),
}


@pytest.mark.parametrize("name", COARSE)
def test_single_instructions(name: str) -> None:
    instruction, region, cycles = COARSE[name]
    assert period(instruction, region) == pytest.approx(cycles, rel=0.04)


def test_half_the_memory_rate() -> None:
    inp, alu = load("inp", 100), Alu(**IMMEDIATE)
    assert period(inp, "x", "pynq") - period(inp, "x") == pytest.approx(200, abs=2)
    assert period(alu, None, "pynq") - period(alu) == COUNT
    assert period(Alu(**TENSOR), None, "pynq") == period(Alu(**TENSOR))
    assert period(Gemm(uop_end=COUNT), None, "pynq") == period(Gemm(uop_end=COUNT))


def test_latency_counts_once_per_load() -> None:
    slow = dataclasses.replace(MODELS["rtl"], read_latency=119)
    for instruction in (load("inp", 100), load("inp", 10, 10)):
        assert period(instruction, "x", slow) - period(instruction, "x") == 100


def test_padding_hides_behind_the_latency_and_then_costs_a_cycle_per_tile() -> None:
    plain = period(load("inp", 10, 10), "x")
    few = period(load("inp", 10, 10, x_pad_1=1), "x")
    assert few == plain
    # One row of padding before the data delays the first burst by a cycle.
    assert period(load("inp", 10, 10, y_pad_0=1), "x") == plain + 1
    many = period(load("inp", 10, 10, x_pad_0=5, x_pad_1=5), "x")
    assert plain + 60 < many <= plain + 100


def test_short_rows_are_bound_by_the_burst_interval() -> None:
    wide, narrow = period(load("inp", 64), "x"), period(Load(memory="inp", y_size=64, x_size=1, x_stride=3), "x")
    assert 0 <= narrow - wide <= 4
    many = dataclasses.replace(MODELS["rtl"], command_interval=8)
    assert period(Load(memory="inp", y_size=64, x_size=1, x_stride=3), "x", many) > 8 * 63


def test_bursts_in_flight_bound_the_rate_of_short_rows() -> None:
    """16 bursts of 2 words per latency: with a long latency that is less than one word per cycle."""
    rows = Load(memory="inp", y_size=160, x_size=1, x_stride=3)
    far = dataclasses.replace(MODELS["rtl"], read_latency=200)
    assert period(rows, "x", far) == pytest.approx(10 * 200, rel=0.2)
    assert period(rows, "x", dataclasses.replace(far, outstanding=64)) < 1000


def test_loads_of_two_units_share_the_port() -> None:
    def cycles(*memories: str) -> int:
        hand = Hand().region("x", np.zeros(1 << 17, np.int8))
        for _ in range(4):
            for memory in memories:
                hand.add(load(memory, 1024 if memory == "inp" else 256), "x")
        result = run(hand)
        assert sum(result.counters[f"{unit}_memory_wait"] for unit in ("load", "compute")) > 0 or len(memories) == 1
        return result.cycles

    alone = cycles("inp"), cycles("acc")
    assert cycles("inp", "acc") > 0.9 * sum(alone)


def test_fetch_takes_chunks() -> None:
    """128 instructions are read (two words each), then dispatched one per cycle, then the next chunk is read."""
    hand = Hand()
    for _ in range(300):
        hand.add(Load(memory="uop", **NOP))
    timeline = run(hand).timeline
    assert timeline is not None
    assert timeline.start[0] == pytest.approx(2 * 128 + LATENCY + 7, abs=6)
    assert timeline.start[128] - timeline.start[0] == pytest.approx(3 * 128 + LATENCY + 7, abs=6)
    nops = np.diff(timeline.start[:128])
    assert set(nops.tolist()) == {2}


def test_a_token_is_seen_one_cycle_later() -> None:
    hand = Hand().add(Load(memory="inp", push_next=True, **NOP)).add(Load(memory="uop", pop_prev=True, **NOP))
    timeline = run(hand).timeline
    assert timeline is not None and timeline.start[1] == timeline.end[0] + 1


def test_stalls_name_their_cause() -> None:
    hand = Hand().region("x", np.zeros(1 << 17, np.int8)).uops([(t, t) for t in range(3)])
    hand.add(load("uop", 3), "uop").add(load("inp", 1000), "x").add(load("wgt", 1, push_next=True), "x")
    hand.add(Gemm(reset=True, uop_end=3)).add(Gemm(uop_end=3, pop_prev=True))
    counters = run(hand).counters
    assert 1900 < counters["load_to_compute_wait"] < 2100
    assert counters["gemm_uops"] == 3 and counters["load_busy"] > 2000


def test_utilization() -> None:
    hand = Hand().region("x", np.zeros(1 << 12, np.int8)).uops([(t, t % 4) for t in range(1000)])
    hand.add(load("uop", 1000), "uop").add(load("inp", 4), "x").add(load("wgt", 1, push_next=True), "x")
    hand.add(Gemm(reset=True, uop_end=1000)).add(Gemm(uop_end=1000, iter_out=50, pop_prev=True))
    assert run(hand).utilization == pytest.approx(50_000 / 51_600, abs=0.01)


def test_models_are_data() -> None:
    assert cycle_model("pynq").word_cycles == 2 and cycle_model("pynq").alu_immediate == 2
    own = CycleModel(word_cycles=4)
    assert cycle_model(own) is own
    with pytest.raises(TargetError, match=r"unknown cycle model 'fast'; known are rtl, pynq"):
        cycle_model("fast")
    with pytest.raises(TargetError, match=r"cycle model, word_cycles: 0 is not a whole number >= 1"):
        CycleModel(word_cycles=0)
    with pytest.raises(TargetError, match=r"read_latency: 1.5 is not a whole number"):
        CycleModel(read_latency=1.5)  # type: ignore[arg-type]


def test_wider_bus_moves_more_per_cycle() -> None:
    wide = dataclasses.replace(CONFIG, log_bus_width=7)
    both = []
    for config in (CONFIG, wide):
        hand = Hand(config).region("x", np.zeros(1 << 16, np.int8)).add(load("inp", 2000), "x")
        both.append(run(hand).counters["load_busy"])
    assert both[0] - both[1] == pytest.approx(2000, rel=0.01)


# Small queues and short bursts, so that every limit is met.
TIGHT = CycleModel(burst_bytes=128, outstanding=3, command_queue=3, fetch_chunk=16, command_interval=5)


@pytest.mark.parametrize("model", [MODELS["rtl"], MODELS["pynq"], TIGHT], ids=["rtl", "pynq", "tight"])
@pytest.mark.parametrize("seed", range(3))
def test_events_equal_a_model_that_steps_through_every_cycle(seed: int, model: CycleModel) -> None:
    rng = np.random.default_rng(seed)
    linked = random_loads(rng)
    timeline = simulate(linked, model=model, functional=False, strict=False, timeline=True).timeline
    assert timeline is not None
    stepped = Stepper(linked, model).run()
    assert list(zip(timeline.start.tolist(), timeline.end.tolist(), strict=True)) == stepped


def random_loads(rng: np.random.Generator) -> LinkedProgram:
    """Instructions of all kinds with random shapes and tokens that cannot deadlock; values do not matter."""
    hand = Hand().region("x", np.zeros(1 << 19, np.int8)).region("y", None, "w", size=1 << 18)
    hand.uops([(t, t, 0) for t in range(200)])
    for _ in range(int(rng.integers(20, 90))):
        rows, columns = int(rng.integers(1, 12)), int(rng.integers(1, 12))
        shape: dict[str, Any] = dict(y_size=rows, x_size=columns, x_stride=int(rng.integers(1, 40)))
        pads = dict(zip(("y_pad_0", "y_pad_1", "x_pad_0", "x_pad_1"), rng.integers(0, 3, 4).tolist(), strict=True))
        dram, post = int(rng.integers(0, 999)), bool(rng.random() < 0.5)
        hand.add(Load(memory="inp", dram=dram, push_next=post, **shape, **(pads if rng.random() < 0.5 else {})), "x")
        if rng.random() < 0.5:
            hand.add(Load(memory="wgt", dram=dram, y_size=1, x_size=columns, x_stride=1), "x")
        if rng.random() < 0.5:
            hand.add(Load(memory="uop", dram=int(rng.integers(0, 50)), y_size=1, x_size=columns, x_stride=1), "uop")
        if rng.random() < 0.3:
            hand.add(Load(memory="acc", dram=dram, **shape), "x")
        count = int(rng.integers(1, 40))
        hand.add(Gemm(uop_end=count, iter_out=rows, pop_prev=post, push_next=post))
        hand.add(Alu(uop_end=count, use_imm=bool(rng.random() < 0.5), push_prev=post))
        hand.add(Store(dram=dram, pop_prev=post, push_prev=post, **shape), "y")
        hand.add(Load(memory="uop", pop_next=post, **NOP)).add(Load(memory="inp", pop_next=post, **NOP))
    return hand.add(Finish()).link()
