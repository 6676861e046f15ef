"""`lpsn.conv2d` with one input channel per output channel.

Neighbouring pixels of one channel block lie next to each other, so one load brings four pixels of 16 channels; a byte
shuffle turns [pixel, channel] into [channel, pixel] and one dot instruction multiplies four taps of a kernel row.
Without a dot instruction, or
dilated, taps go one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.conv_template import example_constants
from lpsn_tvm.schedules.llvm.dot import BLOCK, dot, lanes_of, quad_of, store_epilogue
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.tir import loop, map_elements, nest, prim_func, unravel, vcast, vector, vload, vstore
from lpsn_tvm.schedules.llvm.weights import parameters, per_channel
from lpsn_tvm.schedules.template import Config, Template, decode

SCRATCH_BYTES = 24 * 1024
MOST_PIXELS = 14
"""Most pixels of a row that are computed together."""


@dataclass(frozen=True)
class Geometry:
    """Everything the code depends on; `columns` is the width of a padded row in scratch, `rows` the output rows of one
    task.
    """

    data: TensorSpec
    out: TensorSpec
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    quad: int
    has_residual: bool
    columns: int
    rows: int
    pixels: int

    @property
    def groups_per_row(self) -> int:
        """Dot instructions per kernel row."""
        return -(-self.kernel[1] // self.quad)

    @property
    def in_rows(self) -> int:
        """Input rows that a task reads."""
        return (self.rows - 1) * self.strides[0] + (self.kernel[0] - 1) * self.dilation[0] + 1


def depthwise(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `quant.conv2d` for depthwise layers; others are not mine."""
    if "weight" not in constants or inputs[0].dtype not in ("uint8", "int8"):
        return None
    weight = constants["weight"]
    channels = inputs[0].shape[1]
    if int(attrs.get("groups", 1)) != channels or weight.shape[0] != channels or channels == 1:
        return None
    g = _geometry(inputs[0].with_block(BLOCK), weight, attrs, len(inputs) == 2, isa)
    packed = (
        pack_taps(weight, g.quad),
        per_channel(constants["bias"], "int32", channels),
        per_channel(constants["scale"], "float32", channels),
        *parameters(attrs),
    )
    return _template(g, isa, packed).kernel()


def _template(g: Geometry, isa: Isa, packed: tuple[Array, ...]) -> Template:
    """Choices: output rows of a task, and pixels computed together."""
    wanted = (g.data, g.out) if g.has_residual else (g.data,)
    height, width = g.out.shape[2:]
    pieces = BLOCK // lanes_of(isa)

    def make(config: Config) -> Kernel:
        chosen = replace(g, rows=int(config["rows"]), pixels=int(config["pixels"]))
        return Kernel(lambda: _function(chosen, isa), packed, g.out, ("depthwise_int8", isa, chosen), wanted)

    def features(config: Config) -> tuple[float, ...]:
        rows, pixels = int(config["rows"]), int(config["pixels"])
        chosen, chunks = replace(g, rows=rows, pixels=pixels), -(-height // rows)
        return (
            float(rows), float(pixels), pixels * pieces / isa.registers, chunks * rows / height,
            -(-width // pixels) * pixels / width, chosen.in_rows / (rows * g.strides[0]),
            math.log2(chosen.in_rows * g.columns * BLOCK), math.log2(g.out.shape[0] * g.out.blocks * chunks),
            float(g.kernel[0] * g.groups_per_row), math.log2(height * width),
        )  # fmt: skip

    rows = tuple(r for r in sorted({1, 2, 4, 7, 8, 14, 16, 28, 32, 56, 64, g.rows, height}) if r <= height)
    # Same memory, same code: channels beyond the last block's are not part of the workload.
    fields = asdict(replace(g, data=_whole_blocks(g.data), out=_whole_blocks(g.out)))
    workload = {
        "isa": asdict(isa),
        "geometry": {name: value for name, value in fields.items() if name not in ("rows", "pixels")},
    }
    return Template(
        "depthwise_int8", workload, {"rows": rows, "pixels": tuple(range(1, min(width, MOST_PIXELS) + 1))},
        {"rows": g.rows, "pixels": g.pixels}, make,
        lambda config: int(config["pixels"]) * pieces <= isa.registers, features,
    )  # fmt: skip


def _whole_blocks(spec: TensorSpec) -> TensorSpec:
    return TensorSpec((spec.shape[0], spec.blocks * spec.block, *spec.shape[2:]), spec.dtype, spec.block)


def remake(workload: Mapping[str, Any]) -> Template:
    """The template of a workload, with made-up constants."""
    g = decode(Geometry, {**workload["geometry"], "rows": 1, "pixels": 1})
    g = replace(g, rows=_rows(g), pixels=_pixels(g.out.shape[3]))
    shape, dtype = (g.out.blocks, g.kernel[0], g.groups_per_row, BLOCK, g.quad), "int16" if g.quad == 2 else "int8"
    packed = example_constants(shape, dtype, g.out.blocks, g.kernel[0] * g.kernel[1], g.out.dtype)
    return _template(g, Isa(**workload["isa"]), packed)


def pack_taps(weight: Array, quad: int) -> Array:
    """int8[C, 1, kh, kw] -> [C/16, kh, ceil(kw/quad), 16, quad] (int16 for pairs), absent taps zero."""
    channels, _, kh, kw = weight.shape
    blocks, groups = -(-channels // BLOCK), -(-kw // quad)
    full = np.zeros((blocks * BLOCK, kh, groups * quad), np.int16 if quad == 2 else np.int8)
    full[:channels, :, :kw] = weight[:, 0]
    return np.ascontiguousarray(full.reshape(blocks, BLOCK, kh, groups, quad).transpose(0, 2, 3, 1, 4))


def _geometry(data: TensorSpec, weight: Array, attrs: Mapping[str, Any], has_residual: bool, isa: Isa) -> Geometry:
    batch, channels, height, width = data.shape
    kh, kw = weight.shape[2:]
    sy, sx = attrs["strides"]
    dy, dx = attrs.get("dilation", (1, 1))
    top, left, bottom, right = attrs["padding"]
    oh = (height + top + bottom - dy * (kh - 1) - 1) // sy + 1
    ow = (width + left + right - dx * (kw - 1) - 1) // sx + 1
    quad = quad_of(isa, data.dtype) if dx == 1 else 1
    taps = -(-kw // quad) * quad
    columns = max(left + width, (ow - 1) * sx + max((kw - 1) * dx + 1, taps))
    out = TensorSpec((batch, channels, oh, ow), str(attrs.get("out_dtype", "uint8")), BLOCK)
    pads = (top, left, bottom, right)
    g = Geometry(data, out, (kh, kw), (sy, sx), (dy, dx), pads, quad, has_residual, columns, 1, _pixels(ow))
    return replace(g, rows=_rows(g))


def _rows(g: Geometry) -> int:
    """Rows of a task by default: its input stays in the first-level cache."""
    fitting = max(1, SCRATCH_BYTES // (g.columns * BLOCK))
    return max(1, min(g.out.shape[2], (fitting - (g.kernel[0] - 1) * g.dilation[0] - 1) // g.strides[0] + 1))


def _pixels(width: int) -> int:
    """Pixels together by default."""
    return next(p for p in (8, 7, 6, 5, 4, 3, 2, 1) if p <= width and (width % p == 0 or p <= 4))


def _function(g: Geometry, isa: Isa) -> Any:
    batch, blocks, oh, ow, _ = g.out.memory_shape
    arguments = [("data", g.data.memory_shape, g.data.dtype)]
    if g.has_residual:
        arguments.append(("residual", g.out.memory_shape, g.out.dtype))
    arguments += [
        ("weight", (blocks, g.kernel[0], g.groups_per_row, BLOCK, g.quad), "int16" if g.quad == 2 else "int8"),
        ("bias", (blocks, BLOCK), "int32"),
        ("scale", (blocks, BLOCK), "float32"),
        ("floats", (4,), "float32"),
        ("integers", (4,), "int32"),
        ("out", g.out.memory_shape, g.out.dtype),
    ]

    def body(data: Any, *rest: Any) -> None:
        residual = rest[0] if g.has_residual else None
        weight, bias, scale, floats, integers, out = rest[-6:]
        chunks = -(-oh // g.rows)
        work = batch * blocks * oh * ow * BLOCK * (g.kernel[0] * g.groups_per_row + 4) * 8
        with loop(batch * blocks * chunks, work) as index:
            n, c, chunk = unravel(index, batch, blocks, chunks)
            y0 = T.min(chunk * g.rows, oh - g.rows) if oh % g.rows else chunk * g.rows
            scratch = T.alloc_buffer((g.in_rows * g.columns * BLOCK + 64,), g.data.dtype)
            _fill(g, scratch, data, integers, n * blocks + c, y0)
            with nest(g.rows, -(-ow // g.pixels)) as (y, xo):
                x0 = T.min(xo * g.pixels, ow - g.pixels) if ow % g.pixels else xo * g.pixels
                acc = _accumulate(g, isa, scratch, weight, bias, c, y, x0)
                first = (((n * blocks + c) * oh + y0 + y) * ow + x0) * BLOCK
                lanes = lanes_of(isa)
                for pixel in range(g.pixels):
                    for piece in range(BLOCK // lanes):
                        value = vload(acc, pixel * BLOCK + piece * lanes, lanes)
                        store_epilogue(
                            value,
                            vload(scale, c * BLOCK + piece * lanes, lanes),
                            residual,
                            floats,
                            integers,
                            out,
                            first + pixel * BLOCK + piece * lanes,
                            lanes,
                        )

    return prim_func(arguments, body)


def _fill(g: Geometry, scratch: Any, data: Any, integers: Any, plane: Any, y0: Any) -> None:
    """Copy the padded input rows of one task into scratch."""
    _, _, height, width = g.data.shape
    top, left = g.padding[:2]
    row = g.columns * BLOCK

    def fill(start: Any, count: int) -> None:
        value = T.cast(integers[0], g.data.dtype)
        map_elements(count, 64, lambda i, n: vstore(scratch, start + i, vector(value, n), n))

    with T.serial(0, g.in_rows) as r:
        y = y0 * g.strides[0] + r - top
        with T.If(T.And(y >= 0, y < height)):
            with T.Then():
                if left:
                    fill(r * row, left * BLOCK)
                source = (plane * height + y) * (width * BLOCK)
                target = r * row + left * BLOCK
                map_elements(width * BLOCK, 64, lambda i, n: vstore(scratch, target + i, vload(data, source + i, n), n))
                if g.columns > left + width:
                    fill(r * row + (left + width) * BLOCK, (g.columns - left - width) * BLOCK)
            with T.Else():
                fill(r * row, row)


def _accumulate(g: Geometry, isa: Isa, scratch: Any, weight: Any, bias: Any, c: Any, y: Any, x0: Any) -> Any:
    """int32 sums of `g.pixels` neighbouring outputs."""
    lanes, quad = lanes_of(isa), g.quad
    acc = T.alloc_buffer((g.pixels * BLOCK,), "int32", scope="local")
    for at in range(0, g.pixels * BLOCK, lanes):
        vstore(acc, at, vload(bias, c * BLOCK + at % BLOCK, lanes), lanes)
    kh, per_row = g.kernel[0], g.groups_per_row
    # Small kernels are unrolled so that their weights stay in registers.
    rolled = kh if kh * per_row > 14 else 1
    with nest(rolled) as (r0,):
        for r in range(1 if rolled > 1 else kh):
            base = ((y * g.strides[0] + (r0 + r) * g.dilation[0]) * g.columns + x0 * g.strides[1]) * BLOCK
            for q in range(per_row):
                w = (((c * kh + r0 + r) * per_row) + q) * BLOCK * quad
                for pixel in range(g.pixels):
                    at = base + (pixel * g.strides[1] + q * quad * g.dilation[1]) * BLOCK
                    for piece in range(BLOCK // lanes):
                        place = pixel * BLOCK + piece * lanes
                        weights = vload(weight, w + piece * lanes * quad, lanes * quad)
                        vstore(
                            acc,
                            place,
                            dot(
                                isa, vload(acc, place, lanes), _taps(g, scratch, at, piece, lanes), weights, quad, lanes
                            ),
                            lanes,
                        )
    return acc


def _taps(g: Geometry, scratch: Any, at: Any, piece: int, lanes: int) -> Any:
    """`quad` neighbouring pixels of `lanes` channels as one operand of the dot instruction: [channel, pixel]."""
    quad = g.quad
    if quad == 1:
        return vcast(vload(scratch, at + piece * lanes, lanes), "int32", lanes)
    pixels = vload(scratch, at, BLOCK * quad)
    order = [p * BLOCK + piece * lanes + channel for channel in range(lanes) for p in range(quad)]
    taps = tirx.Shuffle([pixels], order)
    return vcast(taps, "int16", lanes * 2) if quad == 2 else T.reinterpret(f"int8x{lanes * 4}", taps)
