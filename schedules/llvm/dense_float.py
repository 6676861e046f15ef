"""Float dense layer: several blocks of 16 outputs at once, one broadcast input value per step, weights read as one
stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.conv2d_float import finished
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.llvm.views import LANES, PARALLEL_ELEMENTS
from lpsn_tvm.schedules.views import placeholder, prim_func


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
    (batch, depth), width = inputs[0].shape, weight.shape[1]
    parts = max(1, LANES // isa.float_lanes)
    blocks = min(max(1, (8 if batch == 1 else 4) // parts), -(-width // LANES))
    fitting = max(1, (isa.registers - 4) // (blocks * parts))
    rows = max(r for r in range(1, min(batch, fitting) + 1) if batch % r == 0)
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
    padded = np.zeros((depth, shape.tiles * blocks * LANES), np.float32)
    padded[:, :width] = weight
    packed = np.ascontiguousarray(padded.reshape(depth, shape.tiles, blocks, LANES).transpose(1, 0, 2, 3))
    bias = np.ascontiguousarray(constants["bias"].reshape(-1), np.float32)
    read = (shape.data, out) if shape.has_residual else (shape.data,)
    return Kernel(lambda: build(shape), (packed, bias), out, ("float_dense", shape), read)


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
