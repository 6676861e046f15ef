"""`lpsn.dense` on tensor cores: a convolution of one pixel per sample; few samples have a kernel of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lpsn_tvm.schedules.cuda.conv2d_mma import is_supported
from lpsn_tvm.schedules.cuda.conv_template import ConvLayer
from lpsn_tvm.schedules.cuda.dense_dp4a import MOST_ROWS, few_rows
from lpsn_tvm.schedules.cuda.epilogue import has_table
from lpsn_tvm.schedules.cuda.geometry import ConvGeometry, Tile
from lpsn_tvm.schedules.cuda.isa import BLOCK, CudaIsa
from lpsn_tvm.schedules.cuda.plain_output import plain_output
from lpsn_tvm.schedules.cuda.weights import input_bits, nibble_shift
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec


def dense(
    inputs: tuple[TensorSpec, ...],
    constants: Mapping[str, Array],
    attrs: Mapping[str, Any],
    isa: CudaIsa,
    tile: Tile | None = None,
) -> Kernel | None:
    """Kernel of `quant.dense` with a constant weight and a two-dimensional input; `tile` overrides the choice."""
    if "weight" not in constants or inputs[0].dtype not in ("uint8", "int8") or len(inputs[0].shape) != 2:
        return None
    weight = np.ascontiguousarray(constants["weight"].T)[:, :, None, None]
    data = inputs[0].with_block(BLOCK)
    out = TensorSpec((data.shape[0], weight.shape[0]), str(attrs.get("out_dtype", "uint8")), BLOCK)
    if not is_supported(inputs, out):
        return None
    if tile is None and data.shape[0] <= MOST_ROWS:
        return few_rows((data, out), weight[:, :, 0, 0], constants, attrs, isa, has_residual=len(inputs) == 2)
    shift = nibble_shift(weight)
    plain = plain_output(out, attrs)
    geometry = ConvGeometry(
        batch=data.shape[0],
        in_blocks=data.blocks,
        in_block=BLOCK,
        in_size=(1, 1),
        out_size=(1, 1),
        in_dtype=data.dtype,
        out_dtype=out.dtype,
        out_blocks=out.blocks,
        kernel=(1, 1),
        strides=(1, 1),
        dilation=(1, 1),
        pads=(0, 0, 0, 0),
        reduce_blocks=data.blocks,
        group=None,
        has_residual=len(inputs) == 2,
        has_table=has_table(attrs),
        weight_bits=8 if shift is None else 4,
        in_bits=input_bits(data, attrs, isa),
        tile=Tile(16, 32, 1, 1),
        plain=plain,
        is_flat=True,
    )
    out = out if plain is None else plain.spec
    given = {**constants, "weight": weight}
    layer = ConvLayer("dense_mma", geometry, isa, given, attrs, data, out, shift or 0)
    return layer.kernel(tile) if tile else layer.template().kernel()
