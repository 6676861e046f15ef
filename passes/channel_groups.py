"""Channel groups: the channels of a network that can only be removed together, and everyone who writes or reads them.

Analysis only; `lpsn_tvm.passes.remove_channels` removes, the greedy pass chooses what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from numpy.typing import NDArray

from lpsn_tvm.errors import PruneError
from lpsn_tvm.passes.channel_flow import trace_channels
from lpsn_tvm.passes.channel_labels import Flow, Labels, compress

IndexMap = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Slot:
    """One side of a layer that carries a group's channels.

    Parameters
    ----------
    layer : str
        Layer name.
    index : int64[size, k]
        `index[u]` are the channels of that side (output channels of a producer, input channels of a consumer, full
        numbering) that belong to unit u, ascending. A dense layer behind a flatten has k = H*W consecutive features. A
        grouped consumer numbers its input channels through all groups: column of the weight = index % (channels /
        groups), the same for all k.
    """

    layer: str
    index: IndexMap


@dataclass(frozen=True, eq=False)
class Follower:
    """A layer that both reads and writes the group's channels: depthwise, or grouped with whole groups as units.

    Parameters
    ----------
    layer : str
        Layer name.
    read : int64[size, k]
        Its input channels of each unit.
    written : int64[size, m]
        Its output channels of each unit (m = k * channel multiplier for depthwise).
    """

    layer: str
    read: IndexMap
    written: IndexMap


@dataclass(frozen=True, eq=False)
class Value:
    """A variable that carries the group's channels: unit u is `index[u]` along `axis` (1 for NCHW and [N, K])."""

    name: str
    axis: int
    index: IndexMap


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are kept or removed together; a *unit* is the smallest removable piece.

    Example: `a` and `b` are convolutions with 64 output channels, `s = relu(a + b)`, `dw` is depthwise on `s`, `c`
    reads `dw`, and `d` reads `concat(e, s)` where `e` has 32 channels. Channel 5 of `a` can only leave together with
    channel 5 of `b`, of `dw`, the fifth input column of `c` and input column 37 of `d`. The group is::

        name="a", size=64, producers=(Slot("a", [[0], [1], ...]), Slot("b", [[0], [1], ...])),
        consumers=(Slot("c", [[0], [1], ...]), Slot("d", [[32], [33], ...])),
        followers=(Follower("dw", read=[[0], ...], written=[[0], ...]),), constants=(),
        values=(Value("a.acc", 1, [[0], ...]), Value("a", 1, [[0], ...]), ..., Value("<concat>", 1, [[32], ...]))

    With depth-to-space by 2 behind `a` a unit is 4 channels ([[0, 16, 32, 48], ...] in DCR order, [[0, 1, 2, 3], ...]
    in CRD order). Where only a part of a layer's channels is coupled (a split, a shortcut padded with zeros), the
    parts are groups of their own.

    Parameters
    ----------
    name : str
        The first producer's name; later groups of the same producer get "#2", "#3".
    size : int
        Number of units; unit numbers follow the first producer's channels.
    producers, consumers : tuple of Slot
        Layers in execution order.
    followers : tuple of Follower
        Layers that pass the channels on.
    constants : tuple of str
        Bindings with per-channel constants that are sliced along (PReLU, affine multiply and add, instance norm);
        their slices are those of the value of the same name.
    values : tuple of Value
        Every variable that carries the channels.
    """

    name: str
    size: int
    producers: tuple[Slot, ...]
    consumers: tuple[Slot, ...]
    followers: tuple[Follower, ...]
    constants: tuple[str, ...]
    values: tuple[Value, ...]


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """All groups of a function, in execution order of their first producer.

    Parameters
    ----------
    groups : tuple of ChannelGroup
        What can be removed.
    frozen : dict of str to str
        Name of a group (as above) that is left whole -> why.
    extents : dict of str to tuple of int
        Shape of every variable that a group touches.
    """

    groups: tuple[ChannelGroup, ...]
    frozen: dict[str, str]
    extents: dict[str, tuple[int, ...]]

    def __getitem__(self, name: str) -> ChannelGroup:
        for group in self.groups:
            if group.name == name:
                return group
        reason = (
            f"it is left whole: {self.frozen[name]}"
            if name in self.frozen
            else f"groups are {[g.name for g in self.groups]}"
        )
        raise PruneError(f"no such channel group; {reason}", where=name)

    def kept(self, masks: Mapping[str, Mask]) -> dict[str, tuple[int, Mask]]:
        """What is left of every touched variable under `masks` (group -> bool[size], True = keep), as (axis, mask)."""
        kept: dict[str, tuple[int, Mask]] = {}
        for name, mask in masks.items():
            group = self[name]
            for value in group.values:
                channels = self.extents[value.name][value.axis]
                _, keep = kept.setdefault(value.name, (value.axis, np.ones(channels, bool)))
                keep[value.index[~check_mask(group, mask)].reshape(-1)] = False
        return kept


def check_mask(group: ChannelGroup, mask: Mask) -> Mask:
    """`mask` if it fits the group and keeps something.

    Raises
    ------
    PruneError
        Wrong length or type, or nothing kept.
    """
    if np.asarray(mask).shape != (group.size,) or np.asarray(mask).dtype != np.bool_:
        what = f"{np.asarray(mask).dtype}{list(np.asarray(mask).shape)}"
        raise PruneError(f"the mask must be bool[{group.size}] (True = keep), not {what}", where=group.name)
    if not mask.any():
        raise PruneError(f"all {group.size} units would be removed; at least 1 must be kept", where=group.name)
    return mask


def find_channel_groups(mod: tvm.IRModule) -> ChannelGroups:
    """Find the channel groups of a canonical function.

    Parameters
    ----------
    mod : IRModule
        Canonical form; it is not changed.
    """
    return collect_groups(*resolve_classes(mod))


def resolve_classes(mod: tvm.IRModule) -> tuple[Flow, Labels]:
    """The walk over the function and the class of each of its labels."""
    flow = trace_channels(mod)
    return flow, flow.classes()


@dataclass(frozen=True, eq=False)
class _Side:
    """One label vector that index maps are made for: kind, name, axis, class per channel, place in execution order."""

    kind: str
    name: str
    axis: int
    classes: Labels
    place: int


def _sides(flow: Flow, classes: Labels) -> list[_Side]:
    order = {layer.name: position for position, layer in enumerate(flow.layers.values())}
    sides = [_Side("producer", name, 1, classes[vector], order[name]) for name, vector in flow.producers]
    sides += [_Side("consumer", name, 1, classes[vector], order[name]) for name, vector in flow.consumers]
    for name, read, written in flow.followers:
        sides += [
            _Side("read", name, 1, classes[read], order[name]),
            _Side("written", name, 1, classes[written], order[name]),
        ]
    sides.sort(key=lambda side: side.place)
    for name, labels in flow.labels.items():
        mapped = compress(classes[labels])
        axis = int(np.argmax(mapped.shape)) if mapped.size > 1 else min(1, mapped.ndim - 1)
        if axis >= 0:
            channels = np.broadcast_to(mapped.reshape(-1), (flow.shapes[name][axis],))
            sides.append(_Side("value", name, axis, channels, len(order)))
    return sides


def _partition(sides: Iterable[_Side], classes: int) -> Labels:
    """Class -> group: classes are together when they occur equally often on every side."""
    group = np.zeros(classes, np.int64)
    following = 1
    for side in sides:
        present, counts = np.unique(side.classes, return_counts=True)
        _, inverse = np.unique(group[present] * 2**32 + counts, return_inverse=True)
        group[present] = following + inverse
        following += int(inverse.max()) + 1
    return group


def _units(sides: Iterable[_Side], group_of: Labels) -> Labels:
    """Class -> unit number within its group: order of first appearance on the group's first producer (or follower)."""
    unit = np.full(len(group_of), -1, np.int64)
    for side in sides:
        present, first = np.unique(side.classes, return_index=True)
        present = present[np.argsort(first)]
        for group in np.unique(group_of[present[unit[present] < 0]]).tolist():
            members = present[group_of[present] == group]
            unit[members] = np.arange(len(members))
    return unit


def collect_groups(flow: Flow, classes: Labels) -> ChannelGroups:
    """Sort classes into groups and make the index maps."""
    sides = _sides(flow, classes)
    count = int(classes.max()) + 1 if len(classes) else 0
    group_of = _partition(sides, count)
    # Unit numbers follow producers, then followers; what only values carry (padding) is no group.
    rank = {"producer": 0, "written": 1}
    unit_of = _units(sorted((s for s in sides if s.kind in rank), key=lambda s: rank[s.kind]), group_of)
    maps: dict[int, list[tuple[_Side, IndexMap]]] = {}
    for side in sides:
        for group, index in _index_maps(side, group_of, unit_of):
            maps.setdefault(group, []).append((side, index))
    reasons = _reasons(flow, classes, group_of)
    layers = {layer.name for layer in flow.layers.values()}
    constants = {name for name, _ in flow.constants if name not in layers}
    groups: list[ChannelGroup] = []
    frozen: dict[str, str] = {}
    taken: dict[str, int] = {}
    leads = {number: lead for number, members in maps.items() if (lead := _lead(members)) is not None}
    for number, (first, index) in sorted(leads.items(), key=lambda item: (item[1][0].place, int(item[1][1].min()))):
        members = maps[number]
        taken[first.name] = taken.get(first.name, 0) + 1
        name = first.name if taken[first.name] == 1 else f"{first.name}#{taken[first.name]}"
        size = len(index)
        if number in reasons:
            frozen[name] = reasons[number]
        elif size == 1:
            frozen[name] = "all of its channels are one unit"
        else:
            groups.append(_group(name, size, members, constants))
    touched = {value.name for group in groups for value in group.values}
    return ChannelGroups(tuple(groups), frozen, {name: flow.shapes[name] for name in touched})


def _lead(members: list[tuple[_Side, IndexMap]]) -> tuple[_Side, IndexMap] | None:
    """The side that a group is named after: its first producer, else its first follower; None for mere padding."""
    written = next((member for member in members if member[0].kind == "written"), None)
    return next((member for member in members if member[0].kind == "producer"), written)


def _index_maps(side: _Side, group_of: Labels, unit_of: Labels) -> list[tuple[int, IndexMap]]:
    """The (group, int64[size, k]) pairs of one side."""
    groups = group_of[side.classes]
    units = unit_of[side.classes]
    order = np.lexsort((np.arange(len(units)), units, groups))
    order = order[units[order] >= 0]
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    pairs = []
    for positions in np.split(order, starts[1:]):
        if len(positions):
            size = int(units[positions].max()) + 1
            pairs.append((int(groups[positions[0]]), positions.reshape(size, -1).astype(np.int64)))
    return pairs


def _reasons(flow: Flow, classes: Labels, group_of: Labels) -> dict[int, str]:
    """Group -> why it is frozen. One frozen class freezes its group: the units of a group are equal on every side."""
    reasons: dict[int, str] = {}
    for label, reason in flow.frozen.items():
        reasons.setdefault(int(group_of[classes[label]]), reason)
    return reasons


def _group(name: str, size: int, members: list[tuple[_Side, IndexMap]], constants: set[str]) -> ChannelGroup:
    written = {side.name: index for side, index in members if side.kind == "written"}
    values = tuple(Value(side.name, side.axis, index) for side, index in members if side.kind == "value")
    return ChannelGroup(
        name=name,
        size=size,
        producers=tuple(Slot(side.name, index) for side, index in members if side.kind == "producer"),
        consumers=tuple(Slot(side.name, index) for side, index in members if side.kind == "consumer"),
        followers=tuple(
            Follower(side.name, index, written[side.name]) for side, index in members if side.kind == "read"
        ),
        constants=tuple(value.name for value in values if value.name in constants),
        values=values,
    )
