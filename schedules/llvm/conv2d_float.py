"""Float convolution on blocked channels: a register tile of pixels x channel blocks, fed by broadcast pixels and
16-lane weights.

Reads data [N, C/16, H, W, 16] (few channels: plain [N, C, H, W]) and weights [O/16, C/inner, kh, kw, inner, 16]; writes
[N, O/16, OH, OW, 16] with bias, residual and clip fused. Tiles that overhang the image compute into a padded
accumulator and store only what exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lpsn_tvm import float_ops
from lpsn_tvm.schedules.expressions import evaluate
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.float_groups import ChannelReads, channel_reads, pack_channels, pack_weight
from lpsn_tvm.schedules.llvm.float_template import TileSpace, example_array, tile_of, workload_of
from lpsn_tvm.schedules.llvm.float_tiles import Tile, choose_tile
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.views import LANES
from lpsn_tvm.schedules.template import Config, Template, decode
from lpsn_tvm.schedules.views import View, compute, has_block, placeholder, prim_func

PLAIN_CHANNELS = 4
"""Inputs with at most so many channels are read as plain NCHW: 16 lanes would be mostly padding."""

ROOT_PAD_BYTES = 1 << 20
"""A padded copy up to this size is made at once; a larger one row chunk by row chunk, so that it stays in cache."""

CHUNK_BYTES = 1 << 18

PARALLEL_MACS = 3_000_000
"""Layers below this (about 30 microseconds) run on one thread: starting others costs more than they save."""


@dataclass(frozen=True)
class ConvShape:
    """Everything the code of a float convolution depends on.

    Parameters
    ----------
    data, out : TensorSpec
    residual : TensorSpec or None
    kernel, strides, dilation : (int, int)
    padding : (int, int)
        Top and left.
    reads : ChannelReads
    low, high : float
    program : str
        Elementwise program behind the clip.
    tile : Tile
    chunk : int
        Tiles of rows whose padded input is copied together; 0: the whole map at once; -1: by a rule.
    """

    data: TensorSpec
    out: TensorSpec
    residual: TensorSpec | None
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    reads: ChannelReads
    low: float
    high: float
    program: str
    tile: Tile
    chunk: int = -1


def conv2d_float(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `lpsn.float_conv2d` (any groups; depthwise has its own, faster one)."""
    data, weight = inputs[0], constants.get("weight")
    if data.dtype != "float32" or weight is None or "bias" not in constants:
        return None
    shape = conv_shape(inputs, weight, attrs, isa)
    packed = [pack_weight(weight, shape.reads, int(attrs["groups"])), pack_channels(constants["bias"], weight.shape[0])]
    if shape.reads.per_group is None:
        packed.append(np.asarray(shape.reads.first, np.int32))
    return _template(shape, isa, tuple(packed)).kernel()


def _template(shape: ConvShape, isa: Isa, packed: tuple[Array, ...]) -> Template:
    """Choices: register tile, and how much padded input is copied at a time."""
    read = (shape.data,) if shape.residual is None else (shape.data, shape.residual)
    space = tile_space(shape, isa)
    most = -(-shape.out.shape[2] // shape.tile.rows)
    default = _chunk_rows(shape) if is_padded(shape) else 0

    def decided(config: Config) -> ConvShape:
        return replace(shape, tile=tile_of(config), chunk=int(config["chunk"]))

    def is_valid(config: Config) -> bool:
        # Chunks mean something only where there is a padded copy, of channels that are known.
        has_meaning = not int(config["chunk"]) or (shape.reads.per_group is not None and is_padded(decided(config)))
        return has_meaning and space.is_valid(config, shape.tile)

    def make(config: Config) -> Kernel:
        chosen = decided(config)
        return Kernel(lambda: build(chosen), packed, shape.out, ("float_conv2d", chosen, isa), read)

    choices = space.choices() | {"chunk": tuple(sorted({c for c in (0, 1, 2, 4, 8) if c < most} | {default}))}
    return Template(
        "float_conv2d", workload_of(shape, isa, ("tile", "chunk")), choices, {**asdict(shape.tile), "chunk": default},
        make, is_valid, lambda config: (*space.features(config), float(config["chunk"])),
    )  # fmt: skip


def tile_space(shape: ConvShape, isa: Isa) -> TileSpace:
    """The tiles of a convolution."""
    return TileSpace(*_tile_problem(shape)[:4], isa, overhang_copies=_copies_if_overhanging(shape))


def _tile_problem(shape: ConvShape) -> tuple[int, int, int, int]:
    """Rows, columns, blocks that may share a tile, reduction steps."""
    _, _, height, width = shape.out.shape
    return height, width, shape.reads.per_group or 1, shape.reads.span * shape.kernel[0] * shape.kernel[1]


def _copies_if_overhanging(shape: ConvShape) -> bool:
    """Whether only a tile that overhangs makes a padded copy necessary."""
    return not is_padded(replace(shape, tile=Tile(1, 1, 1)))


def with_default_tile(shape: ConvShape, isa: Isa) -> ConvShape:
    """The shape with the tile that is best by the estimate."""
    tile = choose_tile(*_tile_problem(shape), isa, overhang_copies=_copies_if_overhanging(shape))
    return replace(shape, tile=tile)


def remake(workload: Mapping[str, Any]) -> Template:
    """The template of a workload, with made-up constants."""
    isa = Isa(**workload["isa"])
    shape = with_default_tile(decode(ConvShape, {**workload["shape"], "tile": asdict(Tile(1, 1, 1))}), isa)
    reads, (kh, kw) = shape.reads, shape.kernel
    weight_shape = (len(reads.first), reads.span // reads.inner, kh, kw, reads.inner, LANES)
    packed = [example_array(weight_shape, (reads.span * kh * kw) ** -0.5), example_array((len(reads.first), LANES))]
    if reads.per_group is None:
        packed.append(np.asarray(reads.first, np.int32))
    return _template(shape, isa, tuple(packed))


def conv_shape(inputs: tuple[TensorSpec, ...], weight: Array, attrs: Mapping[str, Any], isa: Isa) -> ConvShape:
    """Layouts, output size and tile of a convolution."""
    data = inputs[0].with_block(0 if inputs[0].shape[1] <= PLAIN_CHANNELS else LANES)
    n, channels, height, width = data.shape
    out_channels, _, kh, kw = weight.shape
    (sh, sw), (dh, dw) = attrs["strides"], attrs["dilation"]
    top, left, bottom, right = attrs["padding"]
    oh = (height + top + bottom - dh * (kh - 1) - 1) // sh + 1
    ow = (width + left + right - dw * (kw - 1) - 1) // sw + 1
    out = TensorSpec((n, out_channels, oh, ow), "float32", LANES)
    reads = channel_reads(channels, out_channels, int(attrs["groups"]))
    residual = inputs[1].with_block(LANES) if len(inputs) > 1 else None
    shape = ConvShape(
        data,
        out,
        residual,
        (kh, kw),
        (sh, sw),
        (dh, dw),
        (top, left),
        reads,
        float(attrs["low"]),
        float(attrs["high"]),
        str(attrs.get("program", "")),
        Tile(1, 1, 1),
    )
    return with_default_tile(shape, isa)


def build(shape: ConvShape) -> Any:
    """The scheduled TIR function."""
    return _schedule(_define(shape), shape)


def extent(shape: ConvShape) -> tuple[int, int]:
    """Rows and columns of the accumulator: the output's, rounded up to whole tiles."""
    _, _, rows, columns = shape.out.shape
    return -(-rows // shape.tile.rows) * shape.tile.rows, -(-columns // shape.tile.columns) * shape.tile.columns


def macs(shape: ConvShape) -> int:
    """Multiply-accumulates of the whole layer."""
    return int(np.prod(shape.out.shape)) * shape.reads.span * shape.kernel[0] * shape.kernel[1]


def is_padded(shape: ConvShape) -> bool:
    """Whether some tile reads what is not in the input, so that a padded copy is made."""
    _, _, height, width = shape.data.shape
    rows, columns = extent(shape)
    (kh, kw), (sh, sw), (dh, dw) = shape.kernel, shape.strides, shape.dilation
    tall, wide = (rows - 1) * sh + (kh - 1) * dh + 1, (columns - 1) * sw + (kw - 1) * dw + 1
    return any(shape.padding) or tall > height or wide > width


def _padded(shape: ConvShape, data: Any) -> View:
    """Data with zeros around it, as far as some tile reads; the data itself where nothing is missing."""
    from tvm import tirx

    n, channels, height, width = shape.data.shape
    rows, columns = extent(shape)
    view = View(data, shape.data)
    (kh, kw), (sh, sw), (dh, dw), (top, left) = shape.kernel, shape.strides, shape.dilation, shape.padding
    tall, wide = (rows - 1) * sh + (kh - 1) * dh + 1, (columns - 1) * sw + (kw - 1) * dw + 1
    if not is_padded(shape):
        return view
    spec = TensorSpec((n, channels, tall, wide), "float32", shape.data.block)
    return View(
        compute(
            spec,
            lambda b, c, y, x: tirx.if_then_else(
                tirx.all(y >= top, y < height + top, x >= left, x < width + left),
                view(b, c, y - top, x - left),
                tirx.const(0.0, "float32"),
            ),
            "pad",
        ),
        spec,
    )


def _define(shape: ConvShape) -> Any:
    """TE: [pad ->] accumulate -> bias, residual, clip."""
    from tvm import te

    reads, (kh, kw) = shape.reads, shape.kernel
    blocks = len(reads.first)
    data = placeholder(shape.data, "data")
    weight = te.placeholder((blocks, reads.span // reads.inner, kh, kw, reads.inner, LANES), "float32", name="weight")
    bias = te.placeholder((blocks, LANES), "float32", name="bias")
    table = te.placeholder((blocks,), "int32", name="first") if reads.per_group is None else None
    source = _padded(shape, data)
    c, r, s, i = (
        te.reduce_axis((0, e), name)
        for e, name in ((reads.span // reads.inner, "c"), (kh, "kh"), (kw, "kw"), (reads.inner, "ci"))
    )

    def product(n: Any, o: Any, y: Any, x: Any, lane: Any) -> Any:
        first = table[o] if table is not None else o // reads.per_group * reads.span
        pixel = source(
            n,
            first + c * reads.inner + i,
            y * shape.strides[0] + r * shape.dilation[0],
            x * shape.strides[1] + s * shape.dilation[1],
        )
        return te.sum(pixel * weight[o, c, r, s, i, lane], axis=[c, r, s, i])

    rows, columns = extent(shape)
    acc = te.compute((shape.out.shape[0], blocks, rows, columns, LANES), product, name="acc")
    residual = placeholder(shape.residual, "residual") if shape.residual else None

    def finish(n: Any, o: Any, y: Any, x: Any, lane: Any) -> Any:
        value = acc[n, o, y, x, lane] + bias[o, lane]
        if residual is not None:
            value = value + residual[n, o, y, x, lane]
        return finished(value, shape)

    out = te.compute(shape.out.memory_shape, finish, name="out")
    arguments = [data, residual, weight, bias, table, out]
    return prim_func([a for a in arguments if a is not None])


def finished(value: Any, shape: Any) -> Any:
    """`value` within `shape.low` and `shape.high` (infinite bounds cost nothing), then through `shape.program`."""
    from tvm import tirx

    if np.isfinite(shape.low):
        value = tirx.max(value, tirx.const(shape.low, "float32"))
    if np.isfinite(shape.high):
        value = tirx.min(value, tirx.const(shape.high, "float32"))
    return evaluate(float_ops.decode_program(shape.program), [value]) if shape.program else value


def _chunk_rows(shape: ConvShape) -> int:
    """Output rows whose padded input fits the cache, as tiles; 0 where the whole padded input does or none is made."""
    if shape.chunk >= 0:
        return shape.chunk
    if shape.reads.per_group is None:
        # Which channels a block reads is data: TVM cannot tell what part of the padded input that is.
        return 0
    rows, columns = extent(shape)
    row_bytes = shape.data.memory_shape[1] * (shape.data.block or 1) * columns * shape.strides[1] * 4
    if row_bytes * rows * shape.strides[0] <= ROOT_PAD_BYTES:
        return 0
    overlap = (shape.kernel[0] - 1) * shape.dilation[0]
    fitting = (CHUNK_BYTES // row_bytes - overlap) // shape.strides[0]
    return max(4, fitting) // shape.tile.rows or 1


def _schedule(func: Any, shape: ConvShape) -> Any:
    from tvm.s_tir import Schedule

    sch = Schedule(func)
    has_pad = has_block(sch, "pad")
    acc, out = sch.get_sblock("acc"), sch.get_sblock("out")
    n, o, y, x, lane = sch.get_loops(out)
    oo, ob = sch.split(o, [None, shape.tile.blocks])
    yo, yi = sch.split(y, [None, shape.tile.rows])
    xo, xi = sch.split(x, [None, shape.tile.columns])
    chunk = _chunk_rows(shape) if has_pad else 0
    if chunk:
        yc, yo = sch.split(yo, [None, chunk])
        sch.reorder(n, yc, oo, yo, xo, ob, yi, xi, lane)
        outer = sch.fuse(n, yc)
    else:
        sch.reorder(n, oo, yo, xo, ob, yi, xi, lane)
        outer = sch.fuse(n, oo, yo)
    is_parallel = macs(shape) >= PARALLEL_MACS
    if is_parallel:
        sch.parallel(outer)
    sch.vectorize(lane)
    # A program unrolled for every accumulator would compile for seconds.
    for loop in () if shape.program else (ob, yi, xi):
        sch.unroll(loop)
    sch.compute_at(acc, xo, preserve_unit_loops=True)
    tile_reduction(sch, acc)
    if has_pad:
        pad = sch.get_sblock("pad")
        if chunk:
            sch.compute_at(pad, outer, preserve_unit_loops=True)
        loops = sch.get_loops(pad)
        if shape.data.block:
            sch.vectorize(loops[-1])
        if not chunk and is_parallel:
            sch.parallel(sch.fuse(*loops[:-2]))
    return sch.mod["main"]


def tile_reduction(sch: Any, acc: Any) -> None:
    """Inside a tile: reduction loops outside, the tile unrolled inside them, its accumulators in registers."""
    *_, o, y, x, lane, c, r, s, i = sch.get_loops(acc)
    sch.reorder(c, r, s, i, y, x, o, lane)
    sch.vectorize(lane)
    for loop in (y, x, o):
        sch.unroll(loop)
    init = sch.decompose_reduction(acc, c)
    for loop in sch.get_loops(init)[-4:-1]:
        sch.unroll(loop)
