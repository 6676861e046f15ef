"""Which input channels a block of 16 output channels reads, and the weight packed for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lpsn_tvm.schedules.kernel import Array
from lpsn_tvm.schedules.llvm.views import LANES


@dataclass(frozen=True)
class ChannelReads:
    """Block `o` of output channels reads the input channels `first[o] .. first[o] + span`.

    Groups whose size is no multiple of 16 share a block: it then reads all their input channels, with zero weights
    where a lane's group does not.

    Parameters
    ----------
    first : tuple of int
        One entry per output block.
    span : int
        Input channels of a reduction.
    inner : int
        Channels of the innermost reduction loop: the largest power of two up to 16 that divides `span`.
    per_group : int or None
        Output blocks that share their input channels, if `first[o] == o // per_group * span`; None where only the table
        tells.
    """

    first: tuple[int, ...]
    span: int
    inner: int
    per_group: int | None


def channel_reads(in_channels: int, out_channels: int, groups: int) -> ChannelReads:
    """The reads of a grouped layer, blocks of 16 output channels."""
    group_in, group_out = in_channels // groups, out_channels // groups
    starts, ends = [], []
    for block in range(-(-out_channels // LANES)):
        last = min(out_channels, (block + 1) * LANES) - 1
        starts.append(block * LANES // group_out * group_in)
        ends.append((last // group_out + 1) * group_in)
    span = max(end - start for start, end in zip(starts, ends, strict=True))
    first = tuple(min(start, in_channels - span) for start in starts)
    inner = LANES
    while span % inner:
        inner //= 2
    per_group = group_out // LANES if group_out % LANES == 0 else (len(first) if groups == 1 else None)
    return ChannelReads(first, span, inner, per_group)


def pack_weight(weight: Array, reads: ChannelReads, groups: int) -> Array:
    """OIHW float32[O, C/groups, kh, kw] -> float32[O blocks, span / inner, kh, kw, inner, 16]; absent channels are
    zero.
    """
    out_channels, group_in, kh, kw = weight.shape
    blocks, span, inner = len(reads.first), reads.span, reads.inner
    full = np.zeros((blocks * LANES, span, kh, kw), np.float32)
    if groups == 1:
        full[:out_channels] = weight
    else:
        group_out = out_channels // groups
        for channel in range(out_channels):
            start = channel // group_out * group_in - reads.first[channel // LANES]
            full[channel, start : start + group_in] = weight[channel]
    split = full.reshape(blocks, LANES, span // inner, inner, kh, kw)
    return np.ascontiguousarray(split.transpose(0, 2, 4, 5, 3, 1))


def pack_channels(values: Array, out_channels: int) -> Array:
    """float32[O] -> float32[O blocks, 16], zero beyond O."""
    blocks = -(-out_channels // LANES)
    packed = np.zeros(blocks * LANES, np.float32)
    packed[:out_channels] = values.reshape(-1)
    return packed.reshape(blocks, LANES)
