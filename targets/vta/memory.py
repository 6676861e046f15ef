"""One arena for all activations of a program: tensors that are never alive together share addresses.

Greedy by size (the largest tensor first), each into the smallest gap that fits between the tensors that overlap it in
time. Example: x (100 bytes, steps 0..1), y (60, 1..2), z (100, 2..3) -> x and z at 0, y at 128; 192 bytes instead of
260.

Source: Pisarchyk and Lee, Efficient Memory Management for Deep Neural Net Inference, 2020 (greedy by size).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lpsn_tvm.errors import CompileError

ALIGNMENT = 64
"""Bytes; a multiple of every activation tile and of the memory bus."""


@dataclass(frozen=True)
class Lifetime:
    """A tensor that is written at step `first` and read last at step `last` (both included).

    Parameters
    ----------
    name : str
    size : int
        Bytes, at least 1.
    first, last : int
        Steps, first <= last.
    """

    name: str
    size: int
    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        """Whether both are alive at some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Arena:
    """Where every tensor lies.

    Parameters
    ----------
    offsets : mapping of name to int
        Bytes from the start of the arena.
    size : int
        Bytes that it needs: the peak.
    """

    offsets: Mapping[str, int]
    size: int


def plan_arena(tensors: Iterable[Lifetime], alignment: int = ALIGNMENT) -> Arena:
    """Offsets such that no two tensors that are alive together overlap, each a multiple of `alignment` bytes.

    Raises
    ------
    CompileError
        A tensor has no bytes, dies before it is written, or two have the same name.
    """
    lifetimes = list(tensors)
    for tensor in lifetimes:
        if tensor.size < 1 or tensor.first > tensor.last:
            raise CompileError(f"has {tensor.size} bytes, alive {tensor.first}..{tensor.last}", where=tensor.name)
    if len({tensor.name for tensor in lifetimes}) != len(lifetimes):
        raise CompileError("two tensors of the arena have the same name", where="memory planner")
    placed: list[tuple[int, int, Lifetime]] = []
    for tensor in sorted(lifetimes, key=lambda t: (-t.size, t.first, t.name)):
        size = _aligned(tensor.size, alignment)
        taken = sorted((start, end) for start, end, other in placed if other.overlaps(tensor))
        start = _best_gap(taken, size)
        placed.append((start, start + size, tensor))
    offsets = {tensor.name: start for start, _, tensor in placed}
    return Arena(offsets, max((end for _, end, _ in placed), default=0))


def _best_gap(taken: list[tuple[int, int]], size: int) -> int:
    """Start of the smallest gap of at least `size` bytes; behind everything where there is none."""
    best, best_length, end = None, 0, 0
    for start, stop in taken:
        length = start - end
        if length >= size and (best is None or length < best_length):
            best, best_length = end, length
        end = max(end, stop)
    return end if best is None else best


def _aligned(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
