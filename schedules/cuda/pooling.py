"""Loops of pooling: one thread makes the windows of neighbouring channels, a block the sum over a plane."""

from __future__ import annotations

from typing import Any

from lpsn_tvm.schedules.cuda.threads import element_kernel, reduction
from lpsn_tvm.schedules.cuda.window_sums import axes, tap
from lpsn_tvm.schedules.kernel import Array, Kernel, TensorSpec
from lpsn_tvm.schedules.pooling import Pooling, Window
from lpsn_tvm.schedules.views import View


def pool(
    name: str, data: TensorSpec, constants: tuple[Array, ...], out: TensorSpec, window: Window, pooling: Pooling
) -> Kernel:
    """Kernel of a reduction over a window; parameters as `Maker.pool` has them."""
    from tvm import te

    combine = te.max if pooling.is_maximum else te.sum

    def define(x: View, *extra: Any) -> Any:
        rows, columns = axes(window)
        fill = pooling.fill(*extra).astype(pooling.dtype)

        def term(*index: Any) -> Any:
            pixel = tap(x, window, index, rows, columns, fill, lambda value: value.astype(pooling.dtype))
            return combine(pixel, axis=[rows, columns])

        def finish(total: Any, n: Any, c: Any, y: Any, z: Any) -> Any:
            return pooling.finish(total, y, z, *extra)

        return reduction(out, pooling.dtype, term, finish)

    return element_kernel(name, (data,), constants, out, define, window, is_reduction=True)
