"""Packing of layer constants into the order in which tensor-core kernels read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lpsn_tvm.schedules.cuda.conv2d_dp4a import pack_words
from lpsn_tvm.schedules.cuda.geometry import KSTEP, ConvGeometry, first_block
from lpsn_tvm.schedules.cuda.isa import BLOCK, WARP, CudaIsa
from lpsn_tvm.schedules.kernel import TensorSpec

Array = npt.NDArray[Any]


def input_block(channels: int) -> int:
    """Channel block of the input: 4, 8 or 16 where all fit, so that three colours cost no 32 channels of zeros."""
    return next(block for block in (4, 8, 16, BLOCK) if channels <= block or block == BLOCK)


def pack_weight(weight: Array, geometry: ConvGeometry) -> Array:
    """int8[O, C/groups, kh, kw] -> uint8 or int8[packed blocks, packed k-steps, bytes]: fragments of the B operand.

    A k-step of 32 output channels holds eight 32-bit registers per lane: register 2j + h of lane l holds the bytes
    k = 16h + l%4*4 .. +3 of column l/4 of tile j. Column g of tile j is output channel g/2*8 + 2j + g%2, so that the
    lane that holds columns 2q and 2q+1 of the results of all four tiles holds channels 8q .. 8q+7. With 4 bits, word w
    of a lane holds register 2w in the low nibbles and 2w + 1 in the high ones; where products are of 4 bits, a register
    of two k-steps holds the first in the low nibbles and the second in the high ones, as `PACK_NIBBLES` packs pixels.
    """
    steps = _ksteps(weight, geometry)
    if geometry.uses_dots:
        return pack_words(steps, geometry)
    register, lane, byte = np.ogrid[:8, :WARP, :4]
    tile, half, column = register // 2, register % 2, lane // 4
    channel = column // 2 * 8 + tile * 2 + column % 2
    fragments = steps[:, :, channel, 16 * half + lane % 4 * 4 + byte]
    if geometry.weight_bits == 8:
        return _in_halves(fragments).reshape(geometry.weight_shape)
    nibbles = fragments.view(np.uint8) & 15
    if geometry.multiplies_nibbles:
        return _in_halves(nibbles[:, 0::2] | nibbles[:, 1::2] << 4).reshape(geometry.weight_shape)
    words = nibbles[:, :, 0::2] | nibbles[:, :, 1::2] << 4
    return np.ascontiguousarray(words.transpose(0, 1, 3, 2, 4)).reshape(geometry.weight_shape)


def _in_halves(fragments: Array) -> Array:
    """[blocks, k-steps, 8 registers, lanes, 4 bytes] -> four registers of every lane, then the other four."""
    blocks, steps = fragments.shape[:2]
    halves = fragments.reshape(blocks, steps, 2, 4, WARP, 4).transpose(0, 1, 2, 4, 3, 5)
    return np.ascontiguousarray(halves)


def _ksteps(weight: Array, geometry: ConvGeometry) -> Array:
    """The filter as int8[packed blocks, packed k-steps, 32 output channels, 32 bytes]; the rest is zero."""
    g = geometry
    out_channels, in_per_group, kh, kw = weight.shape
    full = np.zeros((g.packed_blocks * BLOCK, g.reduce_blocks * g.in_block, kh, kw), np.int8)
    if g.group is None:
        full[:out_channels, :in_per_group] = weight
    else:
        for o in range(out_channels):
            begin = o // g.group[0] * in_per_group - first_block(g, o // g.tile.columns) * BLOCK
            full[o, begin : begin + in_per_group] = weight[o]
    split = full.reshape(g.packed_blocks, BLOCK, g.reduce_blocks, g.in_block, kh, kw)
    flat = split.transpose(0, 1, 2, 4, 5, 3).reshape(g.packed_blocks, BLOCK, -1)
    padded = np.zeros((g.packed_blocks, BLOCK, g.packed_ksteps * KSTEP), np.int8)
    padded[:, :, : flat.shape[2]] = flat
    steps = padded.reshape(g.packed_blocks, BLOCK, g.packed_ksteps, KSTEP)
    return np.ascontiguousarray(steps.transpose(0, 2, 1, 3))


def per_channel(values: Array, dtype: str, channels: int, blocks: int) -> Array:
    """One value (or one per channel) -> [blocks, 32], zero beyond C."""
    out = np.zeros(blocks * BLOCK, dtype)
    out[:channels] = np.broadcast_to(np.asarray(values).reshape(-1), (channels,))
    return out.reshape(-1, BLOCK)


def parameters(attrs: Mapping[str, Any], in_dtype: str, shift: int) -> tuple[Array, Array, Array]:
    """float32[4]: low, high, residual multiplier; int32[4]: output's zero point, residual's, left shift of 4-bit
    sums; and 32 bytes of padding.
    """
    zero_point = int(attrs.get("out_zero_point", 0))
    low, high = int(attrs.get("qmin", 0)) - zero_point, int(attrs.get("qmax", 255)) - zero_point
    floats = np.array([low, high, float(attrs.get("residual_multiplier", 0.0)), 0.0], np.float32)
    integers = np.array([zero_point, int(attrs.get("residual_zero_point", 0)), shift, 0], np.int32)
    padding = np.full(KSTEP, int(attrs.get("x_zero_point", 0)), in_dtype)
    return floats, integers, padding


def input_bits(data: TensorSpec, attrs: Mapping[str, Any], isa: CudaIsa) -> int:
    """4 where every input, and what padding holds, is an unsigned 4-bit integer and `isa` multiplies those; else 8."""
    largest = max(int(attrs.get("x_qmax", 255)), int(attrs.get("x_zero_point", 0)))
    return 4 if isa.has_mma_s4 and data.dtype == "uint8" and largest < 16 else 8


def nibble_shift(weight: Array) -> int | None:
    """K where every weight is a 4-bit integer times 2**k and sums of 16-fold products fit int32; None otherwise."""
    union = int(np.bitwise_or.reduce(weight.reshape(-1).astype(np.int32), initial=0))
    shift = (union & -union).bit_length() - 1 if union else 0
    small = weight.astype(np.int32) >> shift
    if small.size == 0 or small.min() < -8 or small.max() > 7:
        return None
    worst = int(np.abs(small).reshape(weight.shape[0], -1).sum(axis=1).max()) * 255 * 16
    return shift if worst < 2**31 else None
