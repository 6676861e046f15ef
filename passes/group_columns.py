"""Index maps between a group's units, a layer's channels and the columns of its normal equations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lpsn_tvm.graph import Layer
from lpsn_tvm.passes.channel_groups import ChannelGroup, Slot
from lpsn_tvm.passes.eliminate import Elimination
from lpsn_tvm.passes.normal_equations import LayerGeometry

MAX_FAR_CONSUMERS = 8
"""Consumers of one group, beyond the first, that its mask is scored on (in a dense block every later layer is a
consumer).
"""


def order_scores(result: Elimination, size: int) -> Tensor:
    """The place of every unit in the elimination order; units that stayed come last."""
    scores = torch.full((size,), float(size), dtype=torch.float64)
    scores[result.order] = torch.arange(len(result.order), dtype=torch.float64)
    return scores


def columns_of(channels: Tensor, geometry: LayerGeometry) -> Tensor:
    """Columns of these input channels (within a group) in the full weight matrix, the bias column last."""
    columns = channels[:, None] * geometry.taps + torch.arange(geometry.taps)
    return torch.cat([columns.reshape(-1), torch.tensor([geometry.columns])])


def unit_of_channel(slot: Slot, channels: int) -> Tensor:
    """int64[channels]: unit of each channel on this side, -1 for channels of other groups."""
    units = torch.full((channels,), -1, dtype=torch.int64)
    index = torch.from_numpy(slot.index)
    units[index.reshape(-1)] = torch.arange(len(index)).repeat_interleave(index.shape[1])
    return units


def near_consumers(group: ChannelGroup, layers: Mapping[str, Layer]) -> list[Slot]:
    """The consumers that a group is scored on, in execution order: the first and a bounded number of those further
    down.
    """
    order = {name: number for number, name in enumerate(layers)}
    slots = [slot for slot in group.consumers if slot.layer in order]
    return sorted(slots, key=lambda slot: order[slot.layer])[: 1 + MAX_FAR_CONSUMERS]


def first_consumers(groups: tuple[ChannelGroup, ...], layers: Mapping[str, Layer]) -> dict[str, list[ChannelGroup]]:
    """Layer name -> groups that it is the first to read."""
    first: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        slots = near_consumers(group, layers)
        if slots:
            first.setdefault(slots[0].layer, []).append(group)
    return first
