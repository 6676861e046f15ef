"""The program builder: tokens order every hazard, none is left over, micro-ops are loaded before they are used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.vta.builder import ProgramBuilder
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.dependences import FLAGS
from lpsn_tvm.targets.vta.isa import Alu, Finish, Gemm, Instruction, Load, Store
from lpsn_tvm.targets.vta.program import Program, link
from lpsn_tvm.targets.vta.simulator import simulate

CONFIG = PRESETS["pynq"]
LOAD, COMPUTE, STORE = 0, 1, 2


def unit_of(instruction: Instruction) -> int:
    if isinstance(instruction, Store):
        return STORE
    return LOAD if isinstance(instruction, Load) and instruction.memory in ("inp", "wgt") else COMPUTE


@dataclass
class Access:
    """What one instruction of a test program reads and writes: (memory, tile)."""

    reads: set[tuple[str, int]]
    writes: set[tuple[str, int]]


def token_edges(program: Program) -> list[tuple[int, int]]:
    """(pushing instruction, popping instruction) of every token, paired in order per queue."""
    pushes: dict[tuple[int, int], list[int]] = {}
    pops: dict[tuple[int, int], list[int]] = {}
    for number, instruction in enumerate(program.instructions):
        if isinstance(instruction, Finish):
            continue
        unit = unit_of(instruction)
        for (waiting, finished), (pop, push) in FLAGS.items():
            if unit == waiting and getattr(instruction, pop):
                pops.setdefault((finished, waiting), []).append(number)
            if unit == finished and getattr(instruction, push):
                pushes.setdefault((finished, waiting), []).append(number)
    edges = []
    for queue in {*pushes, *pops}:
        assert len(pushes.get(queue, [])) == len(pops.get(queue, [])), f"tokens left over in queue {queue}"
        edges += list(zip(pushes[queue], pops[queue], strict=True))
    assert all(push < pop for push, pop in edges), "a pop comes before its push"
    return edges


def ordered_before(program: Program) -> np.ndarray:
    """before[i, j]: instruction i has finished when j starts, by unit order and tokens."""
    count = len(program.instructions)
    before = np.zeros((count, count), bool)
    arrivals: dict[int, list[int]] = {}
    for push, pop in token_edges(program):
        arrivals.setdefault(pop, []).append(push)
    last = {LOAD: -1, COMPUTE: -1, STORE: -1}
    for number, instruction in enumerate(program.instructions):
        unit = COMPUTE if isinstance(instruction, Finish) else unit_of(instruction)
        for previous in [last[unit], *arrivals.get(number, [])]:
            if previous >= 0:
                before[:, number] |= before[:, previous]
                before[previous, number] = True
        last[unit] = number
    return before


def footprint(program: Program, number: int) -> Access:
    """Tiles of an instruction, from its fields and the micro-op region."""
    instruction = program.instructions[number]
    region = program.targets[number]
    if isinstance(instruction, (Load, Store)):
        rows, columns = instruction.y_size, instruction.x_size
        dram = {
            (f"dram {region}", instruction.dram + r * instruction.x_stride + c)
            for r in range(rows)
            for c in range(columns)
        }
        sram = range(instruction.sram, instruction.sram + rows * columns)
        if isinstance(instruction, Store):
            return Access({("out", t) for t in sram}, dram)
        return Access(dram, {(instruction.memory, t) for t in sram})
    if isinstance(instruction, Gemm):
        touched = UOPS[number]
        return Access(
            set() if instruction.reset else {("inp", s) for _, s, _ in touched} | {("wgt", w) for _, _, w in touched},
            {("out", d) for d, _, _ in touched},
        )
    if isinstance(instruction, Alu):
        return Access(set(), {("out", d) for d, _, _ in UOPS[number]})
    return Access(set(), set())


UOPS: dict[int, list[tuple[int, int, int]]] = {}


def expanded(uops: np.ndarray, loops: list[tuple[int, ...]]) -> list[tuple[int, int, int]]:
    points = [tuple(int(v) for v in row) for row in uops]
    for count, *steps in reversed(loops):
        points = [tuple(p + i * s for p, s in zip(point, steps, strict=True)) for i in range(count) for point in points]
    return points  # type: ignore[return-value]


command = st.tuples(
    st.sampled_from(["inp", "wgt", "gemm", "reset", "alu", "store", "store"]),
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(1, 3),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(command, min_size=5, max_size=40))
def test_every_hazard_is_ordered(commands: list[tuple[str, int, int, int]]) -> None:
    """Small buffers, many collisions, and DRAM that is stored to and loaded from again."""
    UOPS.clear()
    builder = ProgramBuilder(CONFIG)
    builder.region("data", 4096, access="rw")
    builder.region("weights", 1 << 16, data=bytes(1 << 16))
    for kind, a, b, size in commands:
        if kind == "inp":
            builder.load("inp", a, "data", b, rows=2, columns=size, stride=size + 1)
        elif kind == "wgt":
            builder.load("wgt", a, "weights", b, columns=size)
        elif kind == "store":
            builder.store(a, "data", b, rows=size, columns=2, stride=3)
        elif kind == "alu":
            uops = np.array([[a, a], [a + 1, a + 1], [a + 2, a + 2]])
            builder.alu("max", uops, [(size, 3, 3)], immediate=0)
            UOPS[len(builder._instructions) - 1] = expanded(np.c_[uops, [0, 0, 0]], [(size, 3, 3, 0)])
        else:
            uops = np.array([[a, b, 0], [a + 1, b, 1], [a + 2, b + 1, 0]])
            builder.gemm(uops, [(size, 3, 1, 1)], reset=kind == "reset")
            UOPS[len(builder._instructions) - 1] = expanded(uops, [(size, 3, 1, 1)])
    program = builder.finish()
    before = ordered_before(program)
    accesses = [footprint(program, number) for number in range(len(program.instructions))]
    for later, second in enumerate(accesses):
        for earlier, first in enumerate(accesses[:later]):
            if second.writes & (first.reads | first.writes) or second.reads & first.writes:
                assert before[earlier, later], (program.instructions[earlier], program.instructions[later])
    finish = len(program.instructions) - 1
    assert all(before[i, finish] for i, x in enumerate(program.instructions) if isinstance(x, Store))


def simple(builder: ProgramBuilder, slot: int) -> None:
    """One tile of work in the given slot."""
    uops = np.array([[slot * 4 + i, slot * 4 + i, slot] for i in range(3)])
    builder.load("inp", slot * 4, "x", 0, columns=3)
    builder.load("wgt", slot, "w", 0, columns=1)
    builder.gemm(uops, reset=True)
    builder.gemm(uops)
    builder.store(slot * 4, "y", slot * 3, columns=3)


def test_double_buffering_does_not_wait() -> None:
    """The second slot's loads wait for nothing; the third piece of work re-uses the first slot and waits."""
    builder = ProgramBuilder(CONFIG)
    builder.region("x", 64 * 16, data=bytes(64 * 16))
    builder.region("w", 256, data=bytes(256))
    builder.region("y", 64 * 16, access="w")
    for slot in (0, 1, 0):
        simple(builder, slot)
    loads = [i for i in builder.finish().instructions if isinstance(i, Load) and i.memory == "inp"]
    assert [load.pop_next for load in loads] == [False, False, True]


def test_load_waits_for_a_store_through_compute() -> None:
    builder = ProgramBuilder(CONFIG)
    builder.region("x", 64 * 16, access="rw")
    uops = np.array([[i, i, 0] for i in range(3)])
    builder.gemm(uops, reset=True)
    builder.store(0, "x", 0, columns=3)
    builder.load("inp", 0, "x", 0, columns=3)
    program = builder.finish()
    kinds = [type(i).__name__ for i in program.instructions]
    assert kinds == ["Load", "Gemm", "Store", "Load", "Load", "Load", "Finish"]
    relay, load = program.instructions[3], program.instructions[4]
    assert isinstance(relay, Load) and relay.memory == "uop" and relay.x_size == 0
    assert relay.pop_next and relay.push_prev and load.pop_next


def single_tiles(count: int, ahead: int) -> ProgramBuilder:
    """`count` tiles, each loaded into a place of its own and used alone; loads are issued `ahead` at a time."""
    builder = ProgramBuilder(CONFIG)
    builder.region("x", count * 16, data=bytes(count * 16))
    builder.region("w", 256, data=bytes(256))
    builder.region("y", 16 * count, access="w")
    builder.load("wgt", 0, "w", 0, columns=1)
    for start in range(0, count, ahead):
        for i in range(start, start + ahead):
            builder.load("inp", i, "x", i, columns=1)
        for i in range(start, start + ahead):
            builder.gemm(np.array([[i, i, 0]]), reset=True)
            builder.gemm(np.array([[i, i, 0]]))
            builder.store(i, "y", i, columns=1)
    return builder


@pytest.mark.parametrize("ahead", [1, 3, 300, 900])
def test_tokens_do_not_pile_up(ahead: int) -> None:
    """A unit that could run hundreds of instructions ahead waits now and then; queues hold 255 tokens."""
    program = link(single_tiles(900, ahead).finish())
    for interleaving in (None, 1, 2):
        simulate(program, model=None, interleaving=interleaving)


def test_few_tokens_wait_for_nothing() -> None:
    program = single_tiles(100, 1).finish()
    assert not any(i.pop_next for i in program.instructions if isinstance(i, Load) and i.memory == "inp")


def test_micro_ops_are_loaded_once_while_they_stay() -> None:
    builder = ProgramBuilder(CONFIG)
    uops = np.array([[i, 0, 0] for i in range(4)])
    for _ in range(5):
        builder.gemm(uops, reset=True)
    program = builder.finish()
    transfers = [i for i in program.instructions if isinstance(i, Load) and i.memory == "uop" and i.x_size]
    assert len(transfers) == 1 and program.regions["uop"].size == 16


def test_micro_op_buffer_evicts_what_it_overwrites() -> None:
    builder = ProgramBuilder(CONFIG)
    sequences = [np.array([[i, 0, k] for i in range(1000)]) for k in range(4)]
    for sequence in [*sequences, sequences[0]]:
        builder.gemm(sequence, reset=True)
    program = builder.finish()
    transfers = [i for i in program.instructions if isinstance(i, Load) and i.memory == "uop" and i.x_size]
    assert [t.sram for t in transfers] == [0, 1000, 0, 1000, 0]
    assert transfers[-1].dram == 0


@pytest.mark.parametrize("uops", [[[0, 0, 0], [0, 1, 0]], [[0, 0, 0], [1, 0, 0], [0, 0, 1]]])
def test_recurring_accumulators_are_refused(uops: list[list[int]]) -> None:
    with pytest.raises(CompileError, match="recurs"):
        ProgramBuilder(CONFIG).gemm(np.array(uops))


def test_transfers_must_stay_inside() -> None:
    builder = ProgramBuilder(CONFIG)
    builder.region("x", 160, data=bytes(160))
    with pytest.raises(CompileError, match="leaves its 160 bytes"):
        builder.load("inp", 0, "x", 8, columns=3)
    with pytest.raises(CompileError, match="not declared"):
        builder.load("inp", 0, "nowhere", 0, columns=1)
    with pytest.raises(CompileError, match="read-only"):
        builder.store(0, "x", 0, columns=1)
    with pytest.raises(CompileError, match="the buffer has 2048"):
        builder.load("inp", 2040, "x", 0, columns=9)
