"""The arena: tensors alive together never overlap."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpsn_tvm.errors import CompileError
from lpsn_tvm.targets.vta.memory import Lifetime, plan_arena


@st.composite
def lifetimes(draw: st.DrawFn) -> list[Lifetime]:
    found = []
    for index in range(draw(st.integers(0, 12))):
        first = draw(st.integers(0, 15))
        found.append(Lifetime(str(index), draw(st.integers(1, 5000)), first, first + draw(st.integers(0, 6))))
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(lifetimes(), st.sampled_from([1, 16, 64, 4096]))
def test_no_two_live_tensors_overlap(tensors: list[Lifetime], alignment: int) -> None:
    arena = plan_arena(tensors, alignment)
    assert set(arena.offsets) == {t.name for t in tensors}
    assert all(offset % alignment == 0 for offset in arena.offsets.values())
    for a in tensors:
        assert 0 <= arena.offsets[a.name] <= arena.size - a.size
        for b in tensors:
            if a.name < b.name and a.overlaps(b):
                first, second = sorted((a, b), key=lambda t: arena.offsets[t.name])
                assert arena.offsets[first.name] + first.size <= arena.offsets[second.name]
    rounded = [(t, -(-t.size // alignment) * alignment) for t in tensors]
    peak = max((sum(n for t, n in rounded if t.first <= step <= t.last) for step in range(23)), default=0)
    assert peak <= arena.size <= sum(n for _, n in rounded)


def test_a_chain_needs_two_tensors() -> None:
    arena = plan_arena([Lifetime(str(i), 1024, i, i + 1) for i in range(10)])
    assert arena.size == 2048


def test_the_smallest_gap_is_taken() -> None:
    """When `wide` and `narrow` are dead, gaps of 256 and 128 bytes are left."""
    fixed = [Lifetime("big", 4096, 0, 9), Lifetime("wide", 256, 0, 0), Lifetime("wall", 192, 0, 9)]
    arena = plan_arena([*fixed, Lifetime("narrow", 128, 0, 0), Lifetime("end", 120, 0, 9), Lifetime("new", 100, 1, 2)])
    assert arena.offsets["new"] == arena.offsets["narrow"]


@pytest.mark.parametrize(
    "tensors",
    [[Lifetime("a", 0, 0, 1)], [Lifetime("a", 1, 2, 1)], [Lifetime("a", 1, 0, 1), Lifetime("a", 2, 0, 1)]],
    ids=["empty", "backwards", "twice"],
)
def test_impossible_tensors_are_refused(tensors: list[Lifetime]) -> None:
    with pytest.raises(CompileError, match="a"):
        plan_arena(tensors)
