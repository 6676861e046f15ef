"""Float softmax and instance normalization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lpsn_tvm.schedules.expressions import exponential
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.isa import Isa
from lpsn_tvm.schedules.views import View, compute, has_block, placeholder, prim_func

Inputs = tuple[TensorSpec, ...]
Constants = Mapping[str, Array]
Attrs = Mapping[str, Any]


def float_instance_norm(inputs: Inputs, constants: Constants, attrs: Attrs, isa: Isa) -> Kernel | None:
    """Kernel of `lpsn.float_instance_norm`: three passes over each block of channels, parallel over blocks."""
    data, scale, shift = inputs[0], constants.get("scale"), constants.get("shift")
    if data.dtype != "float32" or len(data.shape) != 4 or scale is None or shift is None:
        return None
    epsilon = float(attrs["epsilon"])
    channels = TensorSpec((1, data.shape[1], 1, 1), "float32", data.block)
    packed = tuple(channels.pack(array.astype(np.float32).reshape(1, -1, 1, 1)) for array in (scale, shift))

    def build() -> Any:
        from tvm import te, tirx

        x, gamma, beta = placeholder(data, "x"), placeholder(channels, "scale"), placeholder(channels, "shift")
        view, scales, shifts = View(x, data), View(gamma, channels), View(beta, channels)
        pixels = data.shape[2] * data.shape[3]
        totals = TensorSpec((*data.shape[:2], 1, 1), "float32", data.block)

        def summed(value: Any, name: str) -> View:
            rows, columns = te.reduce_axis((0, data.shape[2]), "ry"), te.reduce_axis((0, data.shape[3]), "rx")
            return View(
                compute(totals, lambda n, c, y, z: te.sum(value(n, c, rows, columns), axis=[rows, columns]), name),
                totals,
            )

        inverse = tirx.const(1.0 / pixels, "float32")
        total = summed(view, "total")

        def squared(n: Any, c: Any, y: Any, z: Any) -> Any:
            difference = view(n, c, y, z) - total(n, c, 0, 0) * inverse
            return difference * difference

        spread = summed(squared, "spread")

        def factor(n: Any, c: Any, y: Any, z: Any) -> Any:
            variance = spread(n, c, 0, 0) * inverse
            return scales(0, c, 0, 0) / tirx.sqrt(variance + tirx.const(epsilon, "float32"))

        factors = View(compute(totals, factor, "factor"), totals)
        out = compute(
            data,
            lambda n, c, y, z: (
                (view(n, c, y, z) - total(n, c, 0, 0) * inverse) * factors(n, c, 0, 0) + shifts(0, c, 0, 0)
            ),
        )
        return _schedule_norm(prim_func([x, gamma, beta, out]), data, ("factor", "spread", "total"))

    return Kernel(build, packed, data, ("float_instance_norm", data, epsilon), (data,))


def _schedule_norm(func: Any, data: TensorSpec, stages: tuple[str, ...]) -> Any:
    """Everything of one (sample, channel block) together; lanes vectorized."""
    from tvm.s_tir import Schedule

    sch = Schedule(func)
    loops = sch.get_loops(sch.get_sblock("out"))
    if data.block:
        sch.vectorize(loops[-1])
    outer = sch.fuse(*loops[:2])
    sch.parallel(outer)
    for name in stages:
        if not has_block(sch, name):
            continue
        block = sch.get_sblock(name)
        sch.compute_at(block, outer, preserve_unit_loops=True)
        inner = sch.get_loops(block)[1:]
        if name == "factor":
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
