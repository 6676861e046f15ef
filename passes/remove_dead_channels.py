"""Remove the channels that provably do not matter, without any data.

Before -> After: a unit of a channel group leaves when at every layer that reads it

1. the weight columns are all zero, or
2. its value is the same number for every input (its producers' weights are zero), and that number is zero or reaches
   all output positions alike (no zero padding): what it adds is folded into the reader's bias.

Nothing is approximated; outputs change by float rounding of the folded sums only.
"""

from __future__ import annotations

import numpy as np
import tvm

from lpsn_tvm.graph import Layer, find_layers
from lpsn_tvm.passes.channel_groups import ChannelGroup, ChannelGroups, Mask, Slot, find_channel_groups
from lpsn_tvm.passes.constant_channels import Values, constant_channels, contribution, input_values, used_blocks
from lpsn_tvm.passes.remove_channels import remove_channels


def dead_units(mod: tvm.IRModule, groups: ChannelGroups | None = None) -> dict[str, Mask]:
    """Units that can leave without changing the outputs: group name -> bool[size], True = dead.

    Groups without any are left out. A group whose units are all dead keeps its first one: no layer may vanish.
    """
    groups = groups or find_channel_groups(mod)
    return _find(groups, find_layers(mod), constant_channels(mod))


def remove_dead_channels(mod: tvm.IRModule) -> tvm.IRModule:
    """A canonical module without dead channels; repeated, because removal can make other channels dead."""
    while True:
        groups, layers = find_channel_groups(mod), find_layers(mod)
        known = constant_channels(mod)
        dead = _find(groups, layers, known)
        if not dead:
            return mod
        params = {
            name: (layers[name].weight, (layers[name].bias + delta).astype(np.float32))
            for name, delta in _folded(groups, layers, known, dead).items()
        }
        mod = remove_channels(mod, {name: ~mask for name, mask in dead.items()}, params)


def _find(groups: ChannelGroups, layers: dict[str, Layer], known: dict[str, Values]) -> dict[str, Mask]:
    dead = {group.name: _dead_in(group, layers, known) for group in groups.groups}
    return {name: mask for name, mask in dead.items() if mask.any()}


def _dead_in(group: ChannelGroup, layers: dict[str, Layer], known: dict[str, Values]) -> Mask:
    dead = np.ones(group.size, bool)
    for slot in group.consumers:
        layer = layers[slot.layer]
        harmless = ~used_blocks(layer).any(axis=1).reshape(-1) | ~np.isnan(input_values(layer, known[layer.data]))
        dead &= harmless[slot.index].all(axis=1)
    if dead.all():
        dead[0] = False
    return dead


def _folded(
    groups: ChannelGroups, layers: dict[str, Layer], known: dict[str, Values], dead: dict[str, Mask]
) -> dict[str, Values]:
    """Layer -> float64[C]: what its dead input channels add to its output."""
    folded: dict[str, Values] = {}
    for name, mask in dead.items():
        for slot in groups[name].consumers:
            delta = _contribution(layers[slot.layer], slot, mask, known)
            if delta.any():
                folded[slot.layer] = folded.get(slot.layer, 0.0) + delta
    return folded


def _contribution(layer: Layer, slot: Slot, dead: Mask, known: dict[str, Values]) -> Values:
    values = np.nan_to_num(input_values(layer, known[layer.data]))
    chosen = np.zeros(len(values), bool)
    chosen[slot.index[dead].reshape(-1)] = True
    return contribution(layer, np.where(chosen, values, 0.0))
