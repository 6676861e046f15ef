"""Float transposed convolution: one small convolution for each of the stride x stride phases of an output pixel, no
zeros multiplied in between.

Output pixel y = stride * q + p receives kernel rows k = (p + top) % stride + stride * t from input rows q + (p + top)
// stride - t. A dilated kernel is written out with its zeros first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.conv2d_float import finished, tile_reduction
from lpsn_tvm.schedules.llvm.float_groups import ChannelReads, channel_reads, pack_channels, pack_weight
from lpsn_tvm.schedules.llvm.float_template import TileSpace, example_array, tile_of, workload_of
from lpsn_tvm.schedules.llvm.float_tiles import Tile, choose_tile
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.views import LANES
from lpsn_tvm.schedules.template import Config, Template, decode
from lpsn_tvm.schedules.views import View, compute, placeholder, prim_func


@dataclass(frozen=True)
class TransposeShape:
    """Everything the code depends on; `taps` are kernel rows and columns per phase, `padding` is top and left."""

    data: TensorSpec
    out: TensorSpec
    strides: tuple[int, int]
    taps: tuple[int, int]
    padding: tuple[int, int]
    reads: ChannelReads
    low: float
    high: float
    program: str
    tile: Tile

    @property
    def columns(self) -> int:
        """Pixels of one phase of a row, rounded up to whole tiles."""
        return -(-self.out.shape[3] // (self.strides[1] * self.tile.columns)) * self.tile.columns


def conv2d_transpose_float(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `lpsn.float_conv2d_transpose`; weight float32[C, O/groups, kh, kw]."""
    weight = constants.get("weight")
    if inputs[0].dtype != "float32" or weight is None or "bias" not in constants:
        return None
    data, groups = inputs[0].with_block(LANES), int(attrs["groups"])
    n, channels, height, width = data.shape
    kernel = _dilated(_per_output(weight, groups), tuple(attrs["dilation"]))
    out_channels, _, kh, kw = kernel.shape
    (sh, sw), (top, left, bottom, right) = attrs["strides"], attrs["padding"]
    oh = (height - 1) * sh + kh + attrs["output_padding"][0] - top - bottom
    ow = (width - 1) * sw + kw + attrs["output_padding"][1] - left - right
    reads, taps = channel_reads(channels, out_channels, groups), (-(-kh // sh), -(-kw // sw))
    out = TensorSpec((n, out_channels, oh, ow), "float32", LANES)
    shape = TransposeShape(
        data,
        out,
        (sh, sw),
        taps,
        (top, left),
        reads,
        float(attrs["low"]),
        float(attrs["high"]),
        str(attrs.get("program", "")),
        Tile(1, 1, 1),
    )
    shape = _with_default_tile(shape, isa)
    packed = [_phases(kernel, shape, groups), pack_channels(constants["bias"], out_channels)]
    if reads.per_group is None:
        packed.append(np.asarray(reads.first, np.int32))
    return _template(shape, isa, tuple(packed)).kernel()


def _template(shape: TransposeShape, isa: Isa, packed: tuple[Array, ...]) -> Template:
    """Choices: pixels of a phase's row, and blocks, computed together."""
    height, width, blocks, steps, phases = _tile_problem(shape)
    space = TileSpace(height, width, blocks, steps, isa, phases=phases)

    def make(config: Config) -> Kernel:
        chosen = replace(shape, tile=tile_of(config))
        return Kernel(lambda: build(chosen), packed, shape.out, ("float_conv2d_transpose", chosen), (shape.data,))

    return Template(
        "float_conv2d_transpose", workload_of(shape, isa, ("tile",)), space.choices(), asdict(shape.tile), make,
        lambda config: space.is_valid(config, shape.tile), space.features,
    )  # fmt: skip


def _tile_problem(shape: TransposeShape) -> tuple[int, int, int, int, int]:
    """One row and the columns of a phase, blocks that may share a tile, reduction steps, phases of a row."""
    reads, (th, tw), sw = shape.reads, shape.taps, shape.strides[1]
    return 1, -(-shape.out.shape[3] // sw), reads.per_group or 1, reads.span * th * tw, sw


def _with_default_tile(shape: TransposeShape, isa: Isa) -> TransposeShape:
    height, width, blocks, steps, phases = _tile_problem(shape)
    return replace(shape, tile=choose_tile(height, width, blocks, steps, isa, phases=phases))


def remake(workload: Mapping[str, Any]) -> Template:
    """The template of a workload, with made-up constants."""
    isa = Isa(**workload["isa"])
    shape = _with_default_tile(decode(TransposeShape, {**workload["shape"], "tile": asdict(Tile(1, 1, 1))}), isa)
    reads, taps, blocks = shape.reads, shape.taps, len(shape.reads.first)
    weight_shape = (blocks, reads.span // reads.inner, *shape.strides, *taps, reads.inner, LANES)
    packed = [example_array(weight_shape, (reads.span * taps[0] * taps[1]) ** -0.5), example_array((blocks, LANES))]
    if reads.per_group is None:
        packed.append(np.asarray(reads.first, np.int32))
    return _template(shape, isa, tuple(packed))


def _per_output(weight: Array, groups: int) -> Array:
    """IOHW [C, O/groups, kh, kw] -> OIHW [O, C/groups, kh, kw], not flipped."""
    channels, group_out, kh, kw = weight.shape
    grouped = weight.reshape(groups, channels // groups, group_out, kh, kw).transpose(0, 2, 1, 3, 4)
    return grouped.reshape(groups * group_out, channels // groups, kh, kw)


def _dilated(weight: Array, dilation: tuple[int, ...]) -> Array:
    (dh, dw), (kh, kw) = dilation, weight.shape[2:]
    full = np.zeros((*weight.shape[:2], (kh - 1) * dh + 1, (kw - 1) * dw + 1), weight.dtype)
    full[:, :, ::dh, ::dw] = weight
    return full


def _phases(kernel: Array, shape: TransposeShape, groups: int) -> Array:
    """float32[O blocks, C/inner, stride, stride, taps, taps, inner, 16]."""
    (sh, sw), (th, tw), (top, left) = shape.strides, shape.taps, shape.padding
    parts = np.zeros((*kernel.shape[:2], sh, sw, th, tw), np.float32)
    for py in range(sh):
        for px in range(sw):
            part = kernel[:, :, (py + top) % sh :: sh, (px + left) % sw :: sw]
            parts[:, :, py, px, : part.shape[2], : part.shape[3]] = part
    packed = pack_weight(parts.reshape(*kernel.shape[:2], sh * sw, th * tw), shape.reads, groups)
    return packed.reshape(*packed.shape[:2], sh, sw, th, tw, *packed.shape[4:])


def build(shape: TransposeShape) -> Any:
    """The scheduled TIR function."""
    return _schedule(_define(shape), shape)


def _define(shape: TransposeShape) -> Any:
    from tvm import te, tirx

    reads, (sh, sw), (th, tw), (top, left) = shape.reads, shape.strides, shape.taps, shape.padding
    n, channels, height, width = shape.data.shape
    blocks, columns = len(reads.first), shape.columns
    rows = -(-shape.out.shape[2] // sh)
    data = placeholder(shape.data, "data")
    weight = te.placeholder(
        (blocks, reads.span // reads.inner, sh, sw, th, tw, reads.inner, LANES), "float32", name="weight"
    )
    bias = te.placeholder((blocks, LANES), "float32", name="bias")
    table = te.placeholder((blocks,), "int32", name="first") if reads.per_group is None else None
    view = View(data, shape.data)
    # Rows above the image: the earliest tap; rows below: the last step of the last phase.
    tall, wide = rows + (sh - 1 + top) // sh + th - 1, columns + (sw - 1 + left) // sw + tw - 1
    spec = TensorSpec((n, channels, tall, wide), "float32", LANES)
    source = View(
        compute(
            spec,
            lambda b, c, y, x: tirx.if_then_else(
                tirx.all(y >= th - 1, y < height + th - 1, x >= tw - 1, x < width + tw - 1),
                view(b, c, y - (th - 1), x - (tw - 1)),
                tirx.const(0.0, "float32"),
            ),
            "pad",
        ),
        spec,
    )
    c, r, s, i = (
        te.reduce_axis((0, e), name)
        for e, name in ((reads.span // reads.inner, "c"), (th, "kh"), (tw, "kw"), (reads.inner, "ci"))
    )

    def product(b: Any, o: Any, y: Any, x: Any, lane: Any) -> Any:
        first = table[o] if table is not None else o // reads.per_group * reads.span
        row, column = (y % sh + top) // sh + y // sh - r + th - 1, (x % sw + left) // sw + x // sw - s + tw - 1
        pixel = source(b, first + c * reads.inner + i, row, column)
        return te.sum(pixel * weight[o, c, y % sh, x % sw, r, s, i, lane], axis=[c, r, s, i])

    acc = te.compute((n, blocks, shape.out.shape[2], columns * sw, LANES), product, name="acc")
    out = te.compute(
        shape.out.memory_shape,
        lambda b, o, y, x, lane: finished(acc[b, o, y, x, lane] + bias[o, lane], shape),
        name="out",
    )
    return prim_func([a for a in (data, weight, bias, table, out) if a is not None])


def _schedule(func: Any, shape: TransposeShape) -> Any:
    from tvm.s_tir import Schedule

    sch = Schedule(func)
    acc, out, pad = sch.get_sblock("acc"), sch.get_sblock("out"), sch.get_sblock("pad")
    n, o, y, x, lane = sch.get_loops(out)
    oo, ob = sch.split(o, [None, shape.tile.blocks])
    # All phases of a row's tile together: unrolled, each pixel's phase is a constant.
    xo, xi = sch.split(x, [None, shape.tile.columns * shape.strides[1]])
    sch.reorder(n, oo, y, xo, ob, xi, lane)
    sch.parallel(sch.fuse(n, oo, y))
    sch.vectorize(lane)
    for loop in () if shape.program else (ob, xi):
        sch.unroll(loop)
    sch.compute_at(acc, xo, preserve_unit_loops=True)
    tile_reduction(sch, acc)
    loops = sch.get_loops(pad)
    sch.vectorize(loops[-1])
    sch.parallel(sch.fuse(*loops[:-2]))
    return sch.mod["main"]
