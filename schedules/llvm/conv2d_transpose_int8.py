"""`lpsn.conv2d_transpose` on CPUs: every output phase is a small convolution of its own, so no multiplication by
inserted zeros is done.

Output row Y reads input row y through tap r where Y + top = y * stride + r. For phase p = Y mod stride the taps are
r0, r0 + stride, ... with r0 = (p + top) mod stride, and the j-th of them reads y = Y div stride + (p + top) div stride
- j: an ordinary convolution with its taps reversed. A dilated kernel is first spread out with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.conv_template import convolution_template
from lpsn_tvm.schedules.llvm.dot import BLOCK, quad_of
from lpsn_tvm.schedules.llvm.geometry import Geometry, Phases
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.tiles import Tile
from lpsn_tvm.schedules.llvm.weights import input_block, pack_weight, parameters, per_channel, reduction


def conv2d_transpose(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `quant.conv2d_transpose` with a constant weight."""
    if "weight" not in constants or inputs[0].dtype not in ("uint8", "int8"):
        return None
    data, groups = inputs[0], int(attrs.get("groups", 1))
    if data.block % 4 or data.block == 0:
        data = data.with_block(input_block(data.shape[1]))
    weight = _as_convolution(constants["weight"], groups, tuple(attrs.get("dilation", (1, 1))))
    strides, crop = tuple(attrs["strides"]), tuple(attrs["padding"][:2])
    out = _output(data, weight, attrs)
    geometry = _geometry(data, weight, strides, crop, groups, out, isa)
    packed, bias = _pack_phases(
        weight, constants["bias"], strides, crop, groups, geometry, int(attrs.get("x_zero_point", 0))
    )
    scale = np.tile(per_channel(constants["scale"], "float32", weight.shape[0]), (strides[0] * strides[1], 1))
    arguments = (packed, bias, scale, *parameters(attrs))
    shared = 16 if geometry.group is None else 1
    return convolution_template("conv2d_transpose_int8", geometry, isa, arguments, out, (data,), shared).kernel()


def _as_convolution(weight: Array, groups: int, dilation: tuple[int, ...]) -> Array:
    """int8[C, O/groups, kh, kw] -> int8[O, C/groups, kh', kw'], dilation spelled out; taps not yet reversed."""
    channels, out_per, kh, kw = weight.shape
    spread = np.zeros((channels, out_per, dilation[0] * (kh - 1) + 1, dilation[1] * (kw - 1) + 1), weight.dtype)
    spread[:, :, :: dilation[0], :: dilation[1]] = weight
    grouped = spread.reshape(groups, channels // groups, out_per, *spread.shape[2:]).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(grouped.reshape(groups * out_per, channels // groups, *spread.shape[2:]))


def _output(data: TensorSpec, weight: Array, attrs: Mapping[str, Any]) -> TensorSpec:
    top, left, bottom, right = attrs["padding"]
    extra = attrs.get("output_padding", (0, 0))
    height = (data.shape[2] - 1) * attrs["strides"][0] + weight.shape[2] + extra[0] - top - bottom
    width = (data.shape[3] - 1) * attrs["strides"][1] + weight.shape[3] + extra[1] - left - right
    return TensorSpec((data.shape[0], weight.shape[0], height, width), str(attrs.get("out_dtype", "uint8")), BLOCK)


def _geometry(
    data: TensorSpec,
    weight: Array,
    strides: tuple[int, ...],
    crop: tuple[int, ...],
    groups: int,
    out: TensorSpec,
    isa: Isa,
) -> Geometry:
    batch, _, height, width = data.shape
    b = data.block
    taps = (-(-weight.shape[2] // strides[0]), -(-weight.shape[3] // strides[1]))
    size = (-(-out.shape[2] // strides[0]), -(-out.shape[3] // strides[1]))
    # Input rows that the phases touch: from crop // s - taps + 1 to (s - 1 + crop) // s + size - 1.
    before = tuple(max(0, t - 1 - c // s) for t, c, s in zip(taps, crop, strides, strict=True))
    after = tuple(
        max(0, (s - 1 + c) // s + m - extent)
        for s, c, m, extent in zip(strides, crop, size, (height, width), strict=True)
    )
    blocks, group = reduction(weight.shape[0], groups, weight.shape[1], data.blocks, b)
    phases = Phases((strides[0], strides[1]), (crop[0], crop[1]), (taps[0], taps[1]), (out.shape[2], out.shape[3]))
    return Geometry(
        in_shape=data.memory_shape,
        in_dtype=data.dtype,
        batch=batch,
        in_blocks=data.blocks,
        in_block=b,
        in_size=(height, width),
        in_strides=(data.blocks * height * width * b, height * width * b, width * b, b),
        pads=(before[0], before[1], after[0], after[1]),
        out_shape=out.memory_shape,
        out_dtype=out.dtype,
        out_blocks=out.blocks * strides[0] * strides[1],
        out_size=(size[0], size[1]),
        out_strides=(0, 0, 0, 0),
        reduce_blocks=blocks,
        kernel=taps,
        strides=(1, 1),
        dilation=(1, 1),
        quad=quad_of(isa, data.dtype),
        has_residual=False,
        tile=Tile(1, 1, 1),
        group=group,
        phases=phases,
    )


def _pack_phases(
    weight: Array,
    bias: Array,
    strides: tuple[int, ...],
    crop: tuple[int, ...],
    groups: int,
    g: Geometry,
    zero_point: int,
) -> tuple[Array, Array]:
    """Weights and biases of all phases, one after the other; a phase's bias holds the zero-point term of exactly its
    taps.
    """
    packed, biases = [], []
    th, tw = g.kernel
    for py in range(strides[0]):
        for px in range(strides[1]):
            part = np.zeros((*weight.shape[:2], th, tw), weight.dtype)
            taken = weight[:, :, (py + crop[0]) % strides[0] :: strides[0], (px + crop[1]) % strides[1] :: strides[1]]
            part[:, :, : taken.shape[2], : taken.shape[3]] = taken
            packed.append(pack_weight(part[:, :, ::-1, ::-1], groups, g.in_blocks, g.in_block, g.quad))
            offset = zero_point * part.astype(np.int64).sum(axis=(1, 2, 3))
            biases.append(per_channel((bias.astype(np.int64) - offset).astype(np.int32), "int32", weight.shape[0]))
    return np.concatenate(packed), np.concatenate(biases)
