"""Loops of pooling: windows written out over a padded input, and sums over whole planes."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.llvm.views import elementwise_kernel, schedule_reduction
from lpsn_tvm.schedules.pooling import Pooling, Window
from lpsn_tvm.schedules.views import View, compute, placeholder, prim_func


def pool(
    name: str, data: TensorSpec, constants: tuple[Array, ...], out: TensorSpec, window: Window, pooling: Pooling
) -> Kernel:
    """Kernel of a reduction over a window; parameters as `Maker.pool` has them."""
    from tvm import tirx

    combine = tirx.max if pooling.is_maximum else lambda a, b: a + b

    def define(x: View, *extra: Any) -> Any:
        source = _padded(x, window, pooling.fill(*extra))

        def value(n: Any, c: Any, y: Any, z: Any) -> Any:
            taps = [tap.astype(pooling.dtype) for tap in _taps(source, window, n, c, y, z)]
            total = reduce(combine, taps)
            return total if pooling.finish is None else pooling.finish(total, y, z, *extra)

        return compute(out, value)

    return elementwise_kernel(name, (data,), constants, out, define, window)


def plane_sum(
    name: str, data: TensorSpec, out: TensorSpec, dtype: str, numbers: Array, finish: Callable[[Any, Any], Any]
) -> Kernel:
    """Kernel of a sum over H and W; parameters as `Maker.plane_sum` has them."""

    def build() -> Any:
        from tvm import te

        x = placeholder(data, "x")
        p = te.placeholder(numbers.shape, "float32", name="p")
        view = View(x, data)
        rows, columns = te.reduce_axis((0, data.shape[2]), "ry"), te.reduce_axis((0, data.shape[3]), "rx")
        total = TensorSpec(out.shape, dtype, out.block)
        acc = compute(
            total, lambda n, c, y, x_: te.sum(view(n, c, rows, columns).astype(dtype), axis=[rows, columns]), "acc"
        )
        sums = View(acc, total)
        return schedule_reduction(prim_func([x, p, compute(out, lambda *i: finish(sums(*i), p))]), out)

    return Kernel(build, (numbers,), out, (name, data, out), (data,))


def _padded(x: View, window: Window, fill: Any) -> View:
    """The input with `fill` around it, as far as windows reach."""
    from tvm import tirx

    n, c, height, width = x.spec.shape
    (top, left), (tall, wide) = window.padding, window.reach
    if not top and not left and tall <= height and wide <= width:
        return x
    spec = TensorSpec((n, c, tall, wide), x.spec.dtype, x.spec.block)

    def value(b: Any, channel: Any, y: Any, z: Any) -> Any:
        inside = tirx.all(y >= top, y < height + top, z >= left, z < width + left)
        return tirx.if_then_else(inside, x(b, channel, y - top, z - left), fill)

    return View(compute(spec, value, "pad"), spec)


def _taps(source: View, window: Window, n: Any, c: Any, y: Any, x: Any) -> list[Any]:
    """The pixels of one window."""
    (sh, sw), (dh, dw) = window.strides, window.dilation
    return [
        source(n, c, y * sh + r * dh, x * sw + s * dw) for r in range(window.kernel[0]) for s in range(window.kernel[1])
    ]
