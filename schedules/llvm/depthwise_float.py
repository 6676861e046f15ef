"""Float depthwise convolution on blocked channels: 16 channels a vector, weights of one block in registers, kernel
positions unrolled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.conv2d_float import PARALLEL_MACS, finished
from lpsn_tvm.schedules.llvm.float_groups import pack_channels
from lpsn_tvm.schedules.llvm.float_template import example_array, workload_of
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.views import LANES
from lpsn_tvm.schedules.template import Config, Template, decode
from lpsn_tvm.schedules.views import View, compute, has_block, placeholder, prim_func

UNROLLED_TAPS = 25
"""Larger kernels keep a loop over their rows."""


@dataclass(frozen=True)
class DepthwiseShape:
    """Everything the code depends on; `padding` is top and left."""

    data: TensorSpec
    out: TensorSpec
    residual: TensorSpec | None
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    low: float
    high: float
    program: str
    columns: int


def depthwise_float(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `lpsn.float_conv2d` with one input and one output channel per group."""
    data, weight = inputs[0], constants.get("weight")
    groups = int(attrs["groups"])
    if data.dtype != "float32" or weight is None or groups == 1 or not groups == data.shape[1] == weight.shape[0]:
        return None
    n, channels, height, width = data.shape
    kh, kw = weight.shape[2:]
    (sh, sw), (dh, dw), (top, left, bottom, right) = attrs["strides"], attrs["dilation"], attrs["padding"]
    oh = (height + top + bottom - dh * (kh - 1) - 1) // sh + 1
    ow = (width + left + right - dw * (kw - 1) - 1) // sw + 1
    shape = DepthwiseShape(
        data.with_block(LANES),
        TensorSpec((n, channels, oh, ow), "float32", LANES),
        inputs[1].with_block(LANES) if len(inputs) > 1 else None,
        (kh, kw),
        (sh, sw),
        (dh, dw),
        (top, left),
        float(attrs["low"]),
        float(attrs["high"]),
        str(attrs.get("program", "")),
        _columns(ow, isa),
    )
    blocks = shape.out.blocks
    taps = np.zeros((blocks * LANES, kh, kw), np.float32)
    taps[:channels] = weight[:, 0]
    packed = np.ascontiguousarray(taps.reshape(blocks, LANES, kh, kw).transpose(0, 2, 3, 1))
    return _template(shape, isa, (packed, pack_channels(constants["bias"], channels))).kernel()


def _template(shape: DepthwiseShape, isa: Isa, packed: tuple[Array, ...]) -> Template:
    """Choice: pixels of a row computed together."""
    read = (shape.data,) if shape.residual is None else (shape.data, shape.residual)
    parts, width = max(1, LANES // isa.float_lanes), shape.out.shape[3]

    def make(config: Config) -> Kernel:
        chosen = replace(shape, columns=int(config["columns"]))
        return Kernel(lambda: build(chosen), packed, shape.out, ("float_depthwise", chosen), read)

    def features(config: Config) -> tuple[float, ...]:
        columns = int(config["columns"])
        taps = shape.kernel[0] * shape.kernel[1]
        return float(columns), columns * parts / isa.registers, math.log2(width / columns), float(taps)

    columns = tuple(c for c in range(1, min(width, isa.registers) + 1) if width % c == 0 and c * parts <= isa.registers)
    workload = workload_of(shape, isa, ("columns",))
    default = {"columns": shape.columns}
    return Template("float_depthwise", workload, {"columns": columns}, default, make, featurizer=features)


def remake(workload: Mapping[str, Any]) -> Template:
    """The template of a workload, with made-up constants."""
    isa = Isa(**workload["isa"])
    shape = decode(DepthwiseShape, {**workload["shape"], "columns": 1})
    blocks, (kh, kw) = shape.out.blocks, shape.kernel
    packed = (example_array((blocks, kh, kw, LANES), (kh * kw) ** -0.5), example_array((blocks, LANES)))
    return _template(replace(shape, columns=_columns(shape.out.shape[3], isa)), isa, packed)


def _columns(width: int, isa: Isa) -> int:
    """Pixels of a row computed together: what registers hold beside the weights, and divides the width if possible."""
    most = max(1, min(width, 8 if isa.registers >= 32 else 4))
    return max((c for c in range(1, most + 1) if width % c == 0), default=1)


def build(shape: DepthwiseShape) -> Any:
    """The scheduled TIR function."""
    return _schedule(_define(shape), shape)


def _define(shape: DepthwiseShape) -> Any:
    from tvm import te, tirx

    (kh, kw), (sh, sw), (dh, dw), (top, left) = shape.kernel, shape.strides, shape.dilation, shape.padding
    n, channels, height, width = shape.data.shape
    _, _, oh, ow = shape.out.shape
    data = placeholder(shape.data, "data")
    weight = te.placeholder((shape.out.blocks, kh, kw, LANES), "float32", name="weight")
    bias = te.placeholder((shape.out.blocks, LANES), "float32", name="bias")
    residual = placeholder(shape.residual, "residual") if shape.residual else None
    source = View(data, shape.data)
    tall, wide = (oh - 1) * sh + (kh - 1) * dh + 1, (ow - 1) * sw + (kw - 1) * dw + 1
    if top or left or tall > height or wide > width:
        spec = TensorSpec((n, channels, tall, wide), "float32", LANES)
        inner = source
        source = View(
            compute(
                spec,
                lambda b, c, y, x: tirx.if_then_else(
                    tirx.all(y >= top, y < height + top, x >= left, x < width + left),
                    inner(b, c, y - top, x - left),
                    tirx.const(0.0, "float32"),
                ),
                "pad",
            ),
            spec,
        )
    r, s = te.reduce_axis((0, kh), "kh"), te.reduce_axis((0, kw), "kw")
    acc = te.compute(
        shape.out.memory_shape,
        lambda b, o, y, x, i: te.sum(
            source.tensor[b, o, y * sh + r * dh, x * sw + s * dw, i] * weight[o, r, s, i], axis=[r, s]
        ),
        name="acc",
    )

    def finish(b: Any, o: Any, y: Any, x: Any, i: Any) -> Any:
        value = acc[b, o, y, x, i] + bias[o, i]
        return finished(value if residual is None else value + residual[b, o, y, x, i], shape)

    out = te.compute(shape.out.memory_shape, finish, name="out")
    return prim_func([a for a in (data, residual, weight, bias, out) if a is not None])


def _schedule(func: Any, shape: DepthwiseShape) -> Any:
    from tvm.s_tir import Schedule

    sch = Schedule(func)
    acc, out = sch.get_sblock("acc"), sch.get_sblock("out")
    n, o, y, x, lane = sch.get_loops(out)
    xo, xi = sch.split(x, [None, shape.columns])
    outer = sch.fuse(n, o, y)
    if int(np.prod(shape.out.shape)) * shape.kernel[0] * shape.kernel[1] >= PARALLEL_MACS:
        sch.parallel(outer)
    sch.vectorize(lane)
    if not shape.program:
        sch.unroll(xi)
    sch.compute_at(acc, xo, preserve_unit_loops=True)
    *_, x_, lane, r, s = sch.get_loops(acc)
    sch.reorder(r, s, x_, lane)
    sch.vectorize(lane)
    init = sch.decompose_reduction(acc, r)
    sch.unroll(sch.get_loops(init)[-2])
    for loop in (x_, s, r)[: 3 if shape.kernel[0] * shape.kernel[1] <= UNROLLED_TAPS else 2]:
        sch.unroll(loop)
    if has_block(sch, "pad"):
        pad = sch.get_sblock("pad")
        sch.compute_at(pad, outer, preserve_unit_loops=True)
        sch.vectorize(sch.get_loops(pad)[-1])
    return sch.mod["main"]
