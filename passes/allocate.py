"""Non-uniform allocation: the MACs that a uniform fraction would leave, spent where the output error is least.

Every group alone is pruned at six levels on the dense network, its consumers re-solved, and the error of the
network's outputs measured. Then channels go
where they cost the least error per MAC, until the MACs of the uniform allocation are reached. Errors of different
groups are taken to add up.

Source: a study for this project (README, "Numbers").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lpsn_tvm.graph import Layer
from lpsn_tvm.interpreter import TorchInterpreter
from lpsn_tvm.passes.channel_groups import ChannelGroup

LEVELS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.875)
MEASURE_SAMPLES = 128

Patch = Mapping[str, tuple[Tensor, Tensor]]


def total_macs(layers: Mapping[str, Layer], groups: Iterable[ChannelGroup], kept: Mapping[str, int]) -> float:
    """MACs of the network with `kept` units of every group (which ones does not matter)."""
    gone_in = dict.fromkeys(layers, 0)
    gone_out = dict.fromkeys(layers, 0)
    followers: set[str] = set()
    for group in groups:
        gone = group.size - kept[group.name]
        for slot in group.consumers:
            if slot.layer in layers:
                gone_in[slot.layer] += gone * slot.index.shape[1]
        for slot in group.producers:
            if slot.layer in layers:
                gone_out[slot.layer] += gone * slot.index.shape[1]
        for follower in group.followers:
            if follower.layer in layers:
                gone_out[follower.layer] += gone * follower.written.shape[1]
                followers.add(follower.layer)
    return sum(
        layer.macs
        * (1 - gone_out[name] / layer.out_channels)
        * (1.0 if name in followers else 1 - gone_in[name] / layer.in_channels)
        for name, layer in layers.items()
    )


def output_error(
    interpreter: TorchInterpreter,
    patch: Patch,
    feeds: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Tensor]],
) -> float:
    """Relative squared error of the outputs with the parameters of `patch`; the interpreter is left as it was."""
    before = {name: interpreter.params[name] for name in patch}
    interpreter.params.update(patch)
    try:
        error = spread = 0.0
        for feed, target in zip(feeds, targets, strict=True):
            for name, value in interpreter.run(feed).items():
                error += float((value - target[name]).double().square().sum())
                centred = target[name].double() - target[name].double().mean(dim=0, keepdim=True)
                spread += float(centred.square().sum())
    finally:
        interpreter.params.update(before)
    return error / max(spread, 1e-30)


def allocate(
    layers: Mapping[str, Layer],
    groups: Sequence[ChannelGroup],
    uniform: Mapping[str, int],
    round_up: Callable[[ChannelGroup, int], int],
    measure: Callable[[ChannelGroup, Sequence[int]], list[float]],
) -> dict[str, int]:
    """Units to keep of every group: at most the MACs of `uniform`, least measured error.

    Parameters
    ----------
    layers : mapping of name to Layer
        All weighted layers.
    groups : sequence of ChannelGroup
        Those that may lose channels.
    uniform : mapping of group name to units
        What the uniform fraction keeps.
    round_up : callable (group, kept) -> kept
        To whole tiles.
    measure : callable (group, kept counts) -> errors
        Output error of the network with only this group pruned, at every count.
    """
    target = total_macs(layers, groups, uniform)
    curves: dict[str, list[tuple[int, float]]] = {}
    for group in groups:
        counts = sorted({round_up(group, max(1, round(group.size * (1 - level)))) for level in LEVELS} - {group.size})
        counts.reverse()
        errors = measure(group, counts)
        curves[group.name] = list(zip(counts, errors, strict=True))
    kept = {group.name: group.size for group in groups}
    spent = dict.fromkeys(kept, 0.0)
    macs = total_macs(layers, groups, kept)
    while macs > target:
        best: tuple[float, str, int, float, float] | None = None
        for name, curve in curves.items():
            for count, error in curve:
                if count >= kept[name]:
                    continue
                left = total_macs(layers, groups, {**kept, name: count})
                ratio = max(error - spent[name], 1e-12) / max(macs - left, 1e-9)
                if best is None or ratio < best[0]:
                    best = (ratio, name, count, error, left)
        if best is None:
            break
        _, name, count, error, left = best
        if left < target:  # the last move goes only as far as it must
            group = next(group for group in groups if group.name == name)
            count = _just_enough(layers, groups, kept, group, count, target, round_up)
            left = total_macs(layers, groups, {**kept, name: count})
        kept[name], spent[name], macs = count, error, left
    return kept


def _just_enough(
    layers: Mapping[str, Layer],
    groups: Sequence[ChannelGroup],
    kept: Mapping[str, int],
    group: ChannelGroup,
    lowest: int,
    target: float,
    round_up: Callable[[ChannelGroup, int], int],
) -> int:
    """The largest count of one group, at least `lowest`, that reaches the target."""
    for count in range(kept[group.name] - 1, lowest, -1):
        whole = round_up(group, count)
        if whole == count and total_macs(layers, groups, {**kept, group.name: count}) <= target:
            return count
    return lowest
