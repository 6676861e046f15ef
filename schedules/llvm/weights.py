"""Packing of layer constants into the layouts that the integer kernels read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.schedules.llvm.dot import BLOCK
from lpsn_tvm.schedules.llvm.tir import MAGIC_BITS

Array = npt.NDArray[Any]


def input_block(channels: int) -> int:
    """Channel block of a network input: 4, 8 or 16, so that three colours cost one quad of products per pixel."""
    return 4 if channels <= 4 else 8 if channels <= 8 else 16


def reduction(
    out_channels: int, groups: int, in_per_group: int, in_blocks: int, in_block: int
) -> tuple[int, tuple[int, int] | None]:
    """How many input blocks an output block reads, and the group sizes (output, input) if it does not read all from 0
    on.
    """
    if groups == 1:
        return in_blocks, None
    out_per = out_channels // groups
    spans = []
    for first in range(0, out_channels, BLOCK):
        last = min(first + BLOCK, out_channels) - 1
        spans.append(
            (first // out_per * in_per_group // in_block, -(-(last // out_per + 1) * in_per_group // in_block))
        )
    return max(end - begin for begin, end in spans), (out_per, in_per_group)


def pack_weight(weight: Array, groups: int, in_blocks: int, in_block: int, quad: int) -> Array:
    """int8[O, C/groups, kh, kw] -> [O/16, reduced blocks, kh, kw, in_block/quad, 16, quad]; absent channels and other
    groups are zero.
    """
    out_channels, in_per_group, kh, kw = weight.shape
    blocks, group = reduction(out_channels, groups, in_per_group, in_blocks, in_block)
    out_blocks = -(-out_channels // BLOCK)
    full = np.zeros((out_blocks * BLOCK, blocks * in_block, kh, kw), np.int16 if quad == 2 else np.int8)
    if group is None:
        full[:out_channels, :in_per_group] = weight
    else:
        out_per = out_channels // groups
        for o in range(out_channels):
            first = min((o // BLOCK * BLOCK) // out_per * in_per_group // in_block, in_blocks - blocks)
            begin = o // out_per * in_per_group - first * in_block
            full[o, begin : begin + in_per_group] = weight[o]
    split = full.reshape(out_blocks, BLOCK, blocks, in_block // quad, quad, kh, kw)
    return np.ascontiguousarray(split.transpose(0, 2, 5, 6, 3, 1, 4))


def per_channel(values: Array, dtype: str, channels: int) -> Array:
    """One value (or one per channel) -> [ceil(C/16), 16], zero beyond C."""
    out = np.zeros(-(-channels // BLOCK) * BLOCK, dtype)
    out[:channels] = np.broadcast_to(np.asarray(values).reshape(-1), (channels,))
    return out.reshape(-1, BLOCK)


def parameters(attrs: Mapping[str, Any]) -> tuple[Array, Array]:
    """The float and integer parameter tensors of an integer kernel (see `conv_core.convolution`)."""
    zero_point = int(attrs.get("out_zero_point", 0))
    qmin, qmax = int(attrs.get("qmin", 0)), int(attrs.get("qmax", 255))
    floats = [qmin - zero_point, qmax - zero_point, float(attrs.get("residual_multiplier", 0.0)), 0.0]
    integers = [int(attrs.get("x_zero_point", 0)), zero_point - MAGIC_BITS, int(attrs.get("residual_zero_point", 0)), 0]
    return np.array(floats, np.float32), np.array(integers, np.int32)
