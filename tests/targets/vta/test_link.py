"""Linking: addresses, alignment, relocated fields."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.vta.config import PRESETS, VtaConfig
from lpsn_tvm.targets.vta.isa import Alu, Finish, Instruction, Load, Store, decode
from lpsn_tvm.targets.vta.program import DEFAULT_BASE, PAGE, Program, Region, link, place
from lpsn_tvm.targets.vta.program_rules import check_memory

CONFIG = PRESETS["pynq"]


def _program(config: VtaConfig = CONFIG) -> Program:
    instructions: list[Instruction] = [
        Load(memory="uop", dram=3, y_size=1, x_size=1, x_stride=1),
        Load(memory="wgt", dram=2, y_size=1, x_size=1, x_stride=1),
        Load(memory="acc", dram=1, y_size=1, x_size=1, x_stride=1),
        Load(memory="inp", dram=7, y_size=1, x_size=1, x_stride=1),
        Alu(op="max", uop_end=1, use_imm=True),
        Store(dram=5, y_size=1, x_size=1, x_stride=1),
        Load(memory="uop"),
        Finish(),
    ]
    targets = ["uop", "weight", "vector", "input", None, "output", None, None]
    sizes = {
        "uop": 16,
        "weight": 3 * config.wgt_tile_bytes,
        "vector": 2 * config.acc_tile_bytes,
        "input": 8 * config.inp_tile_bytes,
        "output": 5000 * config.out_tile_bytes,
    }
    regions = {
        name: Region(name, size, None if name == "output" else bytes(size), "w" if name == "output" else "r")
        for name, size in sizes.items()
    }
    return Program(config, instructions, targets, regions, ((0, "layer"),))


@pytest.mark.parametrize("key", PRESETS)
def test_addresses_are_in_tiles_of_the_memory(key: str) -> None:
    config = PRESETS[key]
    program = _program(config)
    linked = link(program)
    check_memory(linked)
    at = {name: region.addr for name, region in linked.regions.items()}
    back = decode(linked.insn, config)
    found = [i.dram for i in back if isinstance(i, (Load, Store)) and i.x_size]
    assert found == [
        at["uop"] // 4 + 3,
        at["weight"] // config.wgt_tile_bytes + 2,
        at["vector"] // config.acc_tile_bytes + 1,
        at["input"] // config.inp_tile_bytes + 7,
        at["output"] // config.out_tile_bytes + 5,
    ]
    assert [i for i in back if not (isinstance(i, (Load, Store)) and i.x_size)] == [
        program.instructions[i] for i in (4, 6, 7)
    ]
    assert linked.marks == ((0, "layer"),)
    assert linked.insn_count == len(program.instructions)


@given(base=st.integers(0, 2**31), sizes=st.lists(st.integers(0, 20000), max_size=6))
@settings(max_examples=60, derandomize=True)
def test_places_are_pages_apart(base: int, sizes: list[int]) -> None:
    regions = {f"r{i}": Region(f"r{i}", size) for i, size in enumerate(sizes)}
    addresses = place(Program(CONFIG, [Finish()], [None], regions), base)
    assert list(addresses) == ["insn", *regions]
    spans = [(addresses["insn"], 16), *((addresses[name], region.size) for name, region in regions.items())]
    assert spans[0][0] >= base
    assert all(address % PAGE == 0 for address, _ in spans)
    assert all(address + max(size, 1) <= following for (address, size), (following, _) in pairwise(spans))


def test_given_addresses() -> None:
    program = _program()
    names = ["insn", *program.regions]
    addresses = {name: 0x10000000 + 0x100000 * i for i, name in enumerate(reversed(names))}
    linked = link(program, addresses)
    assert linked.insn_addr == addresses["insn"]
    assert {name: region.addr for name, region in linked.regions.items()} == {
        name: addresses[name] for name in program.regions
    }
    check_memory(linked)


@pytest.mark.parametrize(("name", "address"), [("weight", 0x10100), ("weight", None), ("insn", 16)])
def test_bad_addresses(name: str, address: int | None) -> None:
    program = _program()
    addresses = place(program)
    if address is None:
        del addresses[name]
    else:
        addresses[name] = address
    with pytest.raises(CompileError, match=f"region '{name}': needs an address that is a multiple of 4096"):
        link(program, addresses)


def test_what_does_not_fit() -> None:
    program = Program(CONFIG, [Finish()], [None], {"big": Region("big", 2**32 - DEFAULT_BASE)})
    with pytest.raises(CompileError, match=r"addresses end at 2\*\*32"):
        link(program)
