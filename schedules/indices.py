"""Arithmetic on loop indices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Operation = Callable[[Any, int], Any]


def coordinates(index: Any, extents: Sequence[int], divide: Operation, modulo: Operation) -> list[Any]:
    """Coordinates of a fused index, the last axis fastest; extents of one cost nothing.

    >>> coordinates(7, (2, 1, 4), lambda a, b: a // b, lambda a, b: a % b)
    [1, 0, 3]
    """
    found: list[Any] = []
    for extent in reversed(extents[1:]):
        found.append(modulo(index, extent) if extent > 1 else 0)
        index = divide(index, extent) if extent > 1 else index
    found.append(index if extents[0] > 1 else 0)
    return found[::-1]
