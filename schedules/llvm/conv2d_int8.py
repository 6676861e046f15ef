"""`lpsn.conv2d` on CPUs: any kernel, stride, dilation, padding and groups; 1x1 flattens the map; depthwise has its own
kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.conv_template import convolution_template
from lpsn_tvm.schedules.llvm.dot import BLOCK, quad_of
from lpsn_tvm.schedules.llvm.geometry import Geometry
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.tiles import Tile
from lpsn_tvm.schedules.llvm.weights import input_block, pack_weight, parameters, per_channel, reduction


def conv2d(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `quant.conv2d` with a constant weight."""
    if "weight" not in constants or inputs[0].dtype not in ("uint8", "int8"):
        return None
    weight, groups = constants["weight"], int(attrs.get("groups", 1))
    data = inputs[0]
    if data.block % 4 or data.block == 0:
        data = data.with_block(input_block(data.shape[1]))
    geometry, out = _geometry(data, weight, attrs, len(inputs) == 2, isa)
    floats, integers = parameters(attrs)
    channels = weight.shape[0]
    packed = (
        pack_weight(weight, groups, geometry.in_blocks, geometry.in_block, geometry.quad),
        per_channel(constants["bias"], "int32", channels),
        per_channel(constants["scale"], "float32", channels),
        floats,
        integers,
    )
    wanted = (data, out) if len(inputs) == 2 else (data,)
    most = _shared_blocks(out.blocks, geometry.group)
    return convolution_template("conv2d_int8", geometry, isa, packed, out, wanted, most).kernel()


def _geometry(
    data: TensorSpec, weight: Array, attrs: Mapping[str, Any], has_residual: bool, isa: Isa
) -> tuple[Geometry, TensorSpec]:
    batch, _, height, width = data.shape
    out_channels, in_per_group, kh, kw = weight.shape
    groups = int(attrs.get("groups", 1))
    strides, dilation = tuple(attrs["strides"]), tuple(attrs.get("dilation", (1, 1)))
    top, left, bottom, right = attrs["padding"]
    oh = (height + top + bottom - dilation[0] * (kh - 1) - 1) // strides[0] + 1
    ow = (width + left + right - dilation[1] * (kw - 1) - 1) // strides[1] + 1
    out = TensorSpec((batch, out_channels, oh, ow), str(attrs.get("out_dtype", "uint8")), BLOCK)
    size, out_size, b = (height, width), (oh, ow), data.block
    quad = quad_of(isa, data.dtype)
    if (kh, kw) == (1, 1) and strides == (1, 1) and not any((top, left, bottom, right)):
        size, out_size = (1, height * width), (1, oh * ow)
    blocks, group = reduction(out_channels, groups, in_per_group, data.blocks, b)
    return Geometry(
        in_shape=data.memory_shape,
        in_dtype=data.dtype,
        batch=batch,
        in_blocks=data.blocks,
        in_block=b,
        in_size=size,
        in_strides=(data.blocks * size[0] * size[1] * b, size[0] * size[1] * b, size[1] * b, b),
        pads=(top, left, bottom, right),
        out_shape=out.memory_shape,
        out_dtype=out.dtype,
        out_blocks=out.blocks,
        out_size=out_size,
        out_strides=(out.blocks * oh * ow * BLOCK, oh * ow * BLOCK, out_size[1] * BLOCK, BLOCK),
        reduce_blocks=blocks,
        kernel=(kh, kw),
        strides=(strides[0], strides[1]),
        dilation=(dilation[0], dilation[1]),
        quad=quad,
        has_residual=has_residual,
        group=group,
        tile=Tile(1, 1, 1),
    ), out


def _shared_blocks(blocks: int, group: tuple[int, int] | None) -> int:
    """Output blocks that may share a tile: they must read the same input blocks."""
    if group is None:
        return 16
    return max((d for d in range(1, 17) if blocks % d == 0 and group[0] % (d * BLOCK) == 0), default=1)
