"""`lpsn.dense` on CPUs: the convolution kernel with the batch in the place of the pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.conv_template import convolution_template
from lpsn_tvm.schedules.llvm.dot import BLOCK, quad_of
from lpsn_tvm.schedules.llvm.geometry import Geometry
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.tiles import Tile
from lpsn_tvm.schedules.llvm.weights import pack_weight, parameters, per_channel


def dense(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `quant.dense` with a constant weight and a two-dimensional input."""
    if "weight" not in constants or inputs[0].dtype not in ("uint8", "int8") or len(inputs[0].shape) != 2:
        return None
    weight = np.ascontiguousarray(constants["weight"].T)[:, :, None, None]
    data = inputs[0]
    batch, features = data.shape
    if data.block != BLOCK and (data.block or features % BLOCK):
        data = data.with_block(BLOCK)
    units, in_blocks = weight.shape[0], -(-features // BLOCK)
    out = TensorSpec((batch, units), str(attrs.get("out_dtype", "uint8")), BLOCK)
    row, out_row = in_blocks * BLOCK, out.blocks * BLOCK
    geometry = Geometry(
        in_shape=data.memory_shape,
        in_dtype=data.dtype,
        batch=1,
        in_blocks=in_blocks,
        in_block=BLOCK,
        in_size=(1, batch),
        in_strides=(0, BLOCK, 0, row),
        pads=(0, 0, 0, 0),
        out_shape=out.memory_shape,
        out_dtype=out.dtype,
        out_blocks=out.blocks,
        out_size=(1, batch),
        out_strides=(0, BLOCK, 0, out_row),
        reduce_blocks=in_blocks,
        kernel=(1, 1),
        strides=(1, 1),
        dilation=(1, 1),
        quad=quad_of(isa, data.dtype),
        has_residual=len(inputs) == 2,
        tile=Tile(1, 1, 1),
    )
    packed = (
        pack_weight(weight, 1, in_blocks, BLOCK, geometry.quad),
        per_channel(constants["bias"], "int32", units),
        per_channel(constants["scale"], "float32", units),
        *parameters(attrs),
    )
    wanted = (data, out) if len(inputs) == 2 else (data,)
    return convolution_template("dense_int8", geometry, isa, packed, out, wanted).kernel()
