"""Float softmax and instance normalization."""

from __future__ import annotations

from typing import Any

import numpy as np

from lpsn_tvm.schedules.expressions import exponential
from lpsn_tvm.schedules.kernel import Attrs, Constants, Inputs, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.rounding import apart
from lpsn_tvm.schedules.views import View, compute, has_block, placeholder, prim_func

STAGES = ("offset", "slope", "centre", "factor", "spread", "mean", "total")
"""Blocks of one (sample, channel) each, last one first."""


def float_instance_norm(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.float_instance_norm`: three passes over each block of channels, parallel over blocks; sums in
    float64, as the reference has them.
    """
    data, scale, shift = inputs[0], constants.get("scale"), constants.get("shift")
    if data.dtype != "float32" or len(data.shape) != 4 or scale is None or shift is None:
        return None
    epsilon = float(attrs["epsilon"])
    channels = TensorSpec((1, data.shape[1], 1, 1), "float32", data.block)
    packed = tuple(channels.pack(array.astype(np.float32).reshape(1, -1, 1, 1)) for array in (scale, shift))

    def build() -> Any:
        x, gamma, beta = placeholder(data, "x"), placeholder(channels, "scale"), placeholder(channels, "shift")
        out = _norm(View(x, data), View(gamma, channels), View(beta, channels), epsilon)
        return _schedule_norm(prim_func([x, gamma, beta, out]), data)

    return Kernel(build, packed, data, ("float_instance_norm", data, epsilon), (data,))


def _norm(x: View, scales: View, shifts: View, epsilon: float) -> Any:
    """The TE tensor "out" of `float_ops.float_instance_norm`."""
    from tvm import te, tirx

    data = x.spec
    pixels = tirx.const(float(data.shape[2] * data.shape[3]), "float64")

    def per_channel(name: str, dtype: str, value: Any) -> View:
        spec = TensorSpec((*data.shape[:2], 1, 1), dtype, data.block)
        return View(compute(spec, lambda n, c, y, z: value(n, c), name), spec)

    def summed(value: Any) -> Any:
        rows, columns = te.reduce_axis((0, data.shape[2]), "ry"), te.reduce_axis((0, data.shape[3]), "rx")
        return lambda n, c: te.sum(value(n, c, rows, columns), axis=[rows, columns])

    total = per_channel("total", "float64", summed(lambda *i: x(*i).astype("float64")))
    mean = per_channel("mean", "float64", lambda n, c: total(n, c, 0, 0) / pixels)

    def squared(n: Any, c: Any, y: Any, z: Any) -> Any:
        difference = x(n, c, y, z).astype("float64") - mean(n, c, 0, 0)
        return difference * difference

    spread = per_channel("spread", "float64", summed(squared))

    def root(n: Any, c: Any) -> Any:
        return tirx.sqrt(spread(n, c, 0, 0) / pixels + tirx.const(epsilon, "float64"))

    factor = per_channel("factor", "float64", lambda n, c: scales(0, c, 0, 0).astype("float64") / root(n, c))
    centre = per_channel("centre", "float32", lambda n, c: mean(n, c, 0, 0).astype("float32"))
    slope = per_channel("slope", "float32", lambda n, c: factor(n, c, 0, 0).astype("float32"))

    def moved(n: Any, c: Any) -> Any:
        rest = (mean(n, c, 0, 0) - centre(n, c, 0, 0).astype("float64")) * factor(n, c, 0, 0)
        return (shifts(0, c, 0, 0).astype("float64") - rest).astype("float32")

    offset = per_channel("offset", "float32", moved)

    def value(n: Any, c: Any, y: Any, z: Any) -> Any:
        return apart((x(n, c, y, z) - centre(n, c, 0, 0)) * slope(n, c, 0, 0)) + offset(n, c, 0, 0)

    return compute(data, value)


def _schedule_norm(func: Any, data: TensorSpec) -> Any:
    """Everything of one (sample, channel block) together; lanes vectorized."""
    from tvm.s_tir import Schedule

    sch = Schedule(func)
    loops = sch.get_loops(sch.get_sblock("out"))
    if data.block:
        sch.vectorize(loops[-1])
    outer = sch.fuse(*loops[:2])
    sch.parallel(outer)
    for name in STAGES:
        if not has_block(sch, name):
            continue
        block = sch.get_sblock(name)
        sch.compute_at(block, outer, preserve_unit_loops=True)
        inner = sch.get_loops(block)[1:]
        if name not in ("spread", "total"):
            if data.block:
                sch.vectorize(inner[-1])
            continue
        if data.block:
            rank = len(data.memory_shape)
            *spatial, lane = inner[:rank]
            sch.reorder(*spatial, *inner[rank:], lane)
            sch.vectorize(lane)
        sch.decompose_reduction(block, inner[-2])
    return sch.mod["main"]


def float_softmax(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.float_softmax`: plain memory, one fused pass per row of other axes."""
    data = inputs[0].with_block(0)
    axis = int(attrs["axis"]) % len(data.shape)
    if data.dtype != "float32":
        return None

    def build() -> Any:
        from tvm import te

        x = te.placeholder(data.shape, "float32", name="x")
        kept = (*data.shape[:axis], *data.shape[axis + 1 :])

        def at(index: tuple[Any, ...], k: Any) -> tuple[Any, ...]:
            return (*index[:axis], k, *index[axis:])

        def without(index: tuple[Any, ...]) -> tuple[Any, ...]:
            return (*index[:axis], *index[axis + 1 :])

        k = te.reduce_axis((0, data.shape[axis]), "k")
        largest = te.compute(kept or (1,), lambda *i: te.max(x[at(i[: len(kept)], k)], axis=k), name="largest")
        power = te.compute(data.shape, lambda *i: exponential(x[i] - largest[without(i) or (0,)]), name="power")
        k2 = te.reduce_axis((0, data.shape[axis]), "k")
        total = te.compute(kept or (1,), lambda *i: te.sum(power[at(i[: len(kept)], k2)], axis=k2), name="total")
        out = te.compute(data.shape, lambda *i: power[i] / total[without(i) or (0,)], name="out")
        return _schedule_softmax(prim_func([x, out]))

    return Kernel(build, (), data, ("float_softmax", data, axis), (data,))


def _schedule_softmax(func: Any) -> Any:
    """Every stage parallel over its outer axes."""
    from tvm.s_tir import Schedule

    sch = Schedule(func)
    for name in ("largest", "power", "total", "out"):
        block = sch.get_sblock(name)
        spatial = [
            loop
            for loop, var in zip(sch.get_loops(block), sch.get(block).iter_vars, strict=True)
            if int(var.iter_type) == 0
        ]
        if len(spatial) > 1:
            sch.parallel(sch.fuse(*spatial[:-1]))
    return sch.mod["main"]
