"""Float dense layer: several blocks of 16 outputs at once, one broadcast input value per step, weights read as one
stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.conv2d_float import finished
from lpsn_tvm.schedules.llvm.float_template import example_array, workload_of
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.views import LANES, PARALLEL_ELEMENTS
from lpsn_tvm.schedules.template import Config, Template, decode
from lpsn_tvm.schedules.views import placeholder, prim_func

MOST_BLOCKS = 16
"""Most blocks of outputs that are computed together."""


@dataclass(frozen=True)
class DenseShape:
    """Everything the code depends on: `rows` samples and `blocks` output blocks are computed together."""

    data: TensorSpec
    out: TensorSpec
    has_residual: bool
    low: float
    high: float
    program: str
    rows: int
    blocks: int

    @property
    def tiles(self) -> int:
        """Groups of `blocks` output blocks."""
        return -(-self.out.shape[1] // (self.blocks * LANES))


def dense_float(
    inputs: tuple[TensorSpec, ...], constants: Mapping[str, Array], attrs: Mapping[str, Any], isa: Isa
) -> Kernel | None:
    """Kernel of `lpsn.float_dense`; data [N, K] plain, weight float32[K, M]."""
    weight = constants.get("weight")
    if inputs[0].dtype != "float32" or weight is None or "bias" not in constants or len(inputs[0].shape) != 2:
        return None
    batch, width = inputs[0].shape[0], weight.shape[1]
    rows, blocks = _default_tile(batch, width, isa)
    out = TensorSpec((batch, width), "float32")
    shape = DenseShape(
        inputs[0].with_block(0),
        out,
        len(inputs) > 1,
        float(attrs["low"]),
        float(attrs["high"]),
        str(attrs.get("program", "")),
        rows,
        blocks,
    )
    return _template(shape, isa, weight, np.ascontiguousarray(constants["bias"].reshape(-1), np.float32)).kernel()


def _template(shape: DenseShape, isa: Isa, weight: Array, bias: Array) -> Template:
    """Choices: samples and output blocks computed together; the weight is packed by the blocks."""
    (batch, depth), width = shape.data.shape, shape.out.shape[1]
    parts = max(1, LANES // isa.float_lanes)
    read = (shape.data, shape.out) if shape.has_residual else (shape.data,)

    def make(config: Config) -> Kernel:
        chosen = replace(shape, rows=int(config["rows"]), blocks=int(config["blocks"]))
        padded = np.zeros((depth, chosen.tiles * chosen.blocks * LANES), np.float32)
        padded[:, :width] = weight
        split = padded.reshape(depth, chosen.tiles, chosen.blocks, LANES)
        packed = np.ascontiguousarray(split.transpose(1, 0, 2, 3))
        return Kernel(lambda: build(chosen), (packed, bias), shape.out, ("float_dense", chosen), read)

    def is_valid(config: Config) -> bool:
        rows, blocks = int(config["rows"]), int(config["blocks"])
        return rows * blocks * parts <= isa.registers - 2 or (rows, blocks) == (shape.rows, shape.blocks)

    def features(config: Config) -> tuple[float, ...]:
        rows, blocks = int(config["rows"]), int(config["blocks"])
        tiles = -(-width // (blocks * LANES))
        return (
            float(rows), float(blocks), rows * blocks * parts / isa.registers, tiles * blocks * LANES / width,
            math.log2(tiles * batch / rows), math.log2(depth), math.log2(depth * blocks * LANES * 4),
        )  # fmt: skip

    choices = {
        "rows": tuple(r for r in range(1, min(batch, 28) + 1) if batch % r == 0),
        "blocks": tuple(range(1, min(MOST_BLOCKS, -(-width // LANES)) + 1)),
    }
    default = {"rows": shape.rows, "blocks": shape.blocks}
    workload = workload_of(shape, isa, ("rows", "blocks"))
    return Template("float_dense", workload, choices, default, make, is_valid, features)


def _default_tile(batch: int, width: int, isa: Isa) -> tuple[int, int]:
    """Rows and blocks computed together without tuning."""
    parts = max(1, LANES // isa.float_lanes)
    blocks = min(max(1, (8 if batch == 1 else 4) // parts), -(-width // LANES))
    fitting = max(1, (isa.registers - 4) // (blocks * parts))
    return max(r for r in range(1, min(batch, fitting) + 1) if batch % r == 0), blocks


def remake(workload: Mapping[str, Any]) -> Template:
    """The template of a workload, with made-up constants."""
    isa = Isa(**workload["isa"])
    shape = decode(DenseShape, {**workload["shape"], "rows": 1, "blocks": 1})
    (batch, depth), width = shape.data.shape, shape.out.shape[1]
    rows, blocks = _default_tile(batch, width, isa)
    weight = example_array((depth, width), depth**-0.5)
    return _template(replace(shape, rows=rows, blocks=blocks), isa, weight, example_array((width,)))


def build(shape: DenseShape) -> Any:
    """The scheduled TIR function."""
    from tvm import te

    (batch, depth), width = shape.data.shape, shape.out.shape[1]
    data = placeholder(shape.data, "data")
    residual = placeholder(shape.out, "residual") if shape.has_residual else None
    weight = te.placeholder((shape.tiles, depth, shape.blocks, LANES), "float32", name="weight")
    bias = te.placeholder((width,), "float32", name="bias")
    k = te.reduce_axis((0, depth), "k")
    acc = te.compute(
        (shape.tiles, batch, shape.blocks, LANES),
        lambda t, n, b, i: te.sum(data[n, k] * weight[t, k, b, i], axis=k),
        name="acc",
    )
    step = shape.blocks * LANES

    def finish(n: Any, m: Any) -> Any:
        value = acc[m // step, n, m % step // LANES, m % LANES] + bias[m]
        return finished(value if residual is None else value + residual[n, m], shape)

    out = te.compute((batch, width), finish, name="out")
    return _schedule(prim_func([a for a in (data, residual, weight, bias, out) if a is not None]), shape)


def _schedule(func: Any, shape: DenseShape) -> Any:
    from tvm.s_tir import Schedule

    sch = Schedule(func)
    acc = sch.get_sblock("acc")
    t, n, b, lane, k = sch.get_loops(acc)
    no, ni = sch.split(n, [None, shape.rows])
    sch.reorder(t, no, k, ni, b, lane)
    outer = sch.fuse(t, no)
    if shape.data.shape[1] * shape.out.shape[1] >= PARALLEL_ELEMENTS:
        sch.parallel(outer)
    sch.vectorize(lane)
    for loop in (ni, b):
        sch.unroll(loop)
    # The tile lives in registers and is stored once at the end of the reduction.
    cache = sch.cache_write(acc, 0, "local")
    sch.reverse_compute_at(cache, outer, preserve_unit_loops=True)
    *_, ni, b, lane = sch.get_loops(cache)
    for loop in (ni, b):
        sch.unroll(loop)
    sch.vectorize(lane)
    init = sch.decompose_reduction(sch.get_sblock("acc"), sch.get_loops(sch.get_sblock("acc"))[1])
    for loop in sch.get_loops(init)[-3:-1]:
        sch.unroll(loop)
    return sch.mod["main"]
