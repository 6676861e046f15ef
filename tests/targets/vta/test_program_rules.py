"""The memory map's rules: each broken once, and the order of definition followed byte by byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.vta.config import PRESETS
from lpsn_tvm.targets.vta.isa import Finish, Instruction, Load, Store, encode
from lpsn_tvm.targets.vta.program import LinkedProgram, LinkedRegion
from lpsn_tvm.targets.vta.program_rules import check_memory

CONFIG = PRESETS["pynq"]
TILE = CONFIG.inp_tile_bytes
A, B = 0x2000, 0x2040


def program(instructions: Sequence[Instruction], **regions: LinkedRegion) -> LinkedProgram:
    """`a`: 4 tiles without contents, `b` behind it: 4 tiles with contents."""
    found = {
        "a": LinkedRegion("a", 64, None, "rw", A),
        "b": LinkedRegion("b", 64, bytes(64), "r", B),
    } | regions
    return LinkedProgram(CONFIG, encode([*instructions, Finish()], CONFIG), 0x1000, found)


def load(address: int, *, rows: int = 1, columns: int = 1, stride: int = 0) -> Load:
    return Load(memory="inp", dram=address // TILE, y_size=rows, x_size=columns, x_stride=stride)


def store(address: int, *, rows: int = 1, columns: int = 1, stride: int = 0) -> Store:
    return Store(dram=address // TILE, y_size=rows, x_size=columns, x_stride=stride)


def test_what_is_allowed() -> None:
    check_memory(program([load(B, rows=2, columns=2, stride=2)]))
    check_memory(program([store(A, columns=4), load(A, rows=2, columns=3, stride=1)]))
    # Rows in two regions, each inside one.
    check_memory(program([store(A, columns=4), load(A, rows=2, columns=4, stride=4)]))
    check_memory(program([load(0x7000, rows=3), Load(memory="uop")][1:]))
    check_memory(program([replace(load(0x7000), x_size=0), replace(load(0x7000), y_size=0)]))
    check_memory(program([], empty=LinkedRegion("empty", 0, None, "r", A)))
    check_memory(program([load(B)], empty=LinkedRegion("empty", 0, None, "r", B)))


@pytest.mark.parametrize(
    ("instructions", "message"),
    [
        ([load(A)], "instruction 0: reads bytes of region 'a' that nothing has written"),
        ([store(A, columns=3), load(A, columns=4)], "instruction 1: reads bytes of region 'a'"),
        ([store(A, rows=2, stride=2), load(A, columns=2)], "instruction 1: reads bytes of region 'a'"),
        ([load(B, columns=5)], "row 0 at 0x2040 of 80 bytes is not inside one region"),
        ([load(B, rows=3, columns=2, stride=2)], "row 2 at 0x2080 of 32 bytes is not inside one region"),
        ([store(A, columns=4), load(A + 48, columns=2)], "row 0 at 0x2030 of 32 bytes is not inside one region"),
        ([store(B)], "region 'b' has access 'r': it cannot be written"),
        ([store(0x1000)], "row 0 at 0x1000 of 16 bytes is not inside one region"),
        ([load(0)], "row 0 at 0x0"),
        ([load(B, rows=65535, columns=65535)], "bytes, at most 33554432 are allowed"),
        ([Finish()], r"FINISH must be the last instruction and the only one; found at \[0, 1\] of 2"),
    ],
)
def test_what_is_refused(instructions: list[Instruction], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        check_memory(program(instructions))


@pytest.mark.parametrize(
    ("region", "message"),
    [
        (LinkedRegion("c", 16, None, "r", A + 32), "region 'a': 0x2000 \\+ 64 bytes overlaps region 'c'"),
        (LinkedRegion("c", 0x9000, None, "r", 0), "region 'c': 0x0 \\+ 36864 bytes overlaps region 'insn'"),
        (LinkedRegion("c", 32, None, "r", 2**32 - 16), r"region 'c': 0xfffffff0 \+ 32 bytes is not below 2\*\*32"),
        (LinkedRegion("c", 32, None, "r", -16), "not below"),
        (LinkedRegion("c", 32, bytes(31), "r", 0x9000), "region 'c': has 31 bytes of data, not 32"),
        (LinkedRegion("c", 32, None, "x", 0x9000), "region 'c': access is 'x', allowed: r, w, rw"),  # type: ignore[arg-type]
    ],
)
def test_regions_that_are_refused(region: LinkedRegion, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        check_memory(program([], c=region))


def test_other_rules_of_regions() -> None:
    with pytest.raises(CompileError, match="region 'insn': is the name of the instructions' own region"):
        check_memory(program([], insn=LinkedRegion("insn", 4, None, "r", 0x9000)))
    with pytest.raises(CompileError, match="instructions at 0x1010 are not aligned to 4096"):
        check_memory(replace(program([]), insn_addr=0x1010))
    crooked = LinkedRegion("c", 100, bytes(100), "r", 0x8FF8)
    with pytest.raises(CompileError, match="region 'c' at 0x8ff8 is not aligned to its tile of 16 bytes"):
        check_memory(program([load(0x9000)], c=crooked))
    with pytest.raises(CompileError, match=r"FINISH must be the last"):
        check_memory(replace(program([]), insn=b""))


TRANSFERS = st.lists(
    st.tuples(st.booleans(), st.integers(0, 11), st.integers(1, 4), st.integers(1, 4), st.integers(0, 6)), max_size=8
)


@given(transfers=TRANSFERS)
@settings(max_examples=200, derandomize=True, deadline=None)
def test_definedness_tile_by_tile(transfers: list[tuple[bool, int, int, int, int]]) -> None:
    """The same verdict as a set of defined tiles."""
    defined: set[int] = set()
    instructions: list[Instruction] = []
    verdict = None
    for writes, first, rows, columns, stride in transfers:
        tiles = {first + r * stride + c for r in range(rows) for c in range(columns)}
        make: Any = store if writes else load
        instructions.append(make(0x4000 + first * TILE, rows=rows, columns=columns, stride=stride))
        if max(tiles) >= 16 or not (writes or tiles <= defined):
            verdict = len(instructions) - 1
            break
        if writes:
            defined |= tiles
    region = LinkedRegion("c", 16 * TILE, None, "rw", 0x4000)
    if verdict is None:
        check_memory(program(instructions, c=region))
        return
    with pytest.raises(CompileError, match=f"instruction {verdict}: "):
        check_memory(program(instructions, c=region))


def test_large_programs_are_quick() -> None:
    """20,000 transfers of a few rows each."""
    big = LinkedRegion("c", 1 << 22, bytes(1 << 22), "r", 0x100000)
    loads = [load(0x100000 + int(i) * TILE, rows=9, columns=16, stride=58) for i in np.arange(20000)]
    check_memory(replace(program(loads, c=big), insn_addr=0x1000000))
