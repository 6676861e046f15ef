"""How many units of each group are to go: fractions per layer, patterns, what is never touched, and rounding to the
hardware's tile.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import gcd

from lpsn_tvm.errors import RecipeError
from lpsn_tvm.passes.channel_groups import ChannelGroup


def check_names(patterns: Iterable[str], layers: Sequence[str], option: str) -> None:
    """Every name or shell pattern must match a layer.

    Raises
    ------
    RecipeError
        One matches nothing; lists close matches.
    """
    for pattern in patterns:
        if pattern in layers or any(fnmatchcase(layer, pattern) for layer in layers):
            continue
        close = difflib.get_close_matches(pattern, layers, 3, cutoff=0.4)
        hint = f"close matches: {', '.join(close)}" if close else f"layers are: {', '.join(layers[:20])}"
        raise RecipeError(f"no layer has the name or matches the pattern {pattern!r}; {hint}", where=option)


def writers(group: ChannelGroup) -> list[str]:
    """Names of the layers whose output channels the group is."""
    return [slot.layer for slot in group.producers] + [follower.layer for follower in group.followers]


def is_ignored(group: ChannelGroup, ignore: Sequence[str]) -> str | None:
    """The layer of the group that must keep its output channels, if there is one."""
    for name in writers(group):
        if any(name == pattern or fnmatchcase(name, pattern) for pattern in ignore):
            return name
    return None


def fraction_of(group: ChannelGroup, sparsity: float | Mapping[str, float]) -> float:
    """The fraction of the group that is to be removed; names win over patterns, layers that are not named lose nothing.

    Raises
    ------
    RecipeError
        Two layers of one group are named with different fractions.
    """
    if not isinstance(sparsity, Mapping):
        return float(sparsity)
    names = writers(group)
    exact = {name: float(sparsity[name]) for name in names if name in sparsity}
    if len(set(exact.values())) > 1:
        raise RecipeError(
            f"these layers share their channels, so one fraction must do for all: {exact}", where="sparsity"
        )
    if exact:
        return next(iter(exact.values()))
    matches = (value for pattern, value in sparsity.items() if any(fnmatchcase(name, pattern) for name in names))
    return float(next(matches, 0.0))


def tile_units(group: ChannelGroup, align: int) -> int:
    """Units that the number of kept units should be a multiple of; 1 where the layer is too narrow (less than two
    tiles).
    """
    if not group.producers:
        return 1
    size, width = group.producers[0].index.shape
    return 1 if size * width < 2 * align else align // gcd(align, width)


def kept_units(group: ChannelGroup, fraction: float, align: int) -> int:
    """Units to keep: `size - int(fraction * size)` as in the paper, rounded to the nearest whole tiles (halves up),
    at least one tile.
    """
    kept = group.size - int(fraction * group.size + 1e-9)
    tile = tile_units(group, align)
    if tile > 1 and fraction > 0:
        kept = max(tile, int(kept / tile + 0.5) * tile)
    return max(1, min(group.size, kept))


def kept_rounded_up(group: ChannelGroup, kept: int, align: int) -> int:
    """`kept` units rounded up to whole tiles: what an error budget allows to remove is never exceeded."""
    tile = tile_units(group, align)
    return max(1, min(group.size, -(-kept // tile) * tile))
