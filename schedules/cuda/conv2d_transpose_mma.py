"""`lpsn.conv2d_transpose` on tensor cores: every position within a stride is a convolution of its own over the same
input; their output channels stand side by side, and results are written interleaved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lpsn_tvm.schedules.cuda.conv2d_mma import is_supported
from lpsn_tvm.schedules.cuda.conv_template import ConvLayer
from lpsn_tvm.schedules.cuda.epilogue import has_table
from lpsn_tvm.schedules.cuda.geometry import ConvGeometry, Interleave, Tile
from lpsn_tvm.schedules.cuda.isa import BLOCK, CudaIsa
from lpsn_tvm.schedules.cuda.narrow_inputs import rearrange
from lpsn_tvm.schedules.cuda.plain_output import plain_output
from lpsn_tvm.schedules.cuda.weights import input_bits, input_block, nibble_shift
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec


def conv2d_transpose(
    inputs: tuple[TensorSpec, ...],
    constants: Mapping[str, Array],
    attrs: Mapping[str, Any],
    isa: CudaIsa,
    tile: Tile | None = None,
) -> Kernel | None:
    """Kernel of `quant.conv2d_transpose` without groups and dilation; `tile` overrides the choice."""
    if "weight" not in constants or inputs[0].dtype not in ("uint8", "int8") or len(inputs) != 1:
        return None
    if int(attrs.get("groups", 1)) != 1 or tuple(attrs.get("dilation", (1, 1))) != (1, 1):
        return None
    weight, data = constants["weight"], inputs[0]
    batch, channels, height, width = data.shape
    (sy, sx), (top, left, bottom, right) = attrs["strides"], attrs["padding"]
    extra = attrs.get("output_padding", (0, 0))
    out_channels, kh, kw = weight.shape[1:]
    oh = (height - 1) * sy + kh + extra[0] - top - bottom
    ow = (width - 1) * sx + kw + extra[1] - left - right
    data = data if data.block == BLOCK else data.with_block(input_block(channels))
    out = TensorSpec((batch, out_channels, oh, ow), str(attrs.get("out_dtype", "uint8")), BLOCK)
    if not is_supported(inputs, out):
        return None
    taps = (-(-kh // sy), -(-kw // sx))
    phased = phased_constants(constants, (sy, sx), out.blocks, int(attrs.get("x_zero_point", 0)))
    shift = nibble_shift(phased["weight"])
    plain = plain_output(out, attrs)
    geometry = ConvGeometry(
        batch=batch,
        in_blocks=data.blocks,
        in_block=data.block,
        in_size=(height, width),
        # Windows that begin before the image too: cropping decides what is written.
        out_size=(-(-(oh + top) // sy), -(-(ow + left) // sx)),
        in_dtype=data.dtype,
        out_dtype=out.dtype,
        out_blocks=out.blocks * sy * sx,
        kernel=taps,
        strides=(1, 1),
        dilation=(1, 1),
        pads=(taps[0] - 1, taps[1] - 1, taps[0] - 1 + extra[0], taps[1] - 1 + extra[1]),
        reduce_blocks=data.blocks,
        group=None,
        has_residual=False,
        has_table=has_table(attrs),
        weight_bits=8 if shift is None else 4,
        in_bits=input_bits(data, attrs, isa),
        tile=Tile(64, 32, 2, 1),
        plain=plain,
        interleave=Interleave((sy, sx), (top, left), (oh, ow)),
    )
    if data.block < BLOCK:
        phased["weight"], geometry = rearrange(phased["weight"], geometry)
    out = out if plain is None else plain.spec
    layer = ConvLayer("conv2d_transpose_mma", geometry, isa, phased, attrs, data, out, shift or 0)
    return layer.kernel(tile) if tile else layer.template().kernel()


def phased_constants(
    constants: Mapping[str, Array], strides: tuple[int, int], blocks: int, zero_point: int
) -> dict[str, Array]:
    """Weight, bias and scale of the convolutions side by side: [strides y * x * blocks * 32 output channels, ...].

    Output position (y, x) of the uncropped result is position (y % sy, x % sx) of window (y // sy, x // sx); it meets
    filter tap (y % sy + sy * t, ...) at input row y // sy - t. Padding holds the zero point, so each position's bias
    takes its own share off.
    """
    weight, (sy, sx) = constants["weight"], strides
    channels, out_channels, kh, kw = weight.shape
    taps = (-(-kh // sy), -(-kw // sx))
    filled = np.zeros((channels, blocks * BLOCK, taps[0] * sy, taps[1] * sx), np.int8)
    filled[:, :out_channels, :kh, :kw] = weight
    split = filled.reshape(channels, blocks * BLOCK, taps[0], sy, taps[1], sx)[:, :, ::-1, :, ::-1]
    phases = np.ascontiguousarray(split.transpose(3, 5, 1, 0, 2, 4)).reshape(-1, channels, *taps)
    full = {}
    for name, dtype in (("bias", np.int32), ("scale", np.float32)):
        one = np.zeros(blocks * BLOCK, dtype)
        one[:out_channels] = np.broadcast_to(constants[name].reshape(-1), (out_channels,))
        full[name] = np.tile(one, sy * sx)
    offset = phases.reshape(len(phases), -1).sum(axis=1, dtype=np.int32) * np.int32(zero_point)
    return {"weight": phases, "bias": full["bias"] - offset, "scale": full["scale"]}
