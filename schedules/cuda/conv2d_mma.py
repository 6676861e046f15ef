"""`lpsn.conv2d` on tensor cores: any kernel, stride, dilation, padding and groups of at least 32 channels' worth of
products.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from lpsn_tvm.schedules.cuda.conv_template import ConvLayer
from lpsn_tvm.schedules.cuda.dense_dp4a import MOST_ROWS, few_rows
from lpsn_tvm.schedules.cuda.epilogue import has_table
from lpsn_tvm.schedules.cuda.geometry import ConvGeometry, Tile, reduction
from lpsn_tvm.schedules.cuda.isa import BLOCK, CudaIsa
from lpsn_tvm.schedules.cuda.narrow_inputs import rearrange
from lpsn_tvm.schedules.cuda.plain_output import plain_output
from lpsn_tvm.schedules.cuda.weights import input_bits, input_block, nibble_shift
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec


def conv2d(
    inputs: tuple[TensorSpec, ...],
    constants: Mapping[str, Array],
    attrs: Mapping[str, Any],
    isa: CudaIsa,
    tile: Tile | None = None,
) -> Kernel | None:
    """Kernel of `quant.conv2d` with a constant weight; `tile` overrides the choice.

    The input is wanted in blocks of 32 channels, or of 4, 8 or 16 where all channels fit. Weights that fit 4 bits
    (times a common power of two) are stored in 4.
    """
    if "weight" not in constants or inputs[0].dtype not in ("uint8", "int8"):
        return None
    weight, data = constants["weight"], inputs[0]
    batch, channels, height, width = data.shape
    kh, kw = weight.shape[2:]
    groups = int(attrs.get("groups", 1))
    if groups > 1 and groups == channels == weight.shape[0]:
        return None
    # What is blocked already is not copied for the sake of fewer zeros.
    data = data.with_block(input_block(channels) if groups == 1 and data.block != BLOCK else BLOCK)
    strides, dilation = tuple(attrs["strides"]), tuple(attrs.get("dilation", (1, 1)))
    top, left, bottom, right = attrs["padding"]
    oh = (height + top + bottom - dilation[0] * (kh - 1) - 1) // strides[0] + 1
    ow = (width + left + right - dilation[1] * (kw - 1) - 1) // strides[1] + 1
    out = TensorSpec((batch, weight.shape[0], oh, ow), str(attrs.get("out_dtype", "uint8")), BLOCK)
    if not is_supported(inputs, out):
        return None
    if tile is None and is_dense(data, weight, attrs) and int(attrs.get("block_size", 1)) == 1:
        data = data.with_block(BLOCK)
        return few_rows((data, out), weight[:, :, 0, 0], constants, attrs, isa, has_residual=len(inputs) == 2)
    blocks, group = reduction(weight.shape[0], groups, weight.shape[1], data.blocks, BLOCK)
    shift = nibble_shift(weight)
    plain = plain_output(out, attrs)
    geometry = ConvGeometry(
        batch=batch,
        in_blocks=data.blocks,
        in_block=data.block,
        in_size=(height, width),
        out_size=(oh, ow),
        in_dtype=data.dtype,
        out_dtype=out.dtype,
        out_blocks=out.blocks,
        kernel=(kh, kw),
        strides=(strides[0], strides[1]),
        dilation=(dilation[0], dilation[1]),
        pads=(top, left, bottom, right),
        reduce_blocks=blocks,
        group=group,
        has_residual=len(inputs) == 2,
        has_table=has_table(attrs),
        weight_bits=8 if shift is None else 4,
        in_bits=input_bits(data, attrs, isa),
        tile=Tile(64, 32, 2, 1),
        plain=plain,
    )
    if data.block < BLOCK:
        weight, geometry = rearrange(weight, geometry)
        constants = {**constants, "weight": weight}
    out = out if plain is None else plain.spec
    layer = ConvLayer("conv2d_mma", geometry, isa, constants, attrs, data, out, shift or 0, groups)
    return layer.kernel(tile) if tile else layer.template().kernel()


def is_dense(data: TensorSpec, weight: Array, attrs: Mapping[str, Any]) -> bool:
    """Whether a convolution is a dense layer of few samples (squeeze and excitation)."""
    is_pixel = data.shape[2:] == (1, 1) == weight.shape[2:]
    return is_pixel and data.shape[0] <= MOST_ROWS and attrs.get("groups", 1) == 1 and not any(attrs["padding"])


def is_supported(inputs: tuple[TensorSpec, ...], out: TensorSpec) -> bool:
    """Whether indices fit 32 bits, and a residual is of the output's integer type."""
    sizes = (prod(spec.with_block(BLOCK).memory_shape) for spec in (*inputs, out))
    is_residual_known = len(inputs) == 1 or (out.dtype != "float32" and inputs[1].dtype == out.dtype)
    return is_residual_known and max(sizes) < 2**31
